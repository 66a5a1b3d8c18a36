"""Outputs that are probabilities count as the logits before the softmax would; vectors of length 1 are no classes."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torch.nn import functional as F

import autoprune
from autoprune.data.subsets import Data, materialise
from autoprune.metrics import scorers
from autoprune.metrics.choosing import resolve_metric
from autoprune.metrics.scorers import (
    MANY,
    are_chances,
    are_directions,
    class_dimension,
    divergence,
    drawn_cross_entropy,
)
from tests.searching import quick

X = torch.randn(120, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(120) % 3


class Normalise(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=1)


def network(last, classes=3):
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, classes), *([last] if last else [])
    )
    with torch.no_grad():
        made[4].weight.mul_(20)
    return made.eval()


def search(model, metric, labels=LABELS, **options):
    data = (X,) if labels is None else (X, labels)
    return quick(model, "flops <= 50%", Data(*[data] * 3), metric=metric, trials=8, seed=0, **options)


@pytest.mark.parametrize(("metric", "labels"), [("accuracy", LABELS), ("agreement", None), ("auto", LABELS)])
def test_a_softmax_at_the_end_changes_nothing(metric, labels):
    plain, soft = (search(network(last), metric, labels) for last in (None, nn.Softmax(dim=1)))
    assert [t.candidate for t in plain.trials] == [t.candidate for t in soft.trials]
    np.testing.assert_allclose([t.signal for t in plain.trials], [t.signal for t in soft.trials], rtol=1e-3, atol=1e-6)
    assert [t.score for t in plain.trials] == [t.score for t in soft.trials]
    (note,) = [note for note in soft.notes if "probabilities" in note]
    assert "metric" in note
    assert not any("probabilities" in note for note in plain.notes)


def test_a_loss_over_positions_takes_the_logarithm():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 5, 6, 6, generator=generator)
    subsets = materialise(Data(*[(x, torch.randint(0, 5, (24, 6, 6), generator=generator))] * 3), seed=0)
    losses = []
    for make in (lambda batch: batch[0], lambda batch: batch[0].softmax(1)):
        judge = resolve_metric("loss", subsets, make)
        losses.append(judge.measure(make, subsets.validation, judge.dense_outputs(make, subsets.validation))[0])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_each_of_many_sigmoids_is_compared_alone():
    def dense(batch):
        return batch[0][:, :10].sigmoid()

    subsets = materialise(Data(*[(X,)] * 3), seed=0)
    judge = resolve_metric("auto", subsets, dense)
    assert (judge.name, "taken for probabilities" in judge.note) == ("agreement", True)

    def pruned(batch):
        return 0.5 * (1.5 * batch[0][:, :10]).sigmoid()

    signal = judge.measure(pruned, subsets.validation, judge.dense_outputs(dense, subsets.validation))[0]
    p, q = (torch.cat([f(batch) for batch in subsets.validation]) for f in (dense, pruned))
    expected = kl_divergence(Bernoulli(p.double()), Bernoulli(q.double())).sum(1)
    np.testing.assert_allclose(signal, expected, rtol=1e-3, atol=1e-6)
    assert judge.measure(dense, subsets.validation, judge.dense_outputs(dense, subsets.validation))[0].max() == 0


def test_labels_drawn_from_sigmoids_have_the_curvature_of_their_divergence():
    output = torch.rand(1, MANY, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    generator, squares = torch.Generator().manual_seed(3), torch.zeros(MANY).double()
    for _ in range(4000):
        loss, positions = drawn_cross_entropy(output, 1, generator)
        squares += torch.autograd.grad(loss, output)[0][0].square() / 4000
    assert positions == 1
    apart = partial(divergence, 1, "chances", dense=output.detach())
    curvature = torch.autograd.functional.hessian(lambda x: apart(x[None]).sum(), output[0].detach())
    np.testing.assert_allclose(squares, curvature.diagonal(), rtol=0.3)
    assert curvature.diagonal() == pytest.approx((1 / (output * (1 - output)))[0].detach(), rel=1e-4)


def test_the_first_batch_decides_for_all():
    logits = torch.rand(40, 10, generator=torch.Generator().manual_seed(1))
    logits[:20] *= 2
    subsets = materialise(Data(*[[(logits[:20],), (logits[20:],)]] * 3), seed=0)
    judge = resolve_metric("auto", subsets, lambda batch: batch[0])
    known = judge.dense_outputs(lambda batch: batch[0], subsets.validation)
    signal = judge.measure(lambda batch: 0.9 * batch[0], subsets.validation, known)[0]
    assert [are_chances(batch[0], 1) for batch in subsets.validation] == [False, True]
    dense = torch.cat([batch[0] for batch in subsets.validation])
    expected = kl_divergence(Categorical(logits=dense), Categorical(logits=0.9 * dense))
    np.testing.assert_allclose(signal, expected, rtol=1e-2, atol=1e-6)


def test_training_keeps_the_size_of_small_features():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU()
    ).eval()
    with torch.no_grad():
        model[4].weight.mul_(0.3)
        model[4].bias.mul_(0.3)
        dense = model(X)
    small = search(model, "auto", None).build()
    autoprune.recover(
        small, (X,), teacher=model, steps=60, recipe=autoprune.Recovery(lr=0.01, distill="logits", batch_size=60)
    )
    with torch.no_grad():
        error = (small(X) - dense).square().mean() / dense.square().mean()
    assert error < 0.3  # shares of their sum say nothing of their size, which grew by far


def test_an_output_of_zero_is_no_infinite_loss():
    def dense(batch):
        return batch[0].topk(1).indices == torch.arange(12)

    subsets = materialise(Data(*[(X,)] * 3), seed=0)
    judge = resolve_metric("agreement", subsets, lambda batch: dense(batch).float())
    found = judge.measure(
        lambda batch: 1 - dense(batch).float(),
        subsets.validation,
        judge.dense_outputs(lambda batch: dense(batch).float(), subsets.validation),
    )
    assert np.isfinite(found[0]).all()
    assert not found[1].any()


class TestWhatCounts:
    def test_values_of_any_size_are_no_probabilities(self):
        assert not are_chances(X, 1)
        assert not are_chances(X.log_softmax(1), 1)
        assert not are_chances(3 * X.abs(), 1)

    def test_few_values_between_0_and_1_have_to_sum_to_1(self):
        assert not are_chances(torch.tensor([[0.3, 0.6], [0.1, 0.2]]), 1)
        assert are_chances(torch.tensor([[0.3, 0.7], [0.9, 0.1]]), 1)
        assert not are_chances(torch.tensor([[0.3, 0.7], [0.9, 0.3]]), 1)  # the first sample alone does not tell
        assert are_chances(X.softmax(1).bfloat16(), 1)
        assert are_chances(X.sigmoid(), 1)

    def test_vectors_of_length_1_are_directions_and_no_classes(self):
        assert are_directions(F.normalize(X, dim=1))
        assert not are_directions(X)
        assert not are_directions(torch.eye(4))  # probabilities of a network that is sure
        assert class_dimension(F.normalize(X, dim=1), (X,)) is None
        assert class_dimension(X, (X,)) == 1


def test_normalised_embeddings_are_compared_by_their_cosine():
    result = search(network(Normalise(), classes=16), "auto", None)
    assert result.metric == "cosine"
    assert any("vectors of length 1" in note for note in result.notes)
    without = quick(network(Normalise(), classes=16), "flops <= 50%", example=X[:4], trials=2)
    assert without.metric == "cosine"


def test_training_learns_from_probabilities_what_it_would_from_logits():
    labels = network(None)(X).argmax(1)
    losses = []
    for last in (None, nn.Softmax(dim=1)):
        small = search(network(last), "accuracy", labels).build()
        autoprune.recover(small, (X, labels), teacher=network(last), steps=60, recipe=autoprune.Recovery(lr=0.01))
        with torch.no_grad():
            logits = small[:5](X)
        losses.append(F.cross_entropy(logits, labels).item())
    assert losses[0] < 0.5
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_labels_are_drawn_in_parts_as_they_are_at_once(monkeypatch):
    logits = torch.randn(7, 11, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for at_once in (2**22, 5 * 9, 1):
        monkeypatch.setattr(scorers, "_AT_ONCE", at_once)
        found.append(scorers.drawn_cross_entropy(logits, -1, torch.Generator().manual_seed(1)))
    assert found[0][1] == 77
    assert found[0] == found[1] == found[2]
    drawn = [scorers.drawn_cross_entropy(logits, -1, torch.Generator().manual_seed(i))[0] / 77 for i in range(40)]
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    assert torch.stack(drawn).mean().item() == pytest.approx(entropy.item(), rel=0.02)
