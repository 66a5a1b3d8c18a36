"""Promises of level switching, breeding, Optuna's samplers and the surrogate beyond the contract of optimizers."""

import dataclasses
import logging

import numpy as np
import optuna
import pytest

from autoprune.optimizers import NSGA2, Bayes, LevelSwitch, Problem, RandomSearch
from autoprune.optimizers.level_switch import switch_levels
from autoprune.optimizers.nsga2 import breed, find_coupled
from autoprune.optimizers.random import draw, fill_up
from autoprune.optimizers.surrogate import Surrogate
from autoprune.testing.problems import additive_problem, blocks_problem, product_problem, staircase_problem

KINDS = {
    "additive": additive_problem([9] * 12, seed=0),
    "product": product_problem([9] * 12, seed=0),
    "staircase": staircase_problem([9] * 12, seed=0),
    "blocks": blocks_problem(4, seed=0),
}


def drawn(known, n, seed=0):
    return draw(known.problem, n, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_children_of_a_switch_stay_within_the_budget_of_their_parents_and_differ_from_them(kind):
    problem, rng = KINDS[kind].problem, np.random.default_rng(1)
    parents = drawn(KINDS[kind], 60)
    budgets = problem.costs(parents)
    children = switch_levels(problem, parents, budgets, rng)
    assert (problem.costs(children) <= budgets).all()
    np.testing.assert_array_equal(children, problem.canonical(children))
    assert (children != parents).any(axis=1).mean() > 0.9
    assert (children < parents).any(axis=1).mean() > 0.7


def test_a_switch_mostly_changes_few_dimensions():
    known = KINDS["additive"]
    parents = drawn(known, 200)
    costs = known.problem.costs(parents)
    children = switch_levels(known.problem, parents, costs, np.random.default_rng(1))
    assert 2 <= np.median((children != parents).sum(axis=1)) <= 4


def test_a_switch_changes_all_places_of_a_network_alike():
    problem = Problem(np.full(20, 8), ("sum",), np.array([70.0]), lambda c: 7.0 * 20 - c.sum(axis=1, keepdims=True))
    parents = draw(problem, 2000, np.random.default_rng(0))
    children = switch_levels(problem, parents, problem.costs(parents), np.random.default_rng(1))
    changed = (children != parents).mean(axis=0)
    error = np.sqrt(changed.mean() * (1 - changed.mean()) / len(parents))
    assert np.abs(changed - changed.mean()).max() < 4 * error


def test_what_is_left_goes_first_to_the_dimensions_that_are_named():
    problem, rng = KINDS["additive"].problem, np.random.default_rng(0)
    start = drawn(KINDS["additive"], 50)
    first = np.zeros(start.shape, dtype=bool)
    first[:, [1, 3]] = True
    filled = fill_up(problem, start, np.tile(problem.limits, (50, 1)), rng, first)
    others = ((filled < start) & ~first).any(axis=1)
    assert 0 < others.sum() < 50
    for row in filled[others]:
        raised = row - np.eye(len(row), dtype=np.int64)[[1, 3]][row[[1, 3]] > 0]
        assert not problem.feasible(raised).any()


def test_what_is_filled_up_cannot_be_raised_any_further():
    known = KINDS["product"]
    problem, rng = known.problem, np.random.default_rng(0)
    start = np.tile(problem.cheapest, (5, 1))
    filled = fill_up(problem, start, np.tile(problem.limits, (5, 1)), rng)
    assert problem.feasible(filled).all()
    assert len(np.unique(filled, axis=0)) == 5
    for candidate in filled:
        raised = candidate - np.eye(len(candidate), dtype=np.int64)[candidate > 0]
        assert not problem.feasible(raised).any()


def test_dimensions_that_share_a_product_are_coupled_and_others_are_not():
    assert find_coupled(KINDS["additive"].problem).tolist() == []
    assert find_coupled(KINDS["product"].problem).tolist() == [[j, j + 1] for j in range(11)]
    within_blocks = [[b + i, b + j] for b in range(0, 12, 3) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert find_coupled(KINDS["blocks"].problem).tolist() == within_blocks


def test_children_inherit_coupled_dimensions_together_more_often():
    known = product_problem([2] * 30, seed=0, budget=5.0)
    parents = np.array([[0] * 30, [1] * 30])
    objectives = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])

    def borders(coupled):
        rng = np.random.default_rng(0)
        problem = dataclasses.replace(known.problem, ordered=np.zeros(30, dtype=np.bool_))  # no shift, no filling up
        children = breed(problem, parents, objectives, 200, rng, coupled=coupled)
        return (np.diff(children, axis=1) != 0).sum(axis=1).mean()

    assert borders(find_coupled(known.problem)) < 0.7 * borders(None)


