"""Writes of a user's code to its samples do not last: the next reader gets the drawn samples."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoprune
from autoprune.data.batch import Guarded, Lent, default_forward, fresh
from autoprune.evaluators import AdaptiveBN, Compensated, FineTune, Supernet
from tests.searching import quick, seen

CLASSES = 4
LABELS = torch.randint(0, CLASSES, (240,), generator=torch.Generator().manual_seed(0))
INPUTS = 100 + 40 * (torch.randn(240, 12, generator=torch.Generator().manual_seed(1)) + 3 * F.one_hot(LABELS, 12))


def normalised(x):
    return (x - 100) / 40


def writing(x):
    return x.sub_(100).div_(40)


def by_data(x):
    return writing(x.data)


class Network(nn.Module):
    """Normalises its input in one way or another."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.net = nn.Sequential(
            nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, CLASSES)
        )

    def forward(self, x):
        return self.net(self.how(x))


def trained(how):
    torch.manual_seed(0)
    model = Network(normalised)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(INPUTS), LABELS).backward()
        optimizer.step()
    model.how = how
    return model.eval()


def search(model, data=None, **options):
    return quick(model, "flops <= 60%", (INPUTS, LABELS) if data is None else data, **options)


EVALUATORS = [AdaptiveBN, Compensated, lambda: FineTune(steps=3), lambda: Supernet(steps=3)]


@pytest.mark.slow
@pytest.mark.parametrize("make", EVALUATORS, ids=["adaptive_bn", "compensated", "finetune", "supernet"])
def test_a_model_that_normalises_in_place_scores_as_one_that_does_not(make):
    right = search(trained(normalised), evaluator=make())
    assert right.dense.score > 0.9
    assert seen(search(trained(writing), evaluator=make())) == seen(right)


@pytest.mark.slow
def test_writes_that_leave_no_trace_do_not_last_either():
    def wiping(model, batch):
        outputs = model(batch[0])
        batch[0].numpy()[:] = 0
        return outputs

    right = search(trained(normalised)).dense.score
    assert search(trained(by_data)).dense.score == right
    assert search(trained(normalised), forward=wiping).dense.score == right


def popping(model, batch):
    batch.pop("labels")
    return model(**batch)


def emptying(model, batch):
    batch["x"], batch["labels"] = batch["x"].mul_(0), None
    return model(torch.as_tensor(batch["extra"]["inputs"]))


@pytest.mark.slow
@pytest.mark.parametrize("forward", [popping, emptying])
def test_a_forward_may_empty_and_overwrite_the_containers_of_its_batch(forward):
    def batch(rows):
        return {"x": INPUTS[rows], "labels": LABELS[rows]} | (
            {"extra": {"inputs": INPUTS[rows].numpy(), "names": ["a"] * 40}} if forward is emptying else {}
        )

    batches = [batch(slice(i, i + 40)) for i in range(0, 240, 40)]
    result = search(trained(normalised), batches, forward=forward)
    assert result.metric == "accuracy"
    assert result.dense.score > 0.9
    assert {trial.status for trial in result.trials} == {"ok"}


def zeroing(outputs, batch):
    right = (outputs.argmax(1) == batch[1]).float()
    batch[0].zero_()
    batch[1].fill_(CLASSES - 1)
    outputs.zero_()
    return right


def zeroing_all(forward, batches):
    right = [(forward(batch).argmax(1) == batch[1]).float().mean() for batch in batches]
    for batch in batches:
        batch[0].zero_()
        batch[1].numpy()[:] = 0
    return torch.stack(right).mean()


def zeroing_loss(outputs, targets, reduction="mean"):
    loss = F.cross_entropy(outputs, targets, reduction=reduction)
    targets.fill_(0)
    return loss


