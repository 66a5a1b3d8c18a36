"""Statistics of measurements: standard errors against simulations, their form in files, and how often they run."""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from autoprune.journal.journal import Journal
from autoprune.metrics.statistics import evaluations_of
from autoprune.protocols import Failure, Measurement
from autoprune.result import Evaluation
from tests.searching import quick

SAMPLES = 200


@pytest.fixture(scope="module")
def whole():
    """Dense and pruned values on all validation samples, which are a fixed and finite set; hard samples are shared."""
    rng = np.random.default_rng(0)
    dense = rng.gamma(2.0, size=SAMPLES)
    return dense, dense + rng.normal(0.3, 0.5, SAMPLES)


def raced_after(n, order, dense, pruned, weights=None):
    """Evaluation that saw the first n samples of an order, and the measurement of the dense model in that order."""
    weights = np.empty(0) if weights is None else weights[order]
    base = Measurement(dense[order], dense[order], 0.0, weights=weights)
    part = Measurement(pruned[order][:n], pruned[order][:n], 0.0, raced="behind", weights=weights[:n])
    return Evaluation.of(part, base)


class TestTheEstimateOfACandidateThatWasDroppedEarly:
    @pytest.mark.parametrize("n", [20, 100, 180])
    def test_its_standard_error_is_the_spread_of_estimates_over_random_orders_of_the_samples(self, whole, n):
        rng = np.random.default_rng(1)
        seen = [raced_after(n, rng.permutation(SAMPLES), *whole) for _ in range(4000)]
        spread = np.std([one.signal for one in seen])
        assert np.mean([one.signal_stderr for one in seen]) == pytest.approx(spread, rel=0.05)
        assert np.mean([one.signal for one in seen]) == pytest.approx(whole[1].mean(), abs=4 * spread / 4000**0.5)
        assert all(one.signal_change_stderr == one.signal_stderr for one in seen)
        assert all(one.metric_change_stderr == one.signal_stderr for one in seen)

    def test_with_weights_it_is_that_of_a_quotient(self, whole):
        rng = np.random.default_rng(2)
        weights = rng.choice([0.5, 1.0, 1.5], SAMPLES)
        weights /= weights.mean()
        dense, pruned = whole[0] * weights, (whole[1] + 2) * weights  # a change that goes with the weights
        seen = [raced_after(80, rng.permutation(SAMPLES), dense, pruned, weights) for _ in range(4000)]
        assert np.mean([one.signal_stderr for one in seen]) == pytest.approx(np.std([e.signal for e in seen]), rel=0.05)

    def test_it_is_certain_once_all_samples_are_seen(self, whole):
        one = raced_after(SAMPLES, np.arange(SAMPLES), *whole)
        assert one.signal == pytest.approx(whole[1].mean())
        assert one.signal_stderr == 0.0


def test_squared_standard_errors_are_right_on_average_over_all_draws_of_three_values():
    values = np.array([0.0, 1.0, 5.0])
    draws = [Measurement(np.array(draw), np.ones(3), 0.0) for draw in product(values, repeat=3)]
    found = [Evaluation.of(draw) for draw in draws]
    assert np.mean([one.signal_stderr**2 for one in found]) == pytest.approx(np.var([one.signal for one in found]))


@pytest.mark.parametrize(
    ("evaluation", "fidelity"),
    [
        (Evaluation(9, 1.5, signal=0.25, metric=0.5), "full"),
        (Evaluation(4, signal=0.25, signal_stderr=0.1, part=True), "part"),
        (Evaluation(9, signal=0.25, distortion=0.125, steps=89), "89 steps"),
        (Evaluation(seconds=2.0), "full"),
    ],
)
def test_a_file_holds_the_fidelity_as_text_and_gives_the_same_evaluation_back(evaluation, fidelity):
    written = evaluation.to_json()
    assert written["fidelity"] == fidelity
    assert Evaluation.from_json(written) == evaluation


@pytest.mark.parametrize("fidelity", ["half", "89", "x steps", "-3 steps", ""])
def test_a_fidelity_that_is_never_written_is_refused(fidelity):
    with pytest.raises(ValueError, match="fidelity must be"):
        Evaluation.from_json({**Evaluation().to_json(), "fidelity": fidelity})


def test_what_a_file_of_an_earlier_version_lacks_is_not_defined():
    old = {"fidelity": "full", "samples": 9, "seconds": 1.5, "signal": 0.25, "metric": 0.5, "signal_stderr": 0.1}
    assert Evaluation.from_json(old) == Evaluation(9, 1.5, signal=0.25, metric=0.5, signal_stderr=0.1)


def test_a_candidate_has_an_evaluation_for_each_rung_and_one_for_a_failure():
    last = Measurement(np.ones(4), np.ones(4), 3.0)
    rungs = tuple(replace(last, seconds=seconds, steps=steps) for seconds, steps in ((1.0, 3), (2.0, 9)))
    found = evaluations_of(replace(last, rungs=rungs))
    assert [(one.steps, one.seconds) for one in found] == [(3, 1.0), (9, 2.0), (0, 3.0)]
    assert evaluations_of(Failure("out of memory", 2.0)) == (Evaluation(seconds=2.0),)


class TestASearchComputesOnce:
    """One evaluation and one trial, whoever reads them: the journal, the optimizer, the racing and the result."""

    TRIALS = 12

    @pytest.fixture
    def counted(self, monkeypatch):
        """Number of summaries, by the status of what was summarised."""
        found, of = Counter(), Evaluation.of

        def counting(outcome, dense=None):
            found[outcome.status] += 1
            return of(outcome, dense)

        monkeypatch.setattr(Evaluation, "of", counting)
        return found

    @pytest.mark.parametrize("racing", [False, True])
    def test_the_statistics_of_a_trial(self, mlp, vectors, counted, racing):

        result = quick(mlp, "flops <= 60%", vectors, trials=self.TRIALS, early_stopping=racing, optimizer="random")
        assert len(result.trials) == self.TRIALS
        assert counted.total() == self.TRIALS + 1  # the dense model too

    def test_the_costs_of_a_trial(self, mlp, vectors):

        rows = []

        def counting(candidates):
            rows.append(len(candidates))
            return candidates.indices.sum(axis=1) + 1.0

        asked = {}
        for trials in (4, 4 + self.TRIALS):
            rows.clear()
            quick(mlp, "flops <= 60%", vectors, trials=trials, optimizer="random", costs={"mine": counting})
            asked[trials] = sum(rows)
        assert asked[4 + self.TRIALS] - asked[4] == self.TRIALS

    def test_the_journal_holds_the_costs_and_the_statistics_of_the_trials_to_the_last_bit(self, mlp, vectors, tmp_path):

        result = quick(
            mlp, "flops <= 60%, params <= 80%", vectors, run_dir=tmp_path, early_stopping=True, trials=self.TRIALS
        )
        with Journal.open(tmp_path) as journal:
            for row, trial in zip(journal.trials(), result.trials, strict=True):
                assert (row.costs, row.evaluations) == (trial.costs, trial.evaluations)
                assert (row.status, row.reason) == (trial.status, trial.reason)
