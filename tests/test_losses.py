"""The score of a loss is what the loss itself says of the whole set, and its standard error is that of a quotient."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autoprune
from autoprune.data.subsets import Data, materialise
from autoprune.early_stopping.racing import Racing
from autoprune.errors import DataError
from autoprune.metrics.choosing import resolve_metric
from autoprune.metrics.statistics import Evaluation
from autoprune.metrics.summary import summary
from autoprune.protocols import Measurement

GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(40, 3, 6, 6, generator=GENERATOR)
WEIGHTS = torch.tensor([1.0, 4.0, 0.5])
LABELS = torch.randint(0, 3, (40, 6, 6), generator=GENERATOR)
HOLES = LABELS.masked_fill(torch.rand(40, 6, 6, generator=GENERATOR) < torch.linspace(0, 1, 40)[:, None, None], 255)
SOFT = torch.rand(40, 3, 6, 6, generator=GENERATOR).softmax(1)
BINARY = (SOFT > 0.3).float()
torch.manual_seed(0)
NET = nn.Conv2d(3, 3, 3, padding=1).eval()


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.CrossEntropyLoss(ignore_index=255, weight=WEIGHTS)

    def forward(self, outputs, targets):
        return self.inner(outputs, targets)


class Masked(nn.Module):
    """A user's own, which divides by what it counts."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, outputs, targets):
        mask = (targets != 255).float()
        values = outputs.square().sum(1) * mask
        if self.reduction == "none":
            return values
        return values.sum() if self.reduction == "sum" else values.sum() / mask.sum()


LOSSES = {
    "ignored labels": (nn.CrossEntropyLoss(ignore_index=255), HOLES),
    "class weights": (nn.CrossEntropyLoss(ignore_index=255, weight=WEIGHTS), HOLES),
    "label smoothing": (nn.CrossEntropyLoss(ignore_index=255, weight=WEIGHTS, label_smoothing=0.1), HOLES),
    "labels of -100": (nn.CrossEntropyLoss(), HOLES.masked_fill(HOLES == 255, -100)),
    "sum": (nn.CrossEntropyLoss(ignore_index=255, reduction="sum"), HOLES),
    "soft labels": (nn.CrossEntropyLoss(weight=WEIGHTS), SOFT),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=torch.full((3, 1, 1), 3.0)), BINARY),
    "squares": (nn.MSELoss(), BINARY),
    "sum of differences": (nn.L1Loss(reduction="sum"), BINARY),
    "mean over the batch": (nn.KLDivLoss(reduction="batchmean"), SOFT),
    "function": (partial(F.cross_entropy, ignore_index=255, weight=WEIGHTS), HOLES),
    "own reduction": (Masked(), HOLES),
}
WHOLE = {
    "no reduction": (lambda o, t: F.cross_entropy(o, t, ignore_index=255), HOLES),
    "nested": (Nested(), HOLES),
    "sees all at once": (lambda o, t: (o.mean((0, 2, 3)) - t.mean((0, 2, 3))).square().sum(), BINARY),
}


def forward(batch):
    return NET(batch[0])


def judged(loss, targets):
    subsets = materialise(Data(*[(INPUTS, targets) for _ in range(3)], batch_size=7), seed=0)
    judge = resolve_metric(loss, subsets, forward)
    return judge, judge.measure(forward, subsets.validation, judge.dense_outputs(forward, subsets.validation))


@pytest.mark.parametrize("name", [*LOSSES, *WHOLE])
def test_the_score_is_what_the_loss_says_of_the_set(name):
    loss, targets = {**LOSSES, **WHOLE}[name]
    judge, scores = judged(loss, targets)
    assert scores.metric.mean() == pytest.approx(float(loss(NET(INPUTS).detach(), targets)), rel=1e-5)
    assert scores.signal.mean() == scores.metric.mean()
    assert judge.per_sample == (name in LOSSES)
    assert ("whole set is scored at once" in judge.note) == (name in WHOLE)


