"""Racing: what is dropped is dominated, what survives is what an unraced search would have seen."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import t

import autoprune
from autoprune import Racing
from autoprune.early_stopping.racing import Race, evaluate, log_evidence
from autoprune.execution import RayExecutor
from autoprune.journal.journal import Journal
from autoprune.optimizers.random import RandomSearch
from autoprune.pareto import Direction
from autoprune.protocols import OK, RACED, Failure, Measurement
from autoprune.result import SearchResult
from autoprune.result.trials import Trial
from autoprune.study.rivals import Rivals
from tests.labelled import BATCH, SAMPLES, make_data
from tests.resuming import Counting, rows, seen
from tests.resuming import search as search_any

search = partial(search_any, data=make_data(), optimizer="random", early_stopping=True)


def lead_by_t_test(differences, error):
    """Lower end of the mean difference over all N, by t tests at nine looks that share `error`; (s, c, N) to (s, c)."""
    total, best = differences.shape[-1], -np.inf
    for n in range(BATCH, total, BATCH):
        part = differences[..., :n]
        stderr = part.std(axis=-1, ddof=1) * ((1 - n / total) / n) ** 0.5
        best = np.maximum(best, part.mean(axis=-1) - t.ppf(1 - error / 9, n - 1) * stderr)
    return best


class TestTheTest:
    """The theorem on the capital of a bettor, on populations that are not normally distributed."""

    @staticmethod
    def populations(rng, searches, candidates):
        """Signals of rivals and of candidates that are no worse on all samples, in a random order; (s, c, N) each.

        A third are as good as their rival to the last digit, with losses that are rare and large: what is not seen yet
        makes the candidate look worse than it is. A third differ by noise, and the others not at all in most samples.
        """
        rival = rng.exponential(1.0, (searches, 1, SAMPLES)) ** 3 * np.ones((1, candidates, 1))
        kind = np.arange(candidates)[:, None] % 3
        rare = rng.random(rival.shape) < 0.02
        candidate = np.select(
            [kind == 0, kind == 1],
            [np.where(rare, 0.0, rival), rival * rng.lognormal(0.0, 0.5, rival.shape)],
            np.where(rare, rng.exponential(5.0, rival.shape), rival),
        )
        candidate *= rival.mean(axis=-1, keepdims=True) / candidate.mean(axis=-1, keepdims=True)
        order = rng.permuted(np.broadcast_to(np.arange(SAMPLES), rival.shape), axis=-1)
        return np.take_along_axis(rival, order, axis=-1), np.take_along_axis(candidate, order, axis=-1)

    @pytest.mark.slow
    def test_of_1000_searches_whose_candidates_are_all_as_good_at_most_delta_drop_any(self):
        """Nor is that because the case is easy: a t test with finite population correction fails in it."""
        delta, rng, wrong, wrong_t = 0.05, np.random.default_rng(0), 0, 0
        for _ in range(20):
            rivals, candidates = self.populations(rng, searches=50, candidates=9)
            highest = log_evidence(candidates[..., :-1], rivals, floor=0.0).max(axis=-1)
            wrong += int((highest >= -np.log(delta / 9)).any(axis=-1).sum())  # all of delta, on far fewer than usual
            wrong_t += int((lead_by_t_test(candidates - rivals, delta / 9) > 1e-12).any(axis=-1).sum())
        assert wrong <= 1000 * delta < 500 < wrong_t

    def test_a_candidate_that_is_clearly_worse_is_dropped_early(self):
        rng = np.random.default_rng(0)
        rivals = rng.exponential(1.0, (100, 1000))
        capital = log_evidence(rivals[:, :300] + rng.exponential(0.7, (100, 300)), rivals, floor=0.0)
        assert (capital.max(axis=-1) > -np.log(Racing().share(0))).mean() > 0.95

    @pytest.mark.slow
    @settings(max_examples=60, deadline=None)
    @given(
        arrays(np.float64, 24, elements=st.floats(0, 50)),
        arrays(np.float64, 24, elements=st.floats(0, 50)),
        st.randoms(use_true_random=False),
    )
    def test_the_capital_expected_of_one_more_sample_is_never_more_than_that_before(self, rival, candidate, random):
        # no worse, and not equal either: where rounding decides which of two sums is larger, so it does for the bet
        candidate *= min(1.0, (1 - 1e-9) * rival.sum() / max(candidate.sum(), 1e-9))
        order = np.array(random.sample(range(24), 24))
        n = random.randrange(1, 24)
        before = np.exp(log_evidence(candidate[order[:n]], rival[order], 0.0))[-1]
        after = []
        for place in range(n, 24):
            swapped = order.copy()
            swapped[[n, place]] = swapped[[place, n]]
            after.append(np.exp(log_evidence(candidate[swapped[: n + 1]], rival[swapped], 0.0))[-1])
        assert np.mean(after) <= before * (1 + 1e-6) + 1e-9

    def test_what_cannot_be_caught_up_with_is_known_for_certain(self):
        rival = np.array([1.0, 1.0, 0.1, 0.1])
        assert log_evidence(np.array([9.0, 9.0, 0.1]), rival, 0.0).max() > 100

    def test_all_trials_together_spend_no_more_than_delta(self):
        shares = [Racing(0.1).share(trial) for trial in range(20_000)]
        assert sum(shares) < 0.1
        assert shares == sorted(shares, reverse=True)
        assert sum(shares[:256]) == pytest.approx(0.05)


def make_race(rival, metric=None, **options):
    rival = np.asarray(rival, np.float32)
    metric = np.zeros_like(rival) if metric is None else metric
    defaults = {"direction": Direction(higher_is_better=True), "floor": 0.0, "distances": 0, "error": 0.01}
    return Race(7, rival, metric, **{**defaults, **options})


class Scores:
    """An evaluator of given signals in batches of ten."""

    def __init__(self, signal, metric=None, bad=None):
        self.signal, self.bad, self.batches = np.asarray(signal, np.float64), bad, 0
        self.metric = np.zeros_like(self.signal) if metric is None else metric

    def evaluate(self, candidates, chunk=None):
        rows = slice(None) if chunk is None else slice(10 * chunk.start, 10 * chunk.stop)
        self.batches += 1
        if self.bad == self.batches:
            return [Failure("no memory", 1.0)]
        return [Measurement(self.signal[rows], self.metric[rows], 1.0)]


class TestOneRace:
    candidate = np.array([1, 2])
    rng = np.random.default_rng(0)
    rival = rng.random(100)

    def test_it_ends_with_the_batch_that_decides_it(self):
        evaluator = Scores(self.rival + 1)
        outcome = evaluate(evaluator, self.candidate, make_race(self.rival))
        assert outcome.raced == f"dominated by trial 7 after {len(outcome.signal)} of 100 samples"
        assert len(outcome.signal) == 10 * evaluator.batches < 50
        np.testing.assert_array_equal(outcome.signal, evaluator.signal[: len(outcome.signal)])
        assert outcome.seconds == evaluator.batches

    def test_one_that_is_better_or_ahead_in_the_metric_or_below_the_floor_sees_all_samples(self):
        ahead = np.full(100, 0.5)
        for evaluator, race in (
            (Scores(self.rival - self.rival.min()), make_race(self.rival)),
            (Scores(self.rival + 1, ahead), make_race(self.rival)),
            (Scores(self.rival + 1, -ahead), make_race(self.rival, direction=Direction(higher_is_better=False))),
            (Scores(self.rival + 1), make_race(self.rival, floor=5.0)),
        ):
            outcome = evaluate(evaluator, self.candidate, race)
            assert (outcome.raced, len(outcome.signal)) == ("", 100)

    def test_a_failure_on_the_way_is_a_failure_of_the_candidate(self):
        outcome = evaluate(Scores(self.rival, bad=3), self.candidate, make_race(self.rival))
        assert outcome == Failure("no memory", 3.0)

    def test_without_a_race_all_is_evaluated_at_once(self):
        evaluator = Scores(self.rival)
        assert len(evaluate(evaluator, self.candidate).signal) == 100
        assert evaluator.batches == 1


class TestWhoIsTheRival:
    """Trials 0 to 3 were asked for before, trial 4 together with those that are to be scored."""

    costs = ((4.0, 4.0), (4.0, 4.0), (3.0, 9.0), (9.0, 3.0), (1.0, 1.0))
    signals = (0.3, 0.4, 0.1, 0.2, 0.0)

    def trial(self, number, costs, signal=math.nan, **settings):
        named = dict(zip(("flops", "params"), costs, strict=True))
        return Trial(number, (number, 1), {}, named, math.nan, (math.nan, math.nan), signal, **settings)

    def rivals(self, costs, **settings):
        found = [self.trial(i, *both) for i, both in enumerate(zip(self.costs, self.signals, strict=True))]
        found[0] = replace(found[0], **settings)
        problem = SimpleNamespace(cost_names=("flops", "params"), probes=lambda rows: np.zeros(len(rows), dtype=bool))
        judge = SimpleNamespace(direction=Direction(higher_is_better=True))
        values = np.ones(3, np.float32)
        study = SimpleNamespace(
            problem=problem,
            context=SimpleNamespace(judge=judge, subsets=SimpleNamespace(looks=())),
            racing=Racing(),
            dense=Measurement(values, values, 0.0),
        )
        journal = SimpleNamespace(first_of_ask=lambda number: 4, values=lambda number: (values, values))
        races = Rivals(study, journal).races([self.trial(5, costs)], found)
        return [race and race.rival for race in races]

    def test_it_costs_as_much_or_less_in_every_cost_and_is_the_best_of_these(self):
        assert self.rivals((4.0, 4.0)) == [0]
        assert self.rivals((4.0, 3.9)) == [None]
        assert self.rivals((9.0, 9.0)) == [2]

    def test_what_was_dropped_or_is_over_a_limit_is_nobodys_rival(self):
        assert self.rivals((4.0, 4.0), status=RACED) == [1]
        assert self.rivals((4.0, 4.0), feasible=False) == [1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same search with and without racing; random proposals do not depend on what was seen."""
    run_dir = tmp_path_factory.mktemp("raced")
    return search(None, early_stopping=False), search(run_dir), run_dir


