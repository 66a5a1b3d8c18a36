import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.errors import InfeasibleBudgetError
from autoprune.optimizers import Problem, uniform_seeds
from autoprune.testing.problems import PROBLEMS, blocks_problem


def draw(problem, n, seed=0):
    return np.random.default_rng(seed).integers(0, problem.sizes, size=(n, len(problem.sizes)))


def assert_moved_no_further_than_needed(problem, candidates, repaired, limits=None):
    limits = np.broadcast_to(problem.limits if limits is None else limits, (len(candidates), len(problem.limits)))
    assert repaired.dtype == np.int64
    assert problem.feasible(repaired, limits).all()
    np.testing.assert_array_equal(problem.canonical(repaired), repaired)
    fine = problem.feasible(candidates, limits)
    np.testing.assert_array_equal(repaired[fine], problem.canonical(candidates)[fine])
    for before, after, limit in zip(candidates, repaired, limits, strict=True):
        for j in np.flatnonzero(after > before):
            for option in range(before[j], after[j]):
                undone = after.copy()
                undone[j] = option
                assert (problem.costs(undone[None])[0] > limit).any(), (before, after, j, option)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROBLEMS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    seed=st.integers(0, 10**6),
    tightness=st.floats(0.0, 0.9),
)
def test_repair_moves_no_further_than_needed_whatever_the_cost(kind, sizes, seed, tightness):
    problem = PROBLEMS[kind](sizes, seed, budget=1.0).problem
    least = problem.costs(problem.cheapest[None])[0]
    problem = dataclasses.replace(problem, limits=problem.limits - tightness * (problem.limits - least))
    candidates = draw(problem, 6, seed)
    candidates[0] = 0
    assert_moved_no_further_than_needed(problem, candidates, problem.repair(candidates))


@pytest.mark.parametrize("seed", range(10))
def test_repair_handles_dropped_blocks_and_choices_without_an_order(seed):
    problem = blocks_problem(3, seed).problem
    candidates = draw(problem, 40, seed)
    assert_moved_no_further_than_needed(problem, candidates, problem.repair(candidates))


@pytest.mark.parametrize("kind", PROBLEMS)
def test_every_row_may_have_limits_of_its_own(kind):
    problem = PROBLEMS[kind]([8] * 20, seed=1, budget=0.7).problem
    candidates = draw(problem, 30)
    limits = problem.limits * np.random.default_rng(0).uniform(0.85, 1.0, size=(30, 1))
    assert_moved_no_further_than_needed(problem, candidates, problem.repair(candidates, limits), limits)


def test_repair_reaches_limits_that_the_cheapest_candidate_of_the_problem_does_not_meet():
    swap = np.array([[4.0, 1.0], [2.0, 2.0], [1.0, 4.0]])  # cost a falls while cost b rises
    problem = Problem(np.array([3]), ("a", "b"), np.array([4.0, 4.0]), lambda c: swap[c[:, 0]])
    assert problem.cheapest.tolist() == [1]
    assert problem.repair(np.array([[0], [0]]), np.array([[1.5, 4.0], [4.0, 1.5]])).tolist() == [[2], [0]]
    with pytest.raises(InfeasibleBudgetError, match=r"not all together.*a 2 \(limit 1.5\), b 2 \(limit 1.5\)"):
        problem.repair(np.array([[0]]), np.array([1.5, 1.5]))


def test_the_cheapest_is_within_all_limits_even_where_another_costs_less_in_sum():
    table = np.array([[2.0, 2.0], [0.1, 1.1], [0.9, 0.9]])
    problem = Problem(np.array([3]), ("a", "b"), np.array([1.0, 1.0]), lambda c: table[c[:, 0]])
    assert problem.cheapest.tolist() == [2]


def test_repair_takes_the_same_part_of_the_way_in_every_dimension():
    problem = PROBLEMS["additive"]([65] * 30, seed=0, budget=0.4).problem  # weights differ 100-fold
    start = np.repeat([0, 16, 32], 10)
    way = (problem.repair(start[None])[0] - start) / (64 - start)
    assert way.min() > 0.2
    assert way.max() < way.min() + 0.1


@pytest.mark.parametrize("seed", range(8))
def test_repair_keeps_its_promise_for_costs_without_any_structure(seed):
    blocks = blocks_problem(2, seed, budget=1.0).problem
    table = np.random.default_rng(seed).random((blocks.size, 2))
    problem = dataclasses.replace(
        blocks,
        cost_names=("a", "b"),
        limits=np.array([0.4, 0.5]),
        cost_function=lambda candidates: table[np.ravel_multi_index(tuple(candidates.T), tuple(blocks.sizes))],
        budget_range=None,
    )
    candidates = draw(problem, 300, seed)
    assert_moved_no_further_than_needed(problem, candidates, problem.repair(candidates))


