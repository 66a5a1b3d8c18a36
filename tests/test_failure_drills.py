"""Evaluators that raise, score NaN or run out of memory: the search goes on, and nothing that was found is lost."""

import sqlite3

import numpy as np
import pytest
import torch

import autoprune
from autoprune.evaluators import AdaptiveBN, FineTune
from autoprune.protocols import Failure, Measurement
from tests.searching import grouped
from zoo import ZOO

X = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
Y = ZOO["mlp"].build()(X).argmax(1)


def raised(error):
    def fault(measurement):
        raise error

    return fault


def with_nan(measurement):
    signal = measurement.signal.copy()
    signal[3] = np.nan
    return Measurement(signal, measurement.metric, measurement.seconds)


FAULTS = {
    "raises": (raised(ZeroDivisionError("a bug of the user's")), "ZeroDivisionError: a bug of the user's"),
    "NaN": (with_nan, "NaN or infinite"),
    "out of memory": (raised(torch.OutOfMemoryError("CUDA out of memory")), "OutOfMemoryError: CUDA out of memory"),
}


class Faulty:
    """An evaluator of a user's that does not keep its promise never to raise: every third time something goes wrong."""

    def __init__(self, fault, test_fails=False):
        self.inner, self.fault, self.test_fails, self.calls = AdaptiveBN(), fault, test_fails, 0

    def prepare(self, context):
        self.inner.prepare(context)

    def evaluate(self, candidates, chunk=None):
        self.calls += 1
        (measurement,) = self.inner.evaluate(candidates, chunk)
        return [self.fault(measurement) if self.calls % 3 == 0 else measurement]

    def build(self, candidate):
        return self.inner.build(candidate)

    def test(self, candidate):
        return self.fault(self.inner.test(candidate)) if self.test_fails else self.inner.test(candidate)


def search(evaluator, **options):
    options = {"trials": 24, **options}
    return autoprune.search(ZOO["mlp"].build(), "flops <= 60%", (X, Y), evaluator=evaluator, **grouped(**options))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("optimizer", ["auto", "nsga2"])
def test_every_fault_costs_one_trial_and_the_rest_is_found_and_recorded(name, optimizer, tmp_path):
    fault, reason = FAULTS[name]
    result = search(Faulty(fault), optimizer=optimizer, run_dir=str(tmp_path))
    failed = [trial for trial in result.trials if trial.status == "failed"]
    assert (len(result.trials), result.stopped) == (24, "trials")
    assert len(failed) == 8
    assert all(reason in trial.reason for trial in failed)
    assert result.front
    assert all(trial.status == "ok" and trial.test_score is not None for trial in result.front)
    assert torch.isfinite(result.build()(X)).all()
    with sqlite3.connect(tmp_path / "journal.sqlite") as journal:
        rows = dict(journal.execute("select status, count(*) from trials group by status").fetchall())
    assert rows == {"ok": 16, "failed": 8}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_the_held_out_data_costs_that_score_and_not_the_result(name):
    fault, _ = FAULTS[name]
    result = search(Faulty(fault, test_fails=True), trials=8)
    assert result.front
    assert all(trial.test_score is None for trial in (result.dense, *result.front))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_search_whose_every_trial_fails_ends_and_says_why(name):
    fault, reason = FAULTS[name]

    class Broken(Faulty):
        def evaluate(self, candidates, chunk=None):
            (measurement,) = self.inner.evaluate(candidates, chunk)
            return [self.fault(measurement) if candidates.any() else measurement]

    result = search(Broken(fault), trials=6)
    assert [trial.status for trial in result.trials] == ["failed"] * 6
    assert result.front == ()
    with pytest.raises(autoprune.InfeasibleBudgetError, match=reason.partition(":")[0]):
        result.best()


@pytest.mark.slow
def test_a_training_that_runs_out_of_memory_costs_that_trial():
    def train(model, steps):
        if model[0].out_features % 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    result = search(FineTune(steps=1, train_fn=train), trials=12, optimizer="random")
    for trial in result.trials:
        assert (trial.status == "failed") == bool(trial.decoded["0"] % 2)
    assert {trial.status for trial in result.trials} == {"ok", "failed"}


@pytest.mark.slow
def test_a_dense_model_that_cannot_be_scored_ends_the_search_at_once():
    class Broken(Faulty):
        def evaluate(self, candidates, chunk=None):
            return [Failure("no such file")]

    with pytest.raises(ValueError, match="model cannot be scored on the validation data: no such file"):
        search(Broken(None))
