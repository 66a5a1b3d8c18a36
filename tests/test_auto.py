"""Promises of `auto` beyond the contract of optimizers: its phases, its surrogate, and odd problems."""

import dataclasses

import numpy as np
import pytest

import autoprune
from autoprune import Data
from autoprune.optimizers import Auto, RandomSearch, uniform_seeds
from autoprune.optimizers.knapsack.coupling import coupled_front
from autoprune.optimizers.knapsack.relinearise import front_of, spread_budgets
from autoprune.optimizers.knapsack.sensitivity import Table, table_of
from autoprune.optimizers.knapsack.table_correction import corrected_tables
from autoprune.protocols import FAILED, OK, RACED
from autoprune.study.progress import Progress
from autoprune.testing.problems import additive_problem, blocks_problem, product_problem, staircase_problem


def planned(known, trials):
    """The problem as `search` states it: with uniform pruning as seeds, for `trials` trials."""
    seeds = uniform_seeds(known.problem, (1.0, 0.75, 0.5))
    return dataclasses.replace(known.problem, seeds=seeds, trials=trials)


def run(optimizer, known, trials, batch=8, signal=None):
    """All proposals in order, shape (trials, d); of assembled candidates `signal` is told in place of the loss."""
    proposed = []
    while len(proposed) < trials:
        candidates = optimizer.ask(min(batch, trials - len(proposed)))
        assert len(candidates)
        evaluations = known.evaluate(candidates)
        if signal is not None:
            joint = np.count_nonzero(candidates, axis=1) > 1
            evaluations.objectives[joint, 0] = signal(evaluations.objectives[joint, 0])
        optimizer.tell(evaluations)
        proposed += candidates.tolist()
    return np.array(proposed)