def test_repair_is_deterministic_and_does_not_depend_on_the_rest_of_the_population():
    problem = PROBLEMS["table"]([7] * 15, seed=3, budget=0.6).problem
    candidates = draw(problem, 20)
    repaired = problem.repair(candidates)
    np.testing.assert_array_equal(problem.repair(candidates[::-1])[::-1], repaired)
    np.testing.assert_array_equal(problem.repair(candidates[3:4]), repaired[3:4])


@pytest.mark.parametrize("kind", ["additive", "product", "staircase", "table"])
def test_descent_finds_the_cheapest_candidate_where_it_is_known(kind):
    large = PROBLEMS[kind]([9] * 12, seed=5, budget=0.8).problem  # 9 ** 12 candidates: not enumerable
    single = [large.costs(np.pad(np.arange(9)[:, None], ((0, 0), (j, 11 - j)))) for j in range(12)]
    if kind in ("staircase", "table"):  # additive: the best options of all dimensions together are the optimum
        cheapest = np.array([costs[:, 0].argmin() for costs in single])
    else:
        cheapest = np.full(12, 8)
    np.testing.assert_allclose(large.costs(large.cheapest[None]), large.costs(cheapest[None]))


@pytest.mark.parametrize("sizes", [[4, 3, 5], [9] * 12])
def test_an_impossible_budget_names_the_cheapest_reachable_costs(sizes):
    with pytest.raises(
        InfeasibleBudgetError, match=r"flops must be at least [\d.]+, the cheapest reachable, got"
    ) as error:
        PROBLEMS["product"](sizes, seed=0, budget=0.001)
    assert "width must be at least" in str(error.value)


def test_a_probe_changes_at_most_one_dimension_of_the_dense_model():
    problem = PROBLEMS["additive"]([3, 3, 3], seed=0).problem
    candidates = np.array([[0, 0, 0], [0, 2, 0], [0, 1, 1], [2, 2, 2]])
    assert problem.probes(candidates).tolist() == [True, True, False, False]


def test_uniform_seeds_prune_all_dimensions_alike_and_just_meet_the_limits():
    problem = PROBLEMS["product"]([33] * 10, seed=0, budget=0.5).problem
    seeds = uniform_seeds(problem, (1.0, 0.75, 0.5))
    assert seeds.shape == (3, 10)
    assert (np.ptp(seeds, axis=1) <= 2).all()
    for seed, fraction in zip(seeds, (1.0, 0.75, 0.5), strict=True):
        limits = fraction * problem.limits
        assert problem.feasible(seed[None], limits).all()
        raised = seed - np.eye(10, dtype=np.int64)
        assert not problem.feasible(raised, limits).any()


def test_uniform_seeds_start_with_the_dense_candidate_if_it_is_feasible():
    problem = PROBLEMS["additive"]([5] * 4, seed=0, budget=1.0).problem
    seeds = uniform_seeds(problem, (1.0, 0.5, 1e-9))
    assert seeds[0].tolist() == [0, 0, 0, 0]
    assert seeds[-1].tolist() == [4, 4, 4, 4]


def test_uniform_seeds_leave_a_choice_without_an_order_as_it_is():
    def costs(candidates):
        return (16.0 - candidates[:, :2].sum(axis=1))[:, None]  # whatever is chosen in the third dimension

    problem = Problem(np.array([9, 9, 4]), ("flops",), np.array([8.0]), costs, ordered=np.array([True, True, False]))
    assert uniform_seeds(problem, (1.0, 0.5)).tolist() == [[4, 4, 0], [6, 6, 0]]


def test_the_budget_range_is_from_half_the_limit_to_the_limit_but_not_above_dense():
    tight = PROBLEMS["additive"]([5] * 4, seed=0, budget=0.5).problem
    np.testing.assert_allclose(tight.budget_range, [[tight.limits[0] / 2, tight.limits[0]]])
    loose = dataclasses.replace(tight, limits=100 * tight.limits, budget_range=None)
    np.testing.assert_allclose(loose.budget_range, [[tight.limits[0], 2 * tight.limits[0]]])


def test_a_space_is_listed_completely_and_without_duplicates():
    problem = PROBLEMS["additive"]([3, 1, 4, 2], seed=0).problem
    listed = problem.enumerate()
    assert problem.size == len(listed) == len(np.unique(listed, axis=0)) == 24
    assert (listed.max(axis=0) == problem.sizes - 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": np.array([])}, "at least one dimension"),
        ({"limits": np.array([0.0])}, "limits must be positive"),
        ({"limits": np.array([1.0, 2.0])}, "one for each of"),
        ({"ordered": np.array([True])}, "ordered must have shape"),
        (
            {"seeds": np.array([[0, 0, 9]])},
            r"seeds must hold option indices below \[3, 4, 2\], got \[0, 0, 9\] in row 0",
        ),
        ({"seeds": np.array([0, 0, 0])}, r"seeds must have shape \(n, 3\), got \(3,\)"),
    ],
)
def test_a_problem_that_makes_no_sense_is_refused(change, message):
    problem = PROBLEMS["additive"]([3, 4, 2], seed=0).problem
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(problem, **change)
