"""Shared weights: whose gradients they get, what they learn from, and what is scored with them."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import autoprune
from autoprune.evaluators import Supernet
from autoprune.evaluators.training.sandwich import Sandwich, random_candidates
from autoprune.search_spaces import Sparsity
from autoprune.testing.contracts import EvaluatorContract
from tests.contexts import classes_context, halved, regression_context, study_of
from tests.supernet.networks import (
    Dropping,
    Plain,
    context_of,
    made,
    prepared,
    rows,
    weights,
)
from zoo.attention import EinsumVit

CONTEXTS = {
    "tied": partial(classes_context, "tied", "adaptive_bn"),
    "drawing": context_of,
    "sparse": partial(context_of, Plain, space="sparsity"),
    "patterned": partial(context_of, Plain, space=Sparsity(levels=(0, 0.5), patterns=["2:4", "1x8"])),
}


@pytest.mark.parametrize("name", CONTEXTS, scope="class")
class TestSupernet(EvaluatorContract):
    @pytest.fixture(autouse=True)
    def _network(self, name):
        self.name = name

    def make_evaluator(self):
        return Supernet(steps=2)

    def make_context(self):
        return CONTEXTS[self.name]()


class TestSupernetOnKeywordsFloatsAndAMetricOfTheWholeSet(EvaluatorContract):
    def make_evaluator(self):
        return Supernet(steps=2)

    def make_context(self):
        return regression_context("adaptive_bn")

    def test_chunks_of_the_validation_batches_join_up_to_the_whole(self):
        """A metric of the whole set has no chunks."""


def masked(model, context, candidate):
    """Parameters of the whole model, zero where the candidate has none, as functions of the whole ones."""
    edit = context.structure.edit(context.space.pruning(candidate.tolist()))
    found = {}
    for name, whole in model.named_parameters():
        mask = torch.ones_like(whole)
        for dim, kept in edit.slices.get(name, {}).items():
            gone = np.setdiff1d(np.arange(whole.shape[dim]), kept)
            mask.index_fill_(dim, torch.from_numpy(gone), 0)
        if name in edit.zeroed:
            least = whole.detach().abs().flatten().argsort()[: edit.zeroed[name]]
            mask.view(-1)[least] = 0
        found[name] = whole * mask
    return found


@pytest.mark.slow
@pytest.mark.parametrize("space", ["channels", "sparsity"])
def test_shared_weights_get_the_gradients_of_the_masked_model(space):
    context = context_of(Plain, space=space)
    model, other = made(Plain), made(Plain)
    with torch.no_grad():
        for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            same.copy_(parameter)
    candidates, batch = np.stack([halved(context), context.space.sizes - 1]), rows()
    losses = Sandwich(context, model, None, nullcontext).step(batch, candidates)

    logits = other(batch[0])
    given = context.model(batch[0]).log_softmax(1).detach()
    divergence = partial(F.kl_div, reduction="batchmean", log_target=True)
    expected = [F.cross_entropy(logits, batch[1]) + divergence(logits.log_softmax(1), given)]
    for candidate in candidates:
        smaller = functional_call(other, masked(other, context, candidate), (batch[0],))
        expected.append(divergence(smaller.log_softmax(1), logits.log_softmax(1).detach()))
    sum(expected).backward()
    np.testing.assert_allclose(losses, [loss.item() for loss in expected], rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, other.get_parameter(name).grad, msg=name)


@pytest.mark.slow
def test_a_short_training_makes_candidates_better_and_keeps_the_largest(digits, digits_model):
    data = autoprune.Data(calibration=digits.train, validation=digits.validation, test=digits.test)
    study = study_of(digits_model, data, metric="accuracy", evaluator="adaptive_bn")
    supernet = prepared(study.context, steps=60, data=digits.train, lr=3e-3)
    candidates = np.stack([np.zeros_like(halved(study.context)), halved(study.context)])
    before, after = study.evaluator.evaluate(candidates), supernet.evaluate(candidates)
    assert after[0].metric.mean() > before[0].metric.mean() - 0.02
    assert after[1].metric.mean() > before[1].metric.mean() + 0.1


@pytest.mark.slow
def test_candidates_have_slices_of_the_shared_weights_and_exact_statistics_of_their_own(context):
    supernet, candidate = prepared(context, steps=3), halved(context)
    shared = supernet._learned.weights
    edit = context.structure.edit(context.space.pruning(candidate.tolist()))
    small = supernet.build(candidate)
    for name, parameter in small.named_parameters():
        expected = shared[name]
        for dim, kept in edit.slices.get(name, {}).items():
            expected = expected[kept] if dim == 0 else expected[:, kept]
        assert torch.equal(parameter, expected), name
    x = small[0](torch.cat([batch[0] for batch in context.subsets.calibration]))
    torch.testing.assert_close(small[1].running_mean, x.mean(0))
    torch.testing.assert_close(small[1].running_var, x.var(0, correction=1), rtol=0.1, atol=0)  # averaged over batches


@pytest.mark.slow
def test_heads_and_inner_widths_of_a_transformer_share_weights():
    images = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data = autoprune.Data(validation=(images, torch.arange(60) % 4), batch_size=16)
    context = study_of(made(EinsumVit), data, evaluator="adaptive_bn").context
    supernet = prepared(context, steps=2)
    candidates = np.stack([np.zeros_like(halved(context)), halved(context), context.space.sizes - 1])
    outcomes = supernet.evaluate(candidates)
    for candidate, outcome in zip(candidates, outcomes, strict=True):
        logits = supernet.build(candidate).eval()(torch.cat([batch[0] for batch in context.subsets.validation]))
        labels = torch.cat([batch[1] for batch in context.subsets.validation])
        losses = F.cross_entropy(logits, labels, reduction="none").detach().double().numpy()
        np.testing.assert_allclose(outcome.signal, losses, atol=1e-4)


@pytest.mark.slow
def test_the_largest_learns_from_the_loss_of_the_user(context):
    zero = prepared(context, steps=60, lr=0.01, loss=lambda outputs, batch: 100 * outputs.square().mean())
    outputs = zero.build(np.zeros_like(halved(context)))(rows()[0])
    assert outputs.square().mean() < 0.2 * context.model(rows()[0]).square().mean()


def test_a_loss_is_asked_for_where_there_is_nothing_to_learn_and_serves_all_candidates(context):
    blind = replace(context, judge=replace(context.judge, distance=None, proportion=None))
    with pytest.raises(ValueError, match="pass Supernet"):
        prepared(blind, steps=1)
    seen = []

    def loss(outputs, batch):
        seen.append(len(outputs))
        return outputs.square().mean()

    prepared(blind, steps=1, subnets=1, loss=loss)
    assert len(seen) == 3


@pytest.mark.slow
def test_a_search_says_what_its_dense_network_is_and_builds_what_it_scored(tmp_path):
    data, model = autoprune.Data(validation=rows(), batch_size=16), made(Dropping)
    run_dir = tmp_path / "run"
    result = autoprune.search(
        model,
        "flops <= 60%",
        data,
        evaluator=Supernet(steps=4),
        execution=autoprune.Execution(run_dir=run_dir),
        trials=4,
    )
    (note,) = [note for note in result.notes if "largest of the supernet" in note]
    assert f"validation accuracy {result.dense.score:.4f}" in note
    autoprune.save(result.build(), tmp_path / "small.safetensors")
    loaded = autoprune.load(tmp_path / "small.safetensors", model)
    x = torch.cat([batch[0] for batch in result._builder.context.subsets.validation])
    y = torch.cat([batch[1] for batch in result._builder.context.subsets.validation])
    with torch.no_grad():
        assert float((loaded(x).argmax(1) == y).double().mean()) == pytest.approx(result.best().score)
    with pytest.raises(ValueError, match=r"differs in evaluator \(Supernet with weights"):
        autoprune.search(
            model,
            "flops <= 60%",
            data,
            evaluator=Supernet(steps=5),
            execution=autoprune.Execution(run_dir=run_dir, resume=True),
            trials=4,
        )


@pytest.mark.slow
def test_agreement_compares_with_the_model_given():
    context = context_of(data=rows()[0])
    dense = np.zeros((1, len(context.space.sizes)), dtype=np.int64)
    (outcome,) = prepared(context, steps=5, lr=0.1).evaluate(dense)
    assert outcome.signal.mean() > 0.01
    (same,) = prepared(context, steps=1, lr=1e-12).evaluate(dense)
    assert same.signal.mean() < outcome.signal.mean()


@pytest.mark.slow
def test_candidates_drawn_cost_anything_from_most_to_least():
    space = context_of(partial(nn.Sequential, *[nn.Linear(6, 6) for _ in range(9)])).space
    levels = random_candidates(space, 400, np.random.default_rng(0)) / (space.sizes - 1)
    assert ((levels >= 0) & (levels <= 1)).all()
    means = levels.mean(1)
    assert (np.histogram(means, 4, (0, 1))[0] > 60).all()
    assert levels.std(1).mean() > 0.1


def test_mixed_precision_runs_in_bfloat16_and_keeps_the_weights_in_single(context):
    dtypes = []

    def loss(outputs, batch):
        dtypes.append(outputs.dtype)
        return outputs.float().square().mean()

    mixed = prepared(context, steps=2, loss=loss, mixed_precision=True)
    assert set(dtypes) == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(mixed).values()} == {torch.float32, torch.int64}


@pytest.mark.gpu
def test_on_a_gpu_it_trains_in_mixed_precision_and_scores():
    model, data = made(Dropping).cuda(), autoprune.Data(validation=rows(), batch_size=16)
    context = study_of(model, data, evaluator="adaptive_bn").context
    (outcome,) = prepared(context, steps=5).evaluate(halved(context)[None])
    assert np.isfinite(outcome.signal).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 0}, "steps must be"), ({"subnets": -1}, "subnets must be"), ({"lr": 0}, "lr must be")],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Supernet(**settings)


@pytest.mark.slow
def test_a_model_without_anything_to_train_is_refused():
    context = context_of()
    context.model.requires_grad_(False)
    with pytest.raises(ValueError, match="none requires gradients"):
        prepared(context)