class TestPhases:
    @pytest.mark.parametrize("budget", [0.5, 1.2])
    def test_uniform_pruning_comes_first_after_dense_where_that_is_feasible(self, budget):
        problem = planned(product_problem([9] * 8, seed=0, budget=budget), 100)
        assert problem.seeds.any(axis=1).tolist() == [True] * 3 if budget < 1 else [False, True, True, True]
        np.testing.assert_array_equal(Auto(problem, 0).ask(8)[: len(problem.seeds)], problem.seeds)

    @pytest.mark.slow
    @pytest.mark.parametrize("make", [product_problem, staircase_problem])
    @pytest.mark.parametrize("trials", [20, 60])
    def test_the_scan_takes_at_most_forty_percent_early_and_then_all_are_feasible(self, make, trials):
        known = make([9] * 8, seed=0)
        problem = planned(known, trials)
        candidates = run(Auto(problem, 0), known, trials)
        probes = np.flatnonzero(problem.probes(candidates))
        first = len(problem.seeds) + 2  # the ends of the expected front
        assert 0.2 * trials < len(probes) <= 0.4 * trials
        assert len(problem.seeds) <= probes[0] <= first
        assert probes[-1] < first + len(probes) + 8  # a batch may end with assembled ones, since it never waits
        assert problem.feasible(candidates[probes[-1] + 1 :]).all()
        assert len(np.unique(candidates, axis=0)) == trials

    @pytest.mark.parametrize("prior", [True, False])
    def test_few_trials_are_spent_on_the_expected_front_and_none_on_a_scan(self, prior):
        known = product_problem([9] * 8, seed=0)
        expected = known.losses if prior else tuple(np.linspace(0, 1, 9) ** 2 for _ in range(8))
        problem = dataclasses.replace(planned(known, 15), prior=expected if prior else None)
        candidates = run(Auto(problem, 0), known, 15)
        first = len(problem.seeds)
        front = front_of(problem, expected, spread_budgets(problem, 5))
        fresh = [row for row in front.tolist() if row not in problem.seeds.tolist()]
        assert len(fresh) >= 2
        assert candidates[first : first + len(fresh)].tolist() == fresh
        assert problem.feasible(candidates).all()

    def test_with_integer_programming_it_starts_from_the_exact_front_of_the_prior(self):
        known = blocks_problem(4, seed=0)
        problem = dataclasses.replace(planned(known, 12), prior=known.losses)
        first = Auto(problem, 0, solver="milp").ask(12)[len(problem.seeds) :]
        exact = coupled_front(problem, known.losses, spread_budgets(problem, 5))
        assert (exact.gaps <= 1e-6).all()
        fresh = [row for row in dict.fromkeys(map(tuple, exact.candidates)) if list(row) not in problem.seeds.tolist()]
        assert list(map(tuple, first[: len(fresh)])) == fresh
        with pytest.raises(ValueError, match="solver must be 'dynamic' or 'milp', got 'exact'"):
            Auto(problem, 0, solver="exact")

    def test_options_without_an_order_are_not_measured_alone(self):
        known = product_problem([5] * 8, seed=0)
        problem = dataclasses.replace(planned(known, 40), ordered=np.zeros(8, dtype=bool))
        assert not problem.probes(run(Auto(problem, 0), known, 40)).any()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("signal", "adds_up"), [(None, True), (lambda loss: -loss, False)], ids=["additive", "deceptive"]
    )
    def test_the_tables_front_comes_next_and_is_left_early_where_losses_do_not_add_up(self, signal, adds_up):
        known = product_problem([9] * 6, seed=0)
        problem = planned(known, 340)
        candidates = run(Auto(problem, 0), known, 100, signal=signal)
        probing = problem.probes(candidates)
        after = np.flatnonzero(probing)[-1] + 1
        losses = table_of(problem, known.evaluate(candidates[probing])).losses
        front = front_of(problem, losses, spread_budgets(problem, 33))
        earlier = set(map(tuple, candidates[:after].tolist()))
        expected = [row for row in dict.fromkeys(map(tuple, front.tolist())) if row not in earlier]
        found = list(map(tuple, candidates[after:].tolist()))
        assert found[:3] == expected[:3]  # at least, until five assembled candidates have shown what sums are worth
        assert len(expected) > 20
        assert (found[: len(expected)] == expected) == adds_up

    @pytest.mark.slow
    @pytest.mark.parametrize("batch", [1, 8])
    def test_refinements_spread_over_the_budget_range_up_to_the_limit(self, batch):
        known = product_problem([16] * 12, seed=0)
        problem = planned(known, 60)
        refined = run(Auto(problem, 0), known, 60, batch)[36:]
        used = (problem.costs(refined) / problem.limits).max(axis=1)
        assert used.max() > 0.95
        assert used.min() < 0.6
        assert 0.65 < np.median(used) < 0.95

    @pytest.mark.slow
    def test_the_search_ends_with_a_lower_loss_than_random_search(self):
        for seed in range(2):
            known = product_problem([16] * 12, seed=seed)
            problem = planned(known, 80)
            best = [
                known.loss(found[problem.feasible(found)]).min()
                for found in (run(make(problem, 0), known, 80) for make in (Auto, RandomSearch))
            ]
            assert best[0] < 0.9 * best[1]