def test_a_front_given_as_seeds_is_the_initial_population_of_nsga2():
    known = additive_problem([16] * 20, seed=0)
    front = drawn(known, 12)
    problem = dataclasses.replace(known.problem, seeds=front)
    optimizer = NSGA2(problem, 0)
    optimizer.tell(known.evaluate(optimizer.ask(12)))
    children = optimizer.ask(20)
    same = (children[:, None] == front[None]).mean(axis=2).max(axis=1)
    strangers = (drawn(known, 20, seed=1)[:, None] == front[None]).mean(axis=2).max(axis=1)
    assert np.median(same) > np.median(strangers) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("maker", [LevelSwitch, Bayes])
def test_it_ends_with_a_lower_loss_than_random_search(maker):
    known = additive_problem([16] * 20, seed=0)
    best = {}
    for make in (RandomSearch, maker):
        optimizer, best[make] = make(known.problem, 0), np.inf
        for _ in range(8):
            evaluations = known.evaluate(optimizer.ask(8))
            optimizer.tell(evaluations)
            best[make] = min(best[make], evaluations.objectives[:, 0].min())
    assert best[maker] < 0.9 * best[RandomSearch]


@pytest.mark.slow
def test_bayes_repeats_nothing_where_the_sampler_itself_does():
    known = additive_problem([2, 3, 2, 2], seed=0, budget=0.8)
    optimizer = Bayes(known.problem, 0)
    proposed = []
    while len(batch := optimizer.ask(3)):
        proposed += batch.tolist()
        optimizer.tell(known.evaluate(batch))
    assert sorted(proposed) == known.feasible_candidates().tolist()


def test_bayes_leaves_the_logging_of_optuna_as_it_was(caplog):
    known = additive_problem([4] * 6, seed=0)
    before = optuna.logging.get_verbosity()
    optuna.logging.enable_propagation()
    try:
        optimizer = Bayes(known.problem, 0)
        with caplog.at_level(logging.DEBUG):
            for _ in range(3):
                optimizer.tell(known.evaluate(optimizer.ask(8)))
    finally:
        optuna.logging.disable_propagation()
    assert optuna.logging.get_verbosity() == before
    assert [record for record in caplog.records if record.name.startswith("optuna")] == []


@pytest.mark.slow
def test_what_is_pending_changes_what_bayes_proposes_next():
    known = additive_problem([9] * 12, seed=0)
    history = known.evaluate(drawn(known, 24))
    alone, busy = Bayes(known.problem, 0), Bayes(known.problem, 0)
    alone.tell(history)
    busy.tell(history)
    pending = busy.ask(4)
    np.testing.assert_array_equal(alone.ask(4), pending)
    assert not {*map(tuple, busy.ask(4).tolist())} & {*map(tuple, pending.tolist())}


def fitted(known, n, signal=None):
    candidates = drawn(known, n)
    objectives = known.evaluate(candidates).objectives
    if signal is not None:
        objectives[:, 0] = signal(objectives, np.random.default_rng(7))
    surrogate = Surrogate(known.problem)
    surrogate.fit(candidates, objectives)
    return surrogate, candidates, objectives


@pytest.mark.parametrize("kind", ["additive", "blocks"])
def test_the_surrogate_learns_losses_that_follow_from_the_options(kind):
    surrogate, _, _ = fitted(KINDS[kind], 64)
    assert surrogate.tau > 0.7
    assert surrogate.trusted


@pytest.mark.parametrize(
    "signal",
    [
        pytest.param(lambda objectives, rng: rng.normal(size=len(objectives)), id="noise"),
        pytest.param(lambda objectives, rng: -objectives[:, 1] + 0.01 * rng.normal(size=len(objectives)), id="cost"),
    ],
)
def test_a_signal_that_says_nothing_at_equal_cost_switches_the_surrogate_off(signal):
    surrogate, _, _ = fitted(KINDS["additive"], 64, signal)
    assert abs(surrogate.tau) < 0.3
    assert not surrogate.trusted


@pytest.mark.slow
def test_a_fit_does_not_depend_on_the_order_of_rows_and_too_few_rows_teach_nothing():
    known = KINDS["blocks"]
    surrogate, candidates, objectives = fitted(known, 40)
    other, order = Surrogate(known.problem), np.random.default_rng(0).permutation(40)
    other.fit(candidates[:10], objectives[:10])
    assert not other.trusted
    with pytest.raises(RuntimeError, match="at least 16 candidates"):
        other.predict(candidates)
    other.fit(candidates[order], objectives[order])
    np.testing.assert_array_equal(other.predict(candidates), surrogate.predict(candidates))
    assert other.history == [(10, 0.0), (40, surrogate.tau)]


@pytest.mark.slow
def test_of_many_rows_the_least_dominated_are_learnt_from():
    known = additive_problem([9] * 12, seed=0)
    surrogate, candidates, objectives = fitted(known, 340)
    assert surrogate.history == [(340, surrogate.tau)]
    worse = objectives.copy()
    worst = np.argsort([(objectives <= row).all(axis=1).sum() for row in objectives])[-5:]
    worse[worst, 0] += 1e6
    again = Surrogate(known.problem)
    again.fit(candidates, worse)
    np.testing.assert_array_equal(again.predict(candidates), surrogate.predict(candidates))
