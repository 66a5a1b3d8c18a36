"""Rungs: trainings that are behind are stopped, and the others end as they do without rungs."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

import autoprune
from autoprune import Rungs
from autoprune.early_stopping.successive_halving import Ladder, Rung, behind, climb
from autoprune.evaluators import AdaptiveBN, FineTune
from autoprune.evaluators.training.course import Course
from autoprune.execution import RayExecutor
from autoprune.execution.local import evaluate_one
from autoprune.journal.journal import Journal
from autoprune.protocols import OK, RACED, Failure, Measurement
from autoprune.result import Evaluation, SearchResult, Trial
from autoprune.study.promotion import Promotion, note_of_rungs
from tests.contexts import halved, prepared, study_of
from tests.labelled import make_data
from tests.resuming import rows, seen
from tests.resuming import search as search_any
from tests.user_functions import shrink

STEPS = (1, 3, 9)


class Watched(FineTune):
    """Counts training steps until the first candidate is tested, and raises in the middle of the search if asked to."""

    def __init__(self, most=10**9, **settings):
        super().__init__(**{"steps": STEPS[-1], "start": AdaptiveBN(), "lr": 0.01, **settings})
        self.most, self.scored, self.before_tests = most, 0, None

    def on_the_way(self, candidate, steps):
        self.scored += 1
        if self.scored > self.most:
            raise KeyboardInterrupt
        return super().on_the_way(candidate, steps)

    def test(self, candidate):
        if self.before_tests is None:
            self.before_tests = Steps.taken
        return super().test(candidate)


class Steps:
    """Training steps that any candidate took."""

    taken = 0


@pytest.fixture(autouse=True, scope="module")
def _counted():
    whole = Course._step

    def step(self, loss_of):
        Steps.taken += 1
        whole(self, loss_of)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Course, "_step", step)
        yield


def search(run_dir, *arguments, **options):
    options = {"optimizer": "random", "early_stopping": Rungs(), "evaluator": Watched(), **options}
    return search_any(run_dir, *arguments, data=make_data(), **options)


class TestSteps:
    def test_each_rung_is_shorter_than_the_next_and_the_last_is_the_whole_training(self):
        assert Rungs().steps(900) == (100, 300, 900)
        assert Rungs(count=4, reduction=2).steps(50) == (6, 12, 25, 50)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Rungs(count=1), r"count must be an integer of at least 2, got 1"),
            (lambda: Rungs(reduction=1), r"reduction must be a number above 1, got 1"),
            (lambda: Rungs().steps(3), r"3 rungs must differ in steps, got \(0, 1, 3\)"),
        ],
    )
    def test_what_makes_no_rungs_is_refused(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


class TestWhoIsBehind:
    @pytest.mark.slow
    @settings(max_examples=100, deadline=None)
    @given(
        arrays(np.float64, st.tuples(st.integers(1, 25), st.just(2)), elements=st.integers(0, 6).map(float)),
        st.sampled_from([1.5, 2, 3, 5]),
    )
    def test_whoever_is_past_the_share_when_points_are_ranked_by_how_long_a_chain_dominates_them(
        self, points, reduction
    ):
        better = (points[:, None] <= points).all(axis=-1) & (points[:, None] < points).any(axis=-1)
        depth = np.ones(len(points))
        for _ in points:
            depth = 1 + np.where(better, depth[:, None], 0).max(axis=0)
        share = (len(points) + 1) / reduction
        expected = [(depth <= own).sum() >= share for own in depth]
        np.testing.assert_array_equal(behind(points, reduction), expected)


def trial(number, candidate, costs, evaluations=()):
    named = dict(zip(("flops", "params"), costs, strict=True))
    return Trial(number, candidate, {}, named, math.nan, (math.nan, math.nan), math.nan, evaluations=evaluations)


def test_a_rival_costs_as_much_or_less_in_every_cost_and_the_best_of_these_sets_the_bar():
    """Each trial is a front of its own at first: the best third, with the one to come, has room for trial 0 alone."""
    costs = {(0, 0): (4.0, 4.0), (1, 0): (4.0, 4.0), (2, 0): (4.0, 4.0), (3, 0): (4.0, 5.0), (4, 0): (5.0, 5.0)}
    signals = [0.1, 0.2, 0.3, 0.4, 0.5]
    found = [
        trial(i, candidate, cost, (Evaluation(signal=signal, steps=3),))
        for i, ((candidate, cost), signal) in enumerate(zip(costs.items(), signals, strict=True))
    ]
    problem = SimpleNamespace(cost_names=("flops", "params"), probes=lambda candidates: candidates[:, 1] == 1)
    promotion = Promotion(SimpleNamespace(evaluator=Marks(), problem=problem), Rungs())
    ask = partial(promotion.ladders, found=found)
    assert ask([trial(5, (1, 0), (4.0, 4.0)), trial(6, (9, 0), (4.0, 5.0)), trial(7, (9, 1), (4.0, 5.0))]) == [
        Ladder((Rung(1), Rung(3, 0.2, 1)), 9),
        Ladder((Rung(1), Rung(3, 0.2, 1)), 9),
        Ladder((Rung(1), Rung(3)), 9),
    ]
    del found[0], found[0]
    found[0] = replace(found[0], costs={"flops": 4.0, "params": 6.0})
    (ladder,) = ask([trial(6, (9, 0), (4.0, 5.0))])
    assert ladder.rungs[1] == Rung(3, 0.4, 3)


class Marks:
    """An evaluator whose scores at rungs are given, and fail where NaN."""

    steps, continues = 9, True

    def __init__(self, *signals):
        self.signals, self.asked = list(signals), []

    def on_the_way(self, candidate, steps):
        self.asked.append(steps)
        signal = self.signals.pop(0)
        return Failure("no memory", 1.0) if np.isnan(signal) else Measurement(np.full(4, signal), np.ones(4), 1.0)

    def evaluate(self, candidates):
        return [self.on_the_way(candidates[0], self.steps)]


class TestOneLadder:
    ladder = Ladder((Rung(1, 0.5, 3), Rung(3, 0.4, 7)), 9)
    climb = partial(climb, candidate=np.array([1, 2]), ladder=ladder)

    def test_it_ends_at_the_rung_that_is_not_reached(self):
        evaluator = Marks(0.5, 0.41)
        outcome = self.climb(evaluator)
        assert outcome.raced == "behind trial 7 after 3 of 9 steps"
        assert (outcome.steps, [rung.steps for rung in outcome.rungs], evaluator.asked) == (3, [1], [1, 3])

    def test_who_is_as_good_as_the_bars_gets_to_the_end(self):
        outcome = self.climb(Marks(0.5, 0.4, 0.9))
        assert (outcome.raced, outcome.steps, [rung.steps for rung in outcome.rungs]) == ("", 0, [1, 3])
        assert outcome.signal.mean() == 0.9

    @pytest.mark.parametrize("signals", [(np.nan,), (0.1, np.nan), (0.1, 0.1, np.nan)])
    def test_a_failure_on_the_way_is_a_failure_of_the_candidate(self, signals):
        assert self.climb(Marks(*signals)) == Failure("no memory", float(len(signals)))

    def test_a_score_on_the_way_that_is_no_number_is_a_failure_too(self):
        outcome = evaluate_one(Marks(np.inf, 0.1, 0.1), np.array([1, 2]), Ladder((Rung(1), Rung(3)), 9))
        assert outcome == Failure("the score of a sample is NaN or infinite", outcome.seconds)


class Noisy(nn.Module):
    """A network whose training draws random numbers, and depends on its statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10)
        )

    def train(self, mode=True):
        super().train(mode)
        self.layers[1].eval()
        return self

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def context():
    return study_of(Noisy(), make_data(), evaluator="adaptive_bn").context


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("signal", "metric", "distortion"))