class TestSurrogate:
    @pytest.mark.slow
    @pytest.mark.parametrize("batch", [3, 8])
    def test_its_history_grows_with_what_was_told(self, batch):
        known = additive_problem([9] * 10, seed=0)
        problem = planned(known, 60)
        optimizer, lengths = Auto(problem, 0), []
        found = np.zeros((0, 10), dtype=np.int64)
        for trials in (50, 55, 60):
            found = np.concatenate([found, run(optimizer, known, trials - len(found), batch)])
            lengths.append(len(optimizer.surrogate_history))
        told = [count for count, _ in optimizer.surrogate_history]
        assert lengths[0] < lengths[1] < lengths[2]
        assert told == sorted(set(told))
        assert 16 < told[-1] <= problem.feasible(found).sum()
        assert all(-1 <= tau <= 1 for _, tau in optimizer.surrogate_history)
        assert optimizer.surrogate_history[-1][1] > 0.4  # additive losses are learnt

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "signal",
        [
            pytest.param(lambda loss: -loss, id="deceptive"),
            pytest.param(lambda loss: np.random.default_rng(len(loss)).normal(size=len(loss)), id="noise"),
            pytest.param(np.zeros_like, id="constant"),
            pytest.param(lambda loss: np.where(loss > 4.0, 1e6, loss), id="collapse"),
        ],
    )
    @pytest.mark.parametrize("make", [lambda: product_problem([9] * 8, seed=0), lambda: blocks_problem(3, seed=0)])
    def test_misleading_signals_give_feasible_proposals_without_repetition(self, make, signal):
        known = make()
        problem = planned(known, 48)
        candidates = run(Auto(problem, 0), known, 48, signal=signal)
        assert (problem.feasible(candidates) | problem.probes(candidates)).all()
        assert len(np.unique(candidates, axis=0)) == 48

    @pytest.mark.slow
    @pytest.mark.parametrize("status", [FAILED, RACED])
    def test_nothing_is_learnt_when_no_candidate_is_evaluated_in_full_but_the_search_goes_on(self, status):
        known = product_problem([9] * 8, seed=0)
        problem = planned(known, 40)
        optimizer = Auto(problem, 0)
        for _ in range(5):
            candidates = optimizer.ask(8)
            assert len(candidates) == 8
            optimizer.tell(known.evaluate(candidates, status))
        assert {tau for _, tau in optimizer.surrogate_history} <= {0.0}
        optimizer.tell(known.evaluate(candidates, OK))
        assert problem.feasible(optimizer.ask(8)).all()


class TestOddProblems:
    @pytest.mark.slow
    @pytest.mark.parametrize("batch", [1, 3, 100])
    @pytest.mark.parametrize(
        "known",
        [
            pytest.param(additive_problem([9], seed=0), id="one-dimension"),
            pytest.param(additive_problem([1, 1, 1], seed=0, budget=1.5), id="one-option-each"),
            pytest.param(additive_problem([1], seed=0, budget=1.5), id="one-candidate"),
            pytest.param(additive_problem([1, 9], seed=0, budget=0.9), id="one-choice"),
            pytest.param(product_problem([2, 2], seed=0, budget=0.8), id="two-choices"),
        ],
    )
    def test_tiny_spaces_are_exhausted_and_end(self, known, batch):
        problem, proposed = planned(known, 40), []
        optimizer = Auto(problem, 0)
        while len(candidates := optimizer.ask(batch)):
            proposed += candidates.tolist()
            optimizer.tell(known.evaluate(candidates))
        found = np.array(proposed)
        feasible = problem.feasible(found)
        assert sorted(found[feasible].tolist()) == known.feasible_candidates().tolist()
        assert problem.probes(found[~feasible]).all()
        assert optimizer.ask(batch).shape == (0, len(problem.sizes))

    @pytest.mark.slow
    def test_one_at_a_time_is_one_at_a_time(self):
        known = product_problem([9] * 8, seed=0)
        optimizer = Auto(planned(known, 30), 0)
        for _ in range(30):
            candidates = optimizer.ask(1)
            assert candidates.shape == (1, 8)
            optimizer.tell(known.evaluate(candidates))

    @pytest.mark.slow
    @pytest.mark.parametrize("tight", [0, 1])
    def test_of_several_limits_all_are_met_whichever_binds(self, tight):
        known = product_problem([9] * 8, seed=0)
        limits = known.problem.limits * np.where(np.arange(2) == tight, 1.0, 2.0)
        known = dataclasses.replace(known, problem=dataclasses.replace(known.problem, limits=limits, budget_range=None))
        problem = planned(known, 60)
        candidates = run(Auto(problem, 0), known, 60)
        assembled = candidates[~problem.probes(candidates)]
        used = problem.costs(assembled) / limits
        assert (used <= 1).all()
        assert used[:, tight].max() > 0.98
        assert used[:, 1 - tight].max() < 0.98


