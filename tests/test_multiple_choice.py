"""The knapsack against full enumeration and against a mixed-integer solver."""

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from autoprune.errors import InfeasibleBudgetError
from autoprune.optimizers.knapsack.multiple_choice import choose_options, total


def draw_instance(rng, dims, options, whole=False):
    """Losses and costs without any order, and every third loss tied with another."""
    sizes = [int(options) if dims > 6 else int(rng.integers(1, options + 1)) for _ in range(dims)]
    losses = [np.round(rng.random(size), 1 if rng.random() < 0.3 else 9) for size in sizes]
    costs = [rng.integers(0, 40, size).astype(float) if whole else 10 * rng.random(size) for size in sizes]
    return losses, costs


def everything(tables, reduce):
    """The sum or the maximum of every combination of entries, in the order of itertools.product."""
    return np.array([reduce(row) for row in itertools.product(*tables)])


@pytest.mark.slow
def test_sum_and_minimax_equal_full_enumeration_on_300_random_instances():
    rng = np.random.default_rng(0)
    for _ in range(300):
        losses, costs = draw_instance(rng, int(rng.integers(1, 6)), 4, whole=True)
        cost, summed, largest = everything(costs, sum), everything(losses, sum), everything(losses, max)
        budgets = np.unique(np.concatenate([cost, cost + 0.5]))
        for objective, values in (("sum", summed), ("minimax", largest)):
            chosen = choose_options(losses, costs, budgets, objective)
            for budget, row in zip(budgets, chosen.tolist(), strict=True):
                at = np.ravel_multi_index(row, [len(table) for table in losses])
                assert cost[at] <= budget
                assert values[at] == pytest.approx(values[cost <= budget].min(), abs=1e-12)
                if objective == "minimax":  # the cheapest of the best
                    assert cost[at] == cost[values <= values[at]].min()


def solve_exactly(losses, costs, budget):
    """The least sum of losses by branch and bound, proven to within 1e-9."""
    flat, dims = np.concatenate(losses), np.repeat(np.arange(len(losses)), [len(row) for row in losses])
    one_each = csr_array((np.ones(len(dims)), (dims, np.arange(len(dims)))))
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(np.concatenate(costs)[None], -np.inf, budget)]
    options = {"mip_rel_gap": 1e-9}
    result = milp(flat, integrality=np.ones(len(flat)), bounds=Bounds(0, 1), constraints=constraints, options=options)
    assert result.success
    return result.fun


@pytest.mark.slow
def test_large_instances_agree_with_a_mixed_integer_solver_within_the_stated_bound():
    rng = np.random.default_rng(1)
    for _ in range(30):
        losses, costs = draw_instance(rng, 40, 12)
        cheapest, dense = sum(row.min() for row in costs), sum(row.max() for row in costs)
        budget = cheapest + rng.uniform(0.05, 0.5) * (dense - cheapest)
        bins = 2_000
        (chosen,) = choose_options(losses, costs, [budget], bins=bins)
        assert total(costs, chosen[None])[0] <= budget
        found = total(losses, chosen[None])[0]
        smaller = budget - 40 * (budget - cheapest) / bins
        assert solve_exactly(losses, costs, budget) - 1e-7 <= found <= solve_exactly(losses, costs, smaller) + 1e-7


@pytest.mark.parametrize("objective", ["sum", "minimax"])
def test_no_answer_exceeds_its_budget_and_a_larger_budget_is_never_worse(objective):
    rng = np.random.default_rng(2)
    for bins in (1, 7, 1000):
        losses, costs = draw_instance(rng, 12, 9)
        cheapest = np.array([[row.argmin() for row in costs]])
        budgets = np.linspace(total(costs, cheapest)[0], sum(row.max() for row in costs), 500)
        chosen = choose_options(losses, costs, budgets, objective, bins)
        assert (total(costs, chosen) <= budgets).all()
        picked = np.stack([row[chosen[:, j]] for j, row in enumerate(losses)])
        value = picked.sum(axis=0) if objective == "sum" else picked.max(axis=0)
        assert (np.diff(value) <= 1e-12).all()


def test_dimensions_with_more_options_than_a_byte_counts_are_chosen_from():
    losses, costs = [np.arange(300.0), np.arange(300.0)], [np.arange(300.0)[::-1], 2 * np.arange(300.0)[::-1]]
    assert choose_options(losses, costs, [0, 499, 897]).tolist() == [[299, 299], [0, 199], [0, 0]]


def test_costs_may_be_negative_because_they_may_be_differences():
    assert choose_options([[0.0, 1.0], [0.0, 1.0]], [[0, -4], [3, 0]], [-1, 3]).tolist() == [[1, 0], [0, 0]]


def test_a_budget_below_the_cheapest_options_is_refused_with_what_they_cost():
    with pytest.raises(InfeasibleBudgetError, match=r"budgets must be at least 3, the cost of .*, got 2\.5"):
        choose_options([[0.0, 3.0], [0.0, 1.0]], [[2, 1], [5, 2]], [10, 2.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": [[0.0]]}, r"arrays of the same positive lengths, .* got \[\(1,\)\] and \[\(2,\)\]"),
        ({"losses": [[0.0, np.nan]]}, "losses and costs must be finite"),
        ({"costs": [[1.0, np.inf]]}, "losses and costs must be finite"),
        ({"budgets": 3.0}, r"budgets must be numbers of shape \(n,\), got 3\.0"),
        ({"objective": "mean"}, "objective must be 'sum' or 'minimax', got 'mean'"),
        ({"bins": 0}, "bins must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        choose_options(**{"losses": [[0.0, 1.0]], "costs": [[2, 1]], "budgets": [2], **change})