class TestATraining:
    @pytest.mark.slow
    @pytest.mark.parametrize("options", [{}, {"train_fn": shrink}])
    def test_ends_the_same_to_the_last_bit_whether_or_not_it_was_scored_on_the_way(self, context, options):
        candidate, other = halved(context), np.ones_like(halved(context))
        looked, straight = (prepared(FineTune(steps=12, **options), context) for _ in range(2))
        on_the_way = [looked.on_the_way(candidate, steps) for steps in (1, 5, 5)]
        (whole,), (expected,) = looked.evaluate(candidate[None]), straight.evaluate(candidate[None])
        assert same(whole, expected)
        assert same(on_the_way[1], on_the_way[2])
        assert not same(on_the_way[0], on_the_way[1])
        looked.on_the_way(candidate, 5)
        looked.on_the_way(other, 5)  # takes the place of the training that could have been gone on with
        assert same(looked.evaluate(candidate[None])[0], expected)
        for name, tensor in looked.build(candidate).state_dict().items():
            assert torch.equal(tensor, straight.build(candidate).state_dict()[name]), name

    @pytest.mark.slow
    def test_goes_on_without_repeating_a_step(self, context):
        evaluator, before = prepared(FineTune(steps=12), context), Steps.taken
        for steps in (4, 8):
            evaluator.on_the_way(halved(context), steps)
        evaluator.evaluate(halved(context)[None])
        assert Steps.taken - before == 12

    @pytest.mark.slow
    def test_that_fails_on_the_way_is_begun_anew(self, context, monkeypatch):
        evaluator = prepared(FineTune(steps=4), context)
        (expected,) = prepared(FineTune(steps=4), context).evaluate(halved(context)[None])
        evaluator.on_the_way(halved(context), 1)
        with monkeypatch.context() as patch:
            patch.setattr(Course, "_step", lambda self, loss_of: 1 / 0)
            assert isinstance(evaluator.on_the_way(halved(context), 2), Failure)
        assert same(evaluator.evaluate(halved(context)[None])[0], expected)

    def test_the_users_recipe_is_given_the_steps_of_each_rung_from_the_start(self, context):
        given = []
        evaluator = prepared(FineTune(steps=9, train_fn=lambda model, steps: given.append(steps)), context)
        evaluator.on_the_way(halved(context), 3)
        evaluator.evaluate(halved(context)[None])
        assert (given, evaluator.continues) == ([3, 9], False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same search without and with rungs; random proposals do not depend on what was seen."""
    run_dir, watched, before = tmp_path_factory.mktemp("rungs"), Watched(), Steps.taken
    with_rungs = search(run_dir, evaluator=watched)
    return search(None, early_stopping=False), with_rungs, run_dir, watched.before_tests - before


def reached(trial):
    """Steps after which a trial was scored."""
    return [one.steps or STEPS[-1] for one in trial.evaluations]


@pytest.mark.slow
class TestASearch:
    def test_survivors_score_as_without_rungs_to_the_last_bit_and_nothing_stopped_is_on_the_front(self, pair):
        full, result, _, _ = pair
        assert {trial.status for trial in result.trials} == {OK, RACED}
        assert [trial.candidate for trial in full.trials] == [trial.candidate for trial in result.trials]
        for whole, trial in zip(full.trials, result.trials, strict=True):
            if trial.status == OK:
                assert replace(whole, evaluations=()) == replace(trial, evaluations=())
                assert whole.distortion == trial.distortion
        assert all(trial.status == OK for trial in result.front)

    def test_who_was_stopped_was_behind_a_trial_that_costs_no_more_and_was_asked_for_before(self, pair):
        _, result, run_dir, _ = pair
        asks = {row.id: row.ask for row in rows(run_dir)}
        for trial in result.trials:
            rungs = reached(trial)
            assert rungs == list(STEPS[: len(rungs)])
            assert all(one.samples == 400 for one in trial.evaluations)
            if trial.status == RACED:
                rival = result.trials[int(trial.reason.split()[2])]
                assert trial.reason == f"behind trial {rival.id} after {rungs[-1]} of {STEPS[-1]} steps"
                assert rival.evaluations[len(rungs) - 1].signal < trial.evaluations[-1].signal == trial.signal
                assert rival.costs["flops"] <= trial.costs["flops"]
                assert asks[rival.id] < asks[trial.id]

    def test_a_training_is_stopped_where_one_that_costs_no_more_and_is_behind_itself_was_better_and_nowhere_else(
        self, pair
    ):
        _, result, run_dir, _ = pair
        asks = np.array([row.ask for row in rows(run_dir)])
        for i, steps in enumerate(STEPS[:2]):
            there = [trial for trial in result.trials if len(trial.evaluations) > i]
            points = np.array([(trial.evaluations[i].signal, trial.costs["flops"]) for trial in there])
            for trial, (signal, cost) in zip(there, points, strict=True):
                known = points[[asks[other.id] < asks[trial.id] for other in there]]
                rivals = known[behind(known, 3)] if len(known) else known
                stopped = trial.status == RACED and reached(trial)[-1] == steps
                assert stopped == any((rivals[:, 0] < signal) & (rivals[:, 1] <= cost))

    def test_the_notes_tell_the_share_of_steps_that_were_taken(self, pair):
        _, result, _, taken = pair
        (note,) = (note for note in result.notes if note.startswith("rungs stopped"))
        assert f"; {taken / (30 * STEPS[-1]):.0%} of the training steps were taken" in note
        at = [sum(t.status == RACED and reached(t)[-1] == steps for t in result.trials) for steps in STEPS[:2]]
        assert f"rungs stopped {sum(at)} of 30 trainings early ({at[0]} after 1, {at[1]} after 3 of 9 steps)" in note
        assert 0.1 < taken / (30 * STEPS[-1]) < 0.9

    def test_the_notes_count_what_was_stopped_at_rungs_of_an_earlier_run_as_it_was(self):
        def trial(*steps):
            evaluations = tuple(Evaluation(steps=at) for at in steps)
            return SimpleNamespace(status=RACED if steps[-1] else OK, evaluations=evaluations)

        found = [trial(2), trial(1, 3), trial(1, 3, 0)]
        (note,) = note_of_rungs(Rungs(), SimpleNamespace(evaluator=Marks()), found)
        assert note.startswith("rungs stopped 1 of 3 trainings early (0 after 1, 1 after 3 of 9 steps); 52% of")

    def test_the_journal_holds_every_rung_and_the_result_survives_saving(self, pair, tmp_path):
        _, result, run_dir, _ = pair
        for row, trial in zip(rows(run_dir), result.trials, strict=True):
            assert (row.status, row.reason) == (trial.status, trial.reason)
            assert [(e.fidelity, e.signal) for e in row.evaluations] == [
                (e.fidelity, e.signal) for e in trial.evaluations
            ]
            assert all(b.started >= a.started for a, b in zip(row.rows, row.rows[1:], strict=False))
        with Journal.open(run_dir) as journal:
            assert len(journal.values(0)[0]) == 400
        result.save(tmp_path, weights="none")
        assert SearchResult.load(tmp_path).trials == result.trials

    @pytest.mark.parametrize("most", [1, 34])  # before the first rung is set, and within a later ladder
    def test_an_interrupted_search_ends_as_the_uninterrupted_one_does(self, pair, tmp_path, most):
        _, result, _, _ = pair
        assert search(tmp_path, evaluator=Watched(most)).stopped == "interrupted"
        resumed = search(tmp_path, True)
        assert seen(resumed) == seen(result)
        assert [reached(trial) for trial in resumed.trials] == [reached(trial) for trial in result.trials]

    def test_probes_are_trained_to_the_end(self):
        result = search(None, optimizer="auto")
        assert RACED in {trial.status for trial in result.trials}
        for trial in result.trials:
            assert trial.status == OK or np.count_nonzero(trial.candidate) > 1

    def test_with_a_recipe_of_the_users_every_rung_is_a_training_of_its_own(self):
        given = []

        def train(model, steps):
            given.append(steps)
            shrink(model, steps)

        class Trained(Watched):
            def test(self, candidate):
                if not given or given[-1] is not None:
                    given.append(None)
                return super().test(candidate)

        result = search(None, evaluator=Trained(train_fn=train), trials=12)
        (note,) = (note for note in result.notes if note.startswith("rungs stopped"))
        assert f"{sum(given[: given.index(None)]) / (12 * STEPS[-1]):.0%} of the training steps" in note


class TestWhereItCannotWork:
    @pytest.mark.slow
    def test_without_trainings_it_is_refused(self):
        with pytest.raises(ValueError, match=r"needs an evaluator that trains each candidate.*got AdaptiveBN"):
            search(None, evaluator="adaptive_bn")
        with pytest.raises(ValueError, match=r"3 rungs must differ in steps, got \(0, 1, 2\)"):
            search(None, evaluator=Watched(steps=2))

    @pytest.mark.slow
    def test_under_a_limit_on_the_score_the_search_goes_on_without_and_says_why(self):
        result = search(None, budget="accuracy drop <= 50pp", trials=8)
        assert RACED not in {trial.status for trial in result.trials}
        assert any(note.startswith("no racing: a limit on the score needs full scores") for note in result.notes)

    @pytest.mark.slow
    def test_a_metric_of_the_whole_set_is_no_hindrance(self):
        metric = autoprune.Metric(lambda forward, batches: 0.5, True, per_sample=False, name="mAP")
        result = search(None, metric=metric, trials=10)
        assert any(note.startswith("rungs stopped") for note in result.notes)


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_synchronous_workers_on_ray_stop_whom_a_local_search_does(pair):
    _, result, _, _ = pair
    remote = search(None, execution=RayExecutor(workers=2, synchronous=True))
    assert seen(remote) == seen(result)
    assert [reached(trial) for trial in remote.trials] == [reached(trial) for trial in result.trials]