LOSSES = tuple(height * np.linspace(0, 1, 9) ** 2 for height in (1.0, 0.5, 2.0, 1.0, 0.7, 1.5))
TABLE = Table(LOSSES, (np.ones(9, dtype=np.bool_),) * 6, (np.zeros(9),) * 6)
TRUTH = np.array([0.4, 1.6, 1.0, 0.7, 1.3, 1.0])


def told(n, coefficients=TRUTH, noise=0.0, scale=1.0, offset=0.0):
    """Random candidates (n, 6) and signals (n, 1): sums of losses times coefficients, and noise."""
    rng = np.random.default_rng(0)
    candidates = rng.integers(0, 9, (n, 6))
    losses = np.stack([row[candidates[:, j]] for j, row in enumerate(LOSSES)], axis=1)
    signal = losses @ coefficients + noise * rng.standard_normal(n)
    return candidates, (scale * signal + offset)[:, None]


def drawn(candidates, signal, draws=400):
    """Coefficients drawn, shape (draws, 6)."""
    made = [corrected_tables(TABLE, candidates, signal, np.random.default_rng(seed)) for seed in range(draws)]
    for row, true in zip(made[0], LOSSES, strict=True):
        np.testing.assert_allclose(row, row[-1] / true[-1] * true)  # one coefficient for all options
    return np.array([[row[-1] / true[-1] for row, true in zip(table, LOSSES, strict=True)] for table in made])


class TestCoefficients:
    @pytest.mark.slow
    @pytest.mark.parametrize("noise", [0.0, 0.2])
    def test_known_ones_are_recovered_up_to_their_common_value(self, noise):
        mean = drawn(*told(600, noise=noise)).mean(axis=0)
        np.testing.assert_allclose(mean / mean.mean(), TRUTH / TRUTH.mean(), atol=0.12)

    @pytest.mark.slow
    def test_the_spread_of_what_is_drawn_falls_with_what_was_told(self):
        few, many = (drawn(*told(n)).std(axis=0) for n in (12, 200))
        assert (many < 0.5 * few).all()
        assert (few < 0.5).all()

    def test_unit_and_origin_of_the_signal_do_not_matter(self):
        np.testing.assert_allclose(drawn(*told(40), 20), drawn(*told(40, scale=7.0, offset=-3.0), 20), rtol=1e-6)

    @pytest.mark.parametrize(
        ("candidates", "signal"), [told(0), told(3), told(40, scale=-1.0)], ids=["nothing", "three", "reversed"]
    )
    def test_too_few_or_contradictory_candidates_leave_the_prior(self, candidates, signal):
        coefficients = drawn(candidates, signal)
        np.testing.assert_allclose(coefficients.mean(axis=0), 1.0, atol=0.08)
        np.testing.assert_allclose(coefficients.std(axis=0), 0.5, atol=0.05)

    def test_none_is_zero_or_negative(self):
        assert drawn(*told(3)).min() > 0

    def test_equal_signals_and_equal_candidates_teach_nothing_and_break_nothing(self):
        candidates, _ = told(20)
        for rows in (candidates, np.repeat(candidates[:1], 20, axis=0)):
            assert np.isfinite(drawn(rows, np.ones((20, 1)), 5)).all()


@pytest.mark.slow
def test_a_search_tells_its_phases_and_its_surrogate_while_it_runs_and_in_the_result(digits, digits_model, monkeypatch):
    phases = []
    monkeypatch.setattr(Progress, "due", lambda self, done: True)
    monkeypatch.setattr(Progress, "update", lambda self, done, failed, best, front, phase: phases.append(phase))
    data = Data(digits.train, digits.validation, digits.test, calibration_samples=64, validation_samples=64)
    result = autoprune.search(digits_model, "flops <= 50%", data, trials=60)
    assert list(dict.fromkeys(phases)) == ["expected front", "sensitivity scan", "knapsack front", "refinement"]
    notes = " ".join(result.notes)
    assert "sensitivity scan" in notes
    assert "surrogate: rank correlation at equal cost" in notes
