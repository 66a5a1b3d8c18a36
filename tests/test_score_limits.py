"""Searches for the cheapest model that keeps the score, and searches that stop by themselves."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune import Channels, Metric, Sparsity
from autoprune.budget import Budget, ScoreLimit
from autoprune.errors import BudgetError, InfeasibleBudgetError
from autoprune.journal.journal import Journal
from autoprune.metrics.judge import Judge
from autoprune.optimizers import OPTIMIZERS, RandomSearch, uniform_seeds
from autoprune.optimizers.auto import Auto
from autoprune.pareto import Direction
from autoprune.protocols import FAILED, RACED, Measurement
from autoprune.result import Evaluation, SearchResult, Trial
from autoprune.result.held_out import note_of_held_out
from autoprune.study.convergence import MOST_TRIALS, planned, why_converged
from autoprune.testing.contracts import OptimizerContract
from autoprune.testing.problems import additive_problem, product_problem
from tests.oracle import count_macs
from tests.searching import grouped
from zoo import ZOO


def search(model, budget, data, trials=40, **options):
    return autoprune.search(model, budget, data, trials=trials, **grouped(**options))


@pytest.fixture(scope="module")
def kept(digits_model, data, tmp_path_factory):
    """A search for the cheapest network that loses at most two points, and its journal."""
    run_dir = tmp_path_factory.mktemp("run")
    return search(digits_model, "accuracy drop <= 2pp", data, trials=64, run_dir=str(run_dir)), run_dir


@pytest.fixture(scope="module")
def vectors():
    x = torch.randn(240, 64, generator=torch.Generator().manual_seed(0))
    return x, ZOO["mlp"].build()(x).argmax(1)


@pytest.mark.slow
class TestTheCheapestThatKeepsTheScore:
    def test_it_is_the_best_and_what_is_built(self, kept, digits):
        result, _ = kept
        meeting = [t for t in result.trials if t.score >= result.dense.score - 0.02 - 1e-9]
        assert 3 < len(meeting) < len(result.trials)
        assert result.best().costs["flops"] == min(trial.costs["flops"] for trial in meeting)
        assert result.best() in meeting
        assert count_macs(result.build(), (digits.validation[0][:1],)) == result.best().costs["flops"]
        assert result.best(result.budget) is result.best()
        assert result.best() in result.front

    def test_it_is_much_cheaper_than_the_dense_model_and_than_uniform_pruning(self, kept):
        result, _ = kept
        uniform = [t for t in result.trials[:6] if result.worst_score <= t.score]
        assert result.best().costs["flops"] < 0.8 * result.dense.costs["flops"]
        assert result.best().costs["flops"] < min(trial.costs["flops"] for trial in uniform)

    def test_no_cost_is_limited(self, kept):
        result, _ = kept
        assert result.limits == {"flops": result.dense.costs["flops"]}
        assert all(trial.feasible for trial in result.trials)

    def test_the_table_and_the_picture_show_the_limit(self, kept):
        result, _ = kept
        rows = [line.split() for line in str(result).split("\n\n")[0].splitlines()]
        assert {row[-1] for row in rows if row[0].isdigit()} == {"met", "missed"}
        assert rows[-1][0] == "dense"
        assert rows[-1][-1] == "met"
        assert max(map(len, str(result).splitlines())) <= 100
        labels = result.plot().get_legend_handles_labels()[1]
        assert "score limit" in labels
        assert not any(label.startswith("limit") for label in labels)

    def test_a_note_says_whether_the_limit_holds_on_held_out_data(self, kept):
        result, _ = kept
        best, (note,) = result.best(), [note for note in result.notes if "is the cheapest with" in note]
        assert f"trial {best.id} is the cheapest with accuracy drop <= 0.02" in note
        assert f"{100 * (best.score - result.dense.score):+.2f}pp (95 % interval" in note
        drop = best.test_score - result.dense.test_score
        assert f"{100 * drop:+.2f}pp" in note
        assert ("holds there too" in note) == (drop >= -0.02 - 1e-9)

    def test_the_journal_gives_the_same_choice(self, kept):
        result, run_dir = kept
        read = SearchResult.from_journal(run_dir)
        assert read.best().id == result.best().id
        assert read.worst_score == result.worst_score
        assert "met" in str(read)

    def test_a_saved_result_gives_the_same_choice_and_keeps_its_weights(self, kept, digits, digits_model, tmp_path):
        result, _ = kept
        loaded = autoprune.SearchResult.load(result.save(tmp_path / "result", weights="best"), digits_model)
        images = digits.test[0][:8]
        assert loaded.best() == result.best()
        assert torch.equal(loaded.build()(images), result.build()(images))


class TestOtherLimits:
    @pytest.mark.slow
    def test_limits_on_cost_and_score_are_mixed(self, digits_model, data):
        result = search(digits_model, "accuracy drop <= 4pp, params <= 60%", data)
        meeting = [t for t in result.trials if t.feasible and t.score >= result.dense.score - 0.04 - 1e-9]
        assert list(result.limits) == ["params"]
        assert all(t.costs["params"] <= 0.6 * result.dense.costs["params"] for t in result.trials if t.feasible)
        assert result.best().costs["params"] == min(trial.costs["params"] for trial in meeting)
        assert "looking for the least params under" in " ".join(result.notes)

    @pytest.mark.slow
    def test_several_limits_on_the_score_hold_together(self, mlp, vectors):
        result = search(mlp, "accuracy >= 0.5, accuracy drop <= 30pp", vectors, trials=24)
        assert result.worst_score == pytest.approx(max(0.5, result.dense.score - 0.3), abs=1e-6)
        assert result.best().score >= result.worst_score

    @pytest.mark.slow
    @pytest.mark.parametrize("budget", ["cross_entropy drop <= 0.3", "loss drop <= 0.3", "loss <= {}"])
    def test_a_loss_may_rise_by_its_drop_or_up_to_a_limit(self, mlp, vectors, budget):
        dense = nn.functional.cross_entropy(mlp(vectors[0]), vectors[1]).item()
        result = search(mlp, budget.format(dense + 0.3), vectors, trials=24, metric="cross_entropy")
        highest = dense + 0.3 if "{}" in budget else result.dense.score + 0.3
        meeting = [trial for trial in result.trials if trial.score <= highest]
        assert not result.higher_is_better
        assert 0 < len(meeting) < len(result.trials)
        assert result.best().costs["flops"] == min(trial.costs["flops"] for trial in meeting)

    @pytest.mark.slow
    def test_where_flops_cannot_change_the_elements_kept_are_minimised(self, mlp, vectors):
        result = search(mlp, "accuracy drop <= 65pp", vectors, trials=24, space=Sparsity())
        assert list(result.limits) == ["nonzero_params"]
        assert result.best().costs["nonzero_params"] < 0.9 * result.dense.costs["nonzero_params"]

    @pytest.mark.slow
    def test_when_no_trial_meets_the_limit_the_nearest_is_named_and_the_rest_is_kept(self, mlp, vectors, tmp_path):
        result = search(mlp, "accuracy drop <= 0, flops <= 20%", vectors, trials=8)
        best = max((trial for trial in result.trials if trial.feasible), key=lambda trial: trial.score)
        pattern = rf"met by none of .* nearest is trial {best.id} with flops .*, accuracy {best.score:.4f}"
        with pytest.raises(InfeasibleBudgetError, match=pattern):
            result.best()
        assert any("met by none of" in note for note in result.notes)
        result.save(tmp_path / "result")

    @pytest.mark.slow
    def test_a_metric_of_the_whole_set_is_limited_without_an_interval(self, mlp, vectors):
        def share(forward, batches):
            return sum((forward(b).argmax(1) == b[1]).sum() for b in batches) / sum(len(b[1]) for b in batches)

        result = search(mlp, "share drop <= 0.05", vectors, trials=16, metric=Metric(share, True, per_sample=False))
        (note,) = (note for note in result.notes if "is the cheapest with" in note)
        assert "interval" not in note
        assert result.best().score >= result.dense.score - 0.05


class TestMistakes:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("budget", "message"),
        [
            ("f1 drop <= 1pp", r"budget limits 'f1', but candidates are scored by 'accuracy'"),
            ("loss <= 0.3", r"budget must limit one of .*got 'loss'"),
            ("accuracy >= 1.01", r"asks for more than the dense model has, whose accuracy is \d\.\d{4}"),
            ("accuracy <= 0.9", r"cannot limit the metric 'accuracy'; write for example 'accuracy >= 0.9'"),
            ("flops drop <= 1", r"flops is a cost and takes an upper limit"),
        ],
    )
    def test_a_limit_that_makes_no_sense_is_refused_before_any_trial(self, mlp, vectors, tmp_path, budget, message):
        with pytest.raises(BudgetError, match=message):
            search(mlp, budget, vectors, run_dir=str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    def test_a_lower_limit_on_a_loss_is_refused(self, mlp, vectors):
        with pytest.raises(BudgetError, match=r"lower is better for 'loss', so it takes an upper limit"):
            search(mlp, "loss >= 0.3", vectors, metric="loss")

    LOSS = Direction(higher_is_better=False)

    def test_an_upper_limit_on_a_loss_reads_back_from_its_text(self):
        budget = Budget.parse("loss <= 0.3 and flops <= 50%").judged_by("loss", self.LOSS, {"flops": 1.0})
        assert budget.score_limits == (ScoreLimit("loss", 0.3, drop=False, at_most=True),)
        assert Budget.parse(str(budget)).judged_by("loss", self.LOSS, {"flops": 1.0}) == budget


class TestTheNoteOnHeldOutData:
    def measure(self, wrong, n=400):
        return Measurement(np.zeros(n), (np.arange(n) >= wrong).astype(float), 0.0)

    def note(self, wrong, limit="accuracy drop <= 2pp", n=400):
        judge = Judge("accuracy", True, "", proportion=True)
        dense = Trial(-1, (0,), {}, {}, 1.0, (0.99, 1.0), 0.0)
        evaluation = Evaluation(n, metric=0.985, metric_change_stderr=0.006)
        trial = Trial(3, (1,), {}, {}, 0.985, (0.97, 0.99), 0.0, evaluations=(evaluation,))
        (limit,) = Budget.parse(limit).score_limits
        return note_of_held_out(limit, judge, trial, dense, self.measure(wrong, n), self.measure(0, n))

    @pytest.mark.parametrize(
        ("wrong", "verdict"),
        [
            (0, "; it holds there too"),
            (8, "; it holds there too, but not for sure"),
            (10, "; it is missed there, perhaps by chance; the cheapest of many"),
            (60, "; it does not hold there; the cheapest of many"),
        ],
    )
    def test_it_says_how_sure_it_is(self, wrong, verdict):
        note = self.note(wrong)
        assert verdict in note
        assert note.endswith(verdict) == (wrong <= 8)
        assert f"{-wrong / 4:+.2f}pp (95 % interval" in note

    def test_an_absolute_limit_is_compared_with_the_score_itself(self):
        assert "0.8500 (95 % interval 0.81" in self.note(60, "accuracy >= 0.98")
        assert "it does not hold there" in self.note(60, "accuracy >= 0.98")

    def test_the_interval_covers_the_truth_as_often_as_it_says_also_where_few_samples_differ(self):
        import re

        rng, covered, runs = np.random.default_rng(0), 0, 400
        judge, dense = Judge("accuracy", True, "", proportion=True), Trial(-1, (0,), {}, {}, 1.0, (1, 1), 0.0)
        trial = Trial(3, (1,), {}, {}, 1.0, (1, 1), 0.0, evaluations=(Evaluation(9, metric=1.0),))
        (limit,) = Budget.parse("accuracy drop <= 1pp").score_limits
        for _ in range(runs):
            change = rng.choice([-1, 0, 1], p=[0.012, 0.984, 0.004], size=300)
            measured = (Measurement(np.zeros(300), v.astype(float), 0.0) for v in (change == 1, change == -1))
            text = note_of_held_out(limit, judge, trial, dense, *measured).split("on validation,")[1]
            low, high = map(float, re.search(r"interval (\S+)pp to (\S+)pp", text).groups())
            covered += low <= -0.8 <= high
        assert 0.92 < covered / runs <= 1.0


class Limited:
    """A known problem whose candidates are acceptable up to a loss."""

    def __init__(self, known, worst):
        self.known, self.worst = known, worst
        least = (1 + 1e-9) * known.problem.costs(known.problem.cheapest[None])[0]
        wanted = np.stack([least, known.problem.budget_range[:, 1]], axis=1)
        self.problem = known.problem.aimed(wanted)
        self.feasible_candidates = known.feasible_candidates

    def evaluate(self, candidates, *args, **options):
        evaluations = self.known.evaluate(candidates, *args, **options)
        return dataclasses.replace(evaluations, acceptable=evaluations.objectives[:, 0] <= self.worst)


class TestAutoUnderAScoreLimit(OptimizerContract):
    make = staticmethod(Auto)

    def make_problem(self):
        return Limited(additive_problem([6, 4, 5, 3, 6, 4], seed=0, budget=1.0), 1.0)

    def make_tiny_problem(self):
        return Limited(additive_problem([3, 3, 4], seed=0, budget=0.9), 0.5)


def cheapest_found(maker, seed, told, trials=80):
    """Share of the dense cost of the cheapest acceptable candidate; the optimizer learns of the limit if `told`."""
    known = product_problem([8] * 8, seed=seed, budget=1.0)
    limited = Limited(known, 0.1 * sum(table[-1] for table in known.losses))
    problem = dataclasses.replace(limited.problem, seeds=uniform_seeds(known.problem, (0.8, 0.6, 0.4, 0.2)))
    optimizer, costs = maker(problem, seed), []
    for _ in range(trials // 8):
        seen = limited.evaluate(optimizer.ask(8))
        optimizer.tell(seen if told else dataclasses.replace(seen, acceptable=None))
        costs += seen.objectives[seen.acceptable, 1].tolist()
    return min(costs) / known.problem.limits[0]


@pytest.mark.slow
def test_auto_finds_cheaper_ones_when_it_knows_of_the_limit_and_far_cheaper_ones_than_random_search():
    aimed, whole, random = (
        np.median([cheapest_found(maker, seed, told) for seed in range(3)])
        for maker, told in ((Auto, True), (Auto, False), (RandomSearch, True))
    )
    assert aimed < 0.9 * whole
    assert aimed < 0.8 * random


class TestStoppingByItself:
    @pytest.mark.slow
    def test_a_search_ends_when_nothing_is_gained_and_says_how_it_knew(self, mlp, vectors, tmp_path):
        result = search(
            mlp, "flops <= 60%", vectors, "auto", space=Channels(step=4), optimizer="random", run_dir=str(tmp_path)
        )
        assert result.stopped in ("converged", "exhausted")
        assert 80 <= len(result.trials) < MOST_TRIALS
        (note,) = (note for note in result.notes if note.startswith("stopped after"))
        assert f"stopped after {len(result.trials)} trials: " in note
        with Journal.open(tmp_path) as journal:
            assert journal.meta()["trials"] == "auto"
        read = SearchResult.from_journal(tmp_path)
        assert read.notes[0] == f"from the journal: {len(result.trials)} trials finished, 0 pending"
        assert [trial.id for trial in read.front] == [trial.id for trial in result.front]

    @pytest.mark.slow
    def test_a_tiny_space_is_searched_to_its_end(self, mlp, vectors):
        result = search(mlp, "flops <= 60%", vectors, "auto", space=Channels(options=(1.0, 0.5)))
        assert result.stopped == "exhausted"
        assert any("found no further candidate within the budget" in note for note in result.notes)

    @pytest.mark.parametrize(("trials", "plan"), [("auto", 200), (37, 37)])
    def test_optimizers_plan_with_a_number(self, trials, plan):
        assert planned(trials, dimensions=6) == plan
        assert planned("auto", dimensions=60) == 480

    @pytest.mark.parametrize("trials", ["automatic", 0, 1.5])
    def test_other_words_are_refused(self, mlp, vectors, trials):
        with pytest.raises(ValueError, match=r"trials must be an integer of at least 1, or 'auto', got"):
            search(mlp, "flops <= 60%", vectors, trials)


class TestConvergence:
    """Made-up trials of one cost and one signal under a limit of 1."""

    problem = additive_problem([4] * 4, seed=0).problem

    def trials(self, rows, candidate=(1, 1, 0, 0)):
        name, limit = self.problem.cost_names[0], self.problem.limits[0]
        return [
            Trial(i, candidate, {}, {name: cost * limit}, -signal, (0, 0), signal)
            for i, (cost, signal) in enumerate(rows)
        ]

    def why(self, trials, worst=None):
        return why_converged(trials, self.problem, worst, Direction(higher_is_better=True))

    start = ((1.0, 0.1), (0.75, 0.4), (0.5, 1.0)) * 14

    def test_a_front_that_stands_still_is_done(self):
        assert self.why(self.trials(self.start + ((0.8, 0.9),) * 40)).endswith(
            "the last 40 candidates grew the front's hypervolume by 0.00%, less than 0.1%"
        )

    def test_a_front_that_grew_late_is_not(self):
        assert not self.why(self.trials(self.start + ((0.8, 0.9),) * 39 + ((0.7, 0.4),)))
        assert self.why(self.trials(self.start + ((0.7, 0.4),) + ((0.8, 0.9),) * 40))

    def test_growth_below_the_budget_range_does_not_count(self):
        assert self.why(self.trials(self.start + ((0.8, 0.9),) * 39 + ((0.1, 1.0),)))

    def test_too_few_trials_single_changes_and_failures_say_nothing(self):
        rows = self.start + ((0.8, 0.9),) * 40
        assert not self.why(self.trials(rows[:79]))
        assert not self.why(self.trials(self.start) + self.trials(rows, (1, 0, 0, 0)))
        failed = [dataclasses.replace(t, status=FAILED, signal=math.nan) for t in self.trials(rows)]
        assert not self.why(self.trials(self.start) + failed)

    def test_trials_over_a_limit_gain_nothing(self):
        still, last = self.trials(self.start + ((0.8, 0.9),) * 40), self.trials([(0.7, 0.1)])
        assert not self.why(still + last)
        assert self.why([*still, dataclasses.replace(last[0], feasible=False)])

    def test_trials_dropped_early_count_as_tried_whatever_their_estimate_promises(self):
        rows = self.start + ((0.8, 0.9),) * 39 + ((0.7, 0.1),)
        trials = self.trials(rows)
        assert not self.why(trials)
        raced = [dataclasses.replace(t, status=RACED) for t in trials[len(self.start) :]]
        assert self.why(trials[: len(self.start)] + raced)

    def test_under_a_limit_on_the_score_the_cheapest_acceptable_one_counts(self):
        rows = self.start + ((0.8, 0.9),) * 39
        still, falling = self.trials((*rows, (1.0, 0.01))), self.trials((*rows, (0.7, 0.39)))
        assert "made the cheapest one that meets the score limit 0.00% cheaper, less than 0.5%" in self.why(still, -0.4)
        assert not self.why(falling, -0.4)
        assert not self.why(still)

    def test_while_nothing_is_acceptable_the_front_counts(self):
        rows = self.start + ((0.8, 0.9),) * 39
        assert "hypervolume" in self.why(self.trials((*rows, (0.8, 0.9))), -0.01)
        assert not self.why(self.trials((*rows, (1.0, 0.02))), -0.01)
        assert not self.why(self.trials((*rows, (1.0, 0.005))), -0.01)


@pytest.mark.slow
def test_every_optimizer_takes_evaluations_of_which_some_are_unacceptable():
    limited = Limited(additive_problem([4] * 5, seed=0, budget=1.0), 0.5)
    for make in OPTIMIZERS.values():
        optimizer = make(limited.problem, 0)
        for _ in range(3):
            optimizer.tell(limited.evaluate(optimizer.ask(8)))
        assert limited.problem.feasible(optimizer.ask(4)).all()