@pytest.mark.slow
class TestASearch:
    def test_what_was_dropped_is_dominated_and_what_was_not_is_the_same_to_the_last_bit(self, pair):
        full, raced, _ = pair
        status = [trial.status for trial in raced.trials]
        assert set(status) == {OK, RACED}
        assert [trial.candidate for trial in full.trials] == [trial.candidate for trial in raced.trials]
        for whole, trial in zip(full.trials, raced.trials, strict=True):
            if trial.status == OK:
                assert replace(whole, evaluations=()) == replace(trial, evaluations=())
                assert whole.distortion == trial.distortion
            else:
                rival = full.trials[int(trial.reason.split()[3])]
                assert rival.signal < whole.signal
                assert rival.costs["flops"] <= trial.costs["flops"]
                assert trial.id not in {t.id for t in raced.front}
        assert {t.id for t in raced.front} == {t.id for t in full.front}

    def test_every_trial_says_how_many_samples_it_saw_and_the_notes_what_that_saved(self, pair):
        _, raced, _ = pair
        for trial in raced.trials:
            (evaluation,) = trial.evaluations
            assert (evaluation.samples == SAMPLES) == (trial.status == OK) == (evaluation.fidelity == "full")
            assert evaluation.samples % BATCH == 0
            assert trial.reason.endswith(f"after {evaluation.samples} of {SAMPLES} samples") == (trial.status == RACED)
        (note,) = (note for note in raced.notes if note.startswith("racing dropped"))
        dropped = sum(trial.status == RACED for trial in raced.trials)
        assert f"dropped {dropped} of 30 candidates" in note

    def test_the_estimate_of_one_that_was_dropped_is_near_its_score_on_all_samples(self, pair):
        full, raced, _ = pair
        for whole, trial in zip(full.trials, raced.trials, strict=True):
            (evaluation,) = trial.evaluations
            if trial.status == RACED:
                assert abs(trial.signal - whole.signal) < 5 * evaluation.signal_change_stderr
                assert evaluation.signal_stderr == evaluation.signal_change_stderr
                assert np.isnan(trial.interval).all()

    def test_the_journal_holds_what_was_seen_and_the_result_survives_saving(self, pair, tmp_path):
        _, raced, run_dir = pair
        with Journal.open(run_dir) as journal:
            for row, trial in zip(journal.trials(), raced.trials, strict=True):
                assert (row.status, row.reason) == (trial.status, trial.reason)
                assert [len(values) for values in journal.values(row.id)] == [trial.evaluations[0].samples] * 2
        raced.save(tmp_path, weights="none")
        assert [t.status for t in SearchResult.load(tmp_path).trials] == [t.status for t in raced.trials]

    def test_an_interrupted_search_ends_as_the_uninterrupted_one_does(self, pair, tmp_path):
        _, raced, _ = pair
        batches = 11 + sum(trial.evaluations[0].samples // BATCH - 1 for trial in raced.trials[:11])
        search(tmp_path, evaluator=Counting(batches + 3))  # within a race or a generation
        assert "pending" in {row.status for row in rows(tmp_path)}
        assert seen(search(tmp_path, True, evaluator=Counting())) == seen(raced)
        assert [len(row.evaluations) for row in rows(tmp_path)] == [1] * 30

    def test_a_journal_tells_the_optimizer_what_the_search_did(self, tmp_path):
        told = []

        class Listening:
            def __init__(self, problem, seed):
                self.random = RandomSearch(problem, seed)

            def ask(self, n):
                return self.random.ask(n)

            def tell(self, evaluations):
                told.append(evaluations)
                self.random.tell(evaluations)

        search(tmp_path, optimizer=Listening)
        first = {e.candidates.tobytes(): e for e in told}
        told.clear()
        search(tmp_path, True, optimizer=Listening)
        (history,) = told
        for i, candidate in enumerate(history.candidates):
            one = first[candidate.tobytes()]
            assert history.status[i] == one.status[0]
            np.testing.assert_array_equal(history.objectives[i], one.objectives[0])
            np.testing.assert_array_equal(history.stderr[i], one.stderr[0])
        assert set(history.status) == {OK, RACED}

    def test_probes_see_all_samples(self):
        result = search(None, optimizer="auto")
        assert RACED in {trial.status for trial in result.trials}
        for trial in result.trials:
            assert trial.status == OK or np.count_nonzero(trial.candidate) > 1


class TestWhereItCannotWork:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"budget": "accuracy drop <= 50pp"}, "a limit on the score needs full scores"),
            (
                {"metric": autoprune.Metric(lambda forward, batches: 0.5, True, per_sample=False, name="mAP")},
                "metric 'mAP' scores the whole set at once",
            ),
            ({"data": replace(make_data(), batch_size=512)}, "there is but one batch of validation samples"),
            (
                {"data": [tuple(part[i : i + 40] for part in make_data().validation) for i in range(0, 400, 40)]},
                "validation samples come in the order of a stream",
            ),
        ],
    )
    def test_the_search_goes_on_without_and_says_why(self, options, reason):
        result = search(None, trials=8, **options)
        assert RACED not in {trial.status for trial in result.trials}
        assert any(note.startswith(f"no racing: {reason}") for note in result.notes)

    def test_other_settings_are_refused_by_name(self):
        rule = r"early_stopping must be 'auto', True, False, an autoprune.Racing or autoprune.Rungs, got 0.05"
        with pytest.raises(ValueError, match=rule):
            search(None, early_stopping=0.05)
        with pytest.raises(ValueError, match=r"delta must be a probability between 0 and 1, got 1"):
            Racing(delta=1)


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
class TestOnRay:
    def test_synchronous_workers_race_as_a_local_search_does(self, pair):
        _, raced, _ = pair
        assert seen(search(None, execution=RayExecutor(workers=2, synchronous=True))) == seen(raced)

    def test_asynchronous_workers_drop_what_is_dominated(self, pair, tmp_path):
        full, _, _ = pair
        signal = {trial.candidate: trial.signal for trial in full.trials}
        result = search(tmp_path, execution=RayExecutor(workers=2))
        dropped = [trial for trial in result.trials if trial.status == RACED]
        assert dropped
        assert all(len(row.evaluations) == 1 for row in rows(tmp_path))
        for trial in dropped:
            rival = result.trials[int(trial.reason.split()[3])]
            assert rival.signal < signal.get(trial.candidate, np.inf)
            assert rival.costs["flops"] <= trial.costs["flops"]