@pytest.mark.slow
@pytest.mark.parametrize(
    "metric",
    [
        autoprune.Metric(zeroing, True, name="accuracy"),
        autoprune.Metric(zeroing_all, True, per_sample=False, name="accuracy"),
    ],
    ids=["per sample", "whole set"],
)
def test_a_metric_that_writes_to_its_samples_scores_as_one_that_does_not(metric):
    careless, right = search(trained(normalised), metric=metric), search(trained(normalised), metric="accuracy")
    assert careless.dense.score == pytest.approx(right.dense.score, abs=1e-6)
    assert careless.dense.test_score == pytest.approx(right.dense.test_score, abs=1e-6)


@pytest.mark.slow
def test_a_loss_that_writes_to_its_targets_scores_as_one_that_does_not():
    careless = search(trained(normalised), metric=zeroing_loss)
    assert seen(careless) == seen(search(trained(normalised), metric=F.cross_entropy))


@pytest.mark.slow
def test_a_metric_of_the_whole_set_may_run_the_model_on_what_it_changed():
    def without_inputs(forward, batches):
        outputs = []
        for batch in batches:
            batch[0].fill_(100)
            outputs.append(forward(batch))
        return torch.cat(outputs).std(0).max()

    result = search(trained(normalised), metric=autoprune.Metric(without_inputs, False, per_sample=False))
    assert all(trial.score < 1e-5 for trial in result.trials)


@pytest.mark.slow
def test_the_distortion_is_measured_where_a_metric_of_the_whole_set_hands_back_what_it_got():
    def accuracy(forward, batches):
        return torch.cat([(forward(batch).argmax(1) == batch[1]).float() for batch in batches]).mean()

    result = search(trained(normalised), metric=autoprune.Metric(accuracy, True, per_sample=False))
    assert all(trial.distortion > 0 for trial in result.trials if any(trial.candidate))


@pytest.mark.slow
def test_an_evaluator_that_writes_to_its_candidates_changes_none():
    class Careless(AdaptiveBN):
        def evaluate(self, candidates, chunk=None):
            outcomes = super().evaluate(candidates, chunk)
            candidates[:] = 0
            return outcomes

    assert seen(search(trained(normalised), evaluator=Careless())) == seen(
        search(trained(normalised), evaluator=AdaptiveBN())
    )


@pytest.mark.slow
def test_the_tensors_of_the_user_stay_as_they_are_without_data_too():
    class Reads(Network):
        def forward(self, x):
            self.least = float(x.min())  # so that it is traced on real values
            return super().forward(x)

    example = INPUTS[:2].clone()
    model = Reads(writing).eval()
    autoprune.inspect(model, example)
    quick(model, "flops <= 60%", example=[example])
    assert torch.equal(example, INPUTS[:2])


class TestCopies:
    def test_nothing_is_shared_down_to_nested_containers(self):
        batch = ({"a": [torch.ones(2), np.ones(2)], "b": ([np.ones(2)], "name", {1})}, [[1, 2], [3]], torch.ones(2))
        copied = fresh(batch)
        copied[0]["a"][0].zero_()
        copied[0]["a"][1][:] = 0
        copied[0]["b"][0][0][:] = 0
        copied[0]["b"][2].add(2)
        copied[1][0].append(5)
        copied[0]["c"] = 1
        assert batch[0]["a"][0].sum() == batch[0]["a"][1].sum() == batch[0]["b"][0][0].sum() == 2
        assert batch[0]["b"][2] == {1}
        assert batch[1] == [[1, 2], [3]]
        assert "c" not in batch[0]

    def test_lent_batches_are_known_again_unless_they_were_changed(self):
        batches = [(torch.ones(3), {"names": ["a", "b", "c"]}), (torch.zeros(3), {"names": []})]
        lent = Lent(batches)
        assert len(lent) == 2
        first, second = lent
        assert lent.original(first) is batches[0]
        assert lent.original(lent[-1]) is batches[1]
        assert lent.original(lent[:1][0]) is batches[0]
        second[0].add_(1)
        assert lent.original(second) is second
        assert lent.original("else") == "else"

    def test_a_guarded_forward_travels_to_workers(self):
        guarded = pickle.loads(pickle.dumps(Guarded(default_forward)))
        assert torch.equal(guarded(nn.Identity(), (torch.ones(2), None)), torch.ones(2))
