"""Interim looks: what is dropped is behind its rival, probes see a part, and what survives is scored as ever."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from autoprune.early_stopping.interim import ERRORS, FEWEST, Interrupted, looks_of
from autoprune.early_stopping.racing import evaluate
from autoprune.journal.journal import Journal
from autoprune.pareto import Direction
from autoprune.protocols import OK, RACED, Measurement
from tests.labelled import BATCH, SAMPLES, make_data
from tests.resuming import Counting, rows, seen
from tests.resuming import search as search_any

search = partial(search_any, data=make_data(), optimizer="auto")


@pytest.mark.parametrize(
    ("sizes", "looks"),
    [
        ([128] * 8, (2, 4)),
        ([100] * 4, (1, 2)),
        ([300, 10], (1,)),  # both looks fall on the end of the first batch
        ([400], ()),
        ([BATCH] * 5, ()),  # a quarter of them says too little
    ],
)
def test_looks_come_after_a_quarter_and_a_half_of_enough_samples(sizes, looks):
    assert looks_of(sizes) == looks
    assert all(sum(sizes[:look]) >= FEWEST for look in looks)


class Scored:
    """An evaluator with given values for each sample, in batches of 10."""

    def __init__(self, signal, metric, distortion):
        self.values = signal, metric, distortion

    def evaluate(self, candidates, chunk=None):
        part = slice(10 * chunk.start, 10 * chunk.stop)
        signal, metric, distortion = (values[part] for values in self.values)
        return [Measurement(signal, metric, 1.0, distortion)]


def run(signal, metric=None, rival=0, distances=100):
    zeros = np.zeros(100)
    metric = zeros if metric is None else metric
    direction = Direction(higher_is_better=True)
    known = zeros.astype(np.float32)
    contest = Interrupted((3, 5, 10), 100, distances, direction, ERRORS, rival, known, known)
    return evaluate(Scored(signal, metric, np.arange(100.0)[:distances]), np.zeros(2, dtype=np.int64), contest)


class TestOneCandidate:
    noise = np.random.default_rng(0).normal(size=100)

    def test_that_is_clearly_worse_is_dropped_at_the_first_look(self):
        outcome = run(1.0 + 0.1 * self.noise)
        assert (outcome.raced, len(outcome.signal)) == ("behind trial 0 after 30 of 100 samples", 30)

    def test_that_falls_behind_later_is_dropped_at_the_second(self):
        outcome = run(np.where(np.arange(100) < 30, 0.0, 1.0) + 0.1 * self.noise)
        assert len(outcome.signal) == 50

    def test_that_is_as_good_is_scored_on_all_samples(self):
        outcome = run(self.noise - self.noise[:30].mean() - self.noise[:50].mean())
        assert (outcome.raced, len(outcome.signal), len(outcome.distortion)) == ("", 100, 100)

    def test_that_is_ahead_in_the_metric_goes_on(self):
        assert not run(1.0 + 0.1 * self.noise, metric=np.full(100, 0.1)).raced

    def test_that_is_a_probe_ends_at_the_first_look_with_its_distortion(self):
        outcome = run(self.noise, rival=-1)
        assert outcome.raced == "probe of one dimension, after 30 of 100 samples"
        np.testing.assert_array_equal(outcome.distortion, np.arange(30.0))
        assert len(run(self.noise, rival=-1, distances=20).distortion) == 20

    def test_of_those_as_good_as_their_rivals_about_one_in_twenty_is_dropped(self):
        rng = np.random.default_rng(0)
        values = rng.normal(size=(1000, 100))
        values -= values.mean(axis=1, keepdims=True)
        assert np.mean([bool(run(row).raced) for row in values]) < 0.06


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("looked")
    return search(run_dir, trials=40), run_dir


class TestASearch:
    def test_the_front_is_scored_on_all_samples_as_without_looks(self, found):
        result, _ = found
        whole = search(None, trials=40, early_stopping=False)
        known = {trial.candidate: trial for trial in whole.trials}
        assert {trial.status for trial in whole.trials} == {OK}
        for trial in result.front:
            assert (trial.status, trial.evaluations[-1].samples) == (OK, SAMPLES)
        both = [trial for trial in result.trials if trial.status == OK and trial.candidate in known]
        assert both
        for trial in both:
            other = known[trial.candidate]
            assert (trial.score, trial.signal, trial.distortion) == (other.score, other.signal, other.distortion)

    def test_probes_over_a_limit_see_the_first_quarter_and_teach_what_a_dimension_costs(self, found):
        result, _ = found
        probes = [trial for trial in result.trials if not trial.feasible]
        assert probes
        for trial in probes:
            (one,) = trial.evaluations
            assert (trial.status, one.samples, one.fidelity) == (RACED, SAMPLES // 4 // BATCH * BATCH + BATCH, "part")
            assert np.isfinite(one.distortion)
        (note,) = (note for note in result.notes if "scored on a part" in note)
        behind = sum(trial.status == RACED and trial.feasible for trial in result.trials)
        assert f"2 standard errors behind one that costs no more: {behind} of 40 candidates" in note
        assert f" {len(probes)} probes" in note

    def test_what_was_dropped_is_behind_a_cheaper_one_and_never_on_the_front(self, found):
        result, _ = found
        for trial in result.trials:
            if trial.status == RACED and trial.feasible:
                rival = result.trials[int(trial.reason.split()[2])]
                assert rival.signal < trial.signal
                assert rival.costs["flops"] <= trial.costs["flops"]
                assert trial.id not in {one.id for one in result.front}

    def test_one_that_was_interrupted_ends_as_another(self, found, tmp_path):
        result, _ = found
        search(tmp_path, trials=40, evaluator=Counting(45))
        assert "pending" in {row.status for row in rows(tmp_path)}
        assert seen(search(tmp_path, True, trials=40, evaluator=Counting())) == seen(result)

    def test_the_journal_holds_the_samples_that_were_seen(self, found):
        result, run_dir = found
        with Journal.open(run_dir) as journal:
            for trial in result.trials:
                assert [len(values) for values in journal.values(trial.id)] == [trial.evaluations[-1].samples] * 2

    @pytest.mark.parametrize(
        "options", [{"budget": "accuracy drop <= 50pp"}, {"data": replace(make_data(), validation_samples=200)}]
    )
    def test_there_are_no_looks_where_scores_must_be_whole_or_samples_are_few(self, options):
        result = search(None, trials=8, **options)
        assert {trial.status for trial in result.trials} == {OK}