def test_the_built_in_loss_leaves_void_positions_out():
    judge, scores = judged("loss", HOLES)
    assert scores.metric.mean() == pytest.approx(
        float(F.cross_entropy(NET(INPUTS).detach(), HOLES, ignore_index=255)), rel=1e-5
    )
    assert "positions labelled 255 are left out" in judge.note
    assert judged("auto", HOLES)[0].name == "loss"


@pytest.mark.parametrize("name", ["ignored labels", "class weights", "sum"])
def test_the_standard_error_is_what_resampling_the_samples_gives(name):
    loss, targets = LOSSES[name]
    outputs, rng = NET(INPUTS).detach(), np.random.default_rng(0)
    drawn = [torch.from_numpy(rng.integers(0, 40, 40)) for _ in range(600)]
    again = [float(loss(outputs[rows], targets[rows])) for rows in drawn]
    judge, scores = judged(loss, targets)
    assert summary(scores.metric, judge.proportion, scores.weights).stderr == pytest.approx(np.std(again), rel=0.15)


def test_the_error_of_a_change_is_that_of_a_difference_of_quotients():
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.1, 2.0, 4000)
    weights /= weights.mean()
    dense = weights * rng.normal(1.0, 0.1, 4000)
    pruned = dense + 0.5 * weights  # worse by the same amount wherever a label counts: nothing is uncertain
    outcome, base = (Measurement(v, v, 0.0, weights=weights) for v in (pruned, dense))
    assert Evaluation.of(outcome, base).signal_change_stderr == pytest.approx(0.0, abs=1e-12)
    assert Evaluation.of(outcome, base).signal_stderr == pytest.approx(0.1 / 4000**0.5 * 1.15, rel=0.1)


def test_what_is_seen_of_a_race_is_taken_for_all_by_what_counts():
    weights = np.array([0.5, 1.5, 0.5, 1.5])
    dense = Measurement(weights.copy(), weights.copy(), 0.0, weights=weights)
    part = Measurement(1.2 * weights[:1], 1.2 * weights[:1], 0.0, raced="lost", weights=weights[:1])
    assert Evaluation.of(part, dense).signal == pytest.approx(1.2)


def test_a_set_without_any_label_that_counts_is_refused():
    with pytest.raises(DataError, match="all of 40 samples are ignored"):
        judged(nn.CrossEntropyLoss(ignore_index=255), torch.full((40, 6, 6), 255))


@pytest.mark.slow
def test_a_search_reports_racing_and_resuming_what_the_loss_says(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)).eval()
    data = Data((INPUTS, HOLES), (INPUTS, HOLES), (INPUTS, HOLES), batch_size=10)
    loss = nn.CrossEntropyLoss(ignore_index=255, weight=WEIGHTS)
    options = {"metric": loss, "optimizer": "random", "early_stopping": Racing()}
    expected = float(loss(net(INPUTS).detach(), HOLES))
    first = autoprune.search(
        net,
        "flops <= 80%",
        data,
        trials=6,
        execution=autoprune.Execution(run_dir=tmp_path / "run"),
        **options,
    )
    resumed = autoprune.Execution(run_dir=tmp_path / "run", resume=True)
    again = autoprune.search(net, "flops <= 80%", data, trials=7, execution=resumed, **options)
    assert first.dense.score == pytest.approx(expected, rel=1e-4)
    assert first.dense.test_score == pytest.approx(expected, rel=1e-4)
    intervals = [[trial.interval for trial in result.trials[:6] if trial.status == "ok"] for result in (first, again)]
    np.testing.assert_allclose(intervals[1], intervals[0], rtol=1e-4)
    best = first.best()
    with torch.no_grad():
        assert best.score == pytest.approx(float(loss(first.build(best).eval()(INPUTS), HOLES)), rel=1e-4)
