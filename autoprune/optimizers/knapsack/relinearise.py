"""The knapsack under true costs: products of sizes, staircases, several limits at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from autoprune.optimizers.knapsack.local_moves import Moves
from autoprune.optimizers.knapsack.multiple_choice import Objective, choose_options
from autoprune.optimizers.problem import Problem
from autoprune.protocols import FloatArray, IntArray

_SHARPNESS = 8.0  # power of a limit's tightness in its weight
_LEAST_WEIGHT = 1e-3
_ROUNDING = 1e-9  # of a limit: sums of differences must not miss a candidate that just fits; true costs decide anyway


def front_of(
    problem: Problem, losses: Sequence[ArrayLike], budgets: ArrayLike, objective: Objective = "sum", rounds: int = 6
) -> IntArray:
    """Find the candidate of least additive loss within each budget, under the true cost.

    Around an incumbent the cost is replaced by the sum of its changes by each dimension alone. That is additive, so
    `choose_options` is exact for it; its answer is lowered and raised under the true cost and becomes the next
    incumbent, until nothing changes. The best of all rounds is kept, improved by exchanging pairs, and shared with the
    budgets that allow it too. Heuristic where costs are not additive.

    Several limits are combined into one: each relative to its limit, with weights that follow how binding each limit
    was in the last answer (a surrogate relaxation; Glover, Operations Research 16(4), 1968). A second table dimension
    would be exact for the linearised costs, but these are rounded and re-made in every round anyway, and it
    multiplies time and memory by the number of bins, for every further limit again.

    Args:
        problem: The space, its true costs and its canonical form.
        losses: Loss of each option, lower is better, d arrays of shape (sizes[j],).
        budgets: Largest costs of each candidate, shape (m, c); the problem's own limits are not used.
        objective: ``"sum"`` of the losses, or the largest of them, ``"minimax"``.
        rounds: The most incumbents for each budget.

    Returns:
        One canonical candidate for each budget, int64, shape (m, d). None exceeds its budget, and in none can any
        option of an ordered dimension be raised (its index lowered) within it, nor one of lower loss be taken in a
        dimension without an order.

    Raises:
        InfeasibleBudgetError: If no candidate was found within a budget.
        ValueError: If the shapes disagree.
    """
    tables = [np.asarray(row, dtype=np.float64) for row in losses]
    limits = np.asarray(budgets, dtype=np.float64)
    if [len(row) for row in tables] != problem.sizes.tolist() or limits.ndim != 2:
        raise ValueError(
            f"losses must have {problem.sizes.tolist()} entries and budgets shape (m, {len(problem.limits)}), "
            f"got {[len(row) for row in tables]} and {limits.shape}"
        )
    moves = Moves(problem, tables, objective)
    best = _relinearise(problem, moves, tables, limits, objective, rounds)
    best = moves.exchange(best, limits)
    return moves.fill(_share(problem, moves, best, limits), limits)


def spread_budgets(problem: Problem, n: int) -> FloatArray:
    """Spread budgets over the budget range, from its top on and then always in the widest gap, shape (n, c).

    Budgets below the cost of the problem's cheapest candidate are raised to it.
    """
    places = [1.0, 0.0]
    gaps = 1
    while len(places) < n:
        places += [(2 * i + 1) / (2 * gaps) for i in range(gaps)][::-1]
        gaps *= 2
    low, high = problem.budget_range.T
    wanted: FloatArray = low + np.array(places[:n])[:, None] * (high - low)
    return reachable(problem, wanted)


def reachable(problem: Problem, budgets: FloatArray) -> FloatArray:
    """Raise budgets (n, c) to the costs of the problem's cheapest candidate, and lower them to the limits."""
    return np.minimum(np.maximum(budgets, problem.costs(problem.cheapest[None])), problem.limits)


def _relinearise(
    problem: Problem, moves: Moves, tables: list[FloatArray], limits: FloatArray, objective: Objective, rounds: int
) -> IntArray:
    """Find the best incumbent for each row of limits (m, c), shape (m, d)."""
    current = _start(problem, moves, limits)
    level = (current / np.maximum(problem.sizes - 1, 1)).mean(axis=1, keepdims=True)
    memory = np.rint(level * problem.ordered * (problem.sizes - 1)).astype(np.int64)
    best = current.copy()
    weights = np.ones_like(limits)
    rows = np.arange(len(limits))
    unchanged = np.zeros(len(limits), dtype=np.int64)
    for _ in range(rounds):
        if not rows.size:
            break
        scale = weights[rows] / limits[rows]
        answers, memory[rows] = _solve(
            problem, moves, tables, current[rows], memory[rows], limits[rows], scale, objective
        )
        settled = moves.settle(answers, limits[rows])
        better = moves.loss(settled) < moves.loss(best[rows])
        best[rows[better]] = settled[better]
        binding = problem.costs(answers) / limits[rows]
        most = np.maximum(binding.max(axis=1, keepdims=True), np.finfo(np.float64).tiny)  # answers may cost nothing
        weights[rows] *= np.maximum(binding / most, _LEAST_WEIGHT) ** _SHARPNESS
        weights[rows] = np.maximum(weights[rows] / weights[rows].max(axis=1, keepdims=True), _LEAST_WEIGHT)
        unchanged[rows] = np.where((settled == current[rows]).all(axis=1), unchanged[rows] + 1, 0)
        current[rows] = settled
        rows = rows[unchanged[rows] < limits.shape[1]]  # with several limits the weights may still move it
    return best


def _start(problem: Problem, moves: Moves, limits: FloatArray) -> IntArray:
    """Feasible candidates to linearise around first, one for each row of limits."""
    dense = np.zeros((len(limits), len(problem.sizes)), dtype=np.int64)
    start = moves.fill(problem.repair(dense, limits), limits)
    costs, losses = moves.after(start)
    # The repair lowers all dimensions together, which drops every block at once; single moves choose, but take longer.
    gated = (moves.idle(costs) & moves.idle(losses)).any(axis=1)
    start[gated] = moves.settle(dense[gated], limits[gated])
    return start


def _solve(
    problem: Problem,
    moves: Moves,
    tables: list[FloatArray],
    current: IntArray,
    memory: IntArray,
    limits: FloatArray,
    scale: FloatArray,
    objective: Objective,
) -> tuple[IntArray, IntArray]:
    """Solve the knapsack under costs linearised around feasible incumbents; return answers and memory, both (n, d).

    `scale` (n, c) turns the costs into the one that the knapsack limits.

    The cost of an option that makes other dimensions relevant, such as keeping a block, depends on their options. So
    the memory holds the last option of each dimension while it was relevant.
    """
    costs, losses = moves.after(current)
    idle = moves.idle(costs) & moves.idle(losses)
    memory = np.where(idle, memory, current)
    if idle.any():
        costs, losses = moves.after(memory)
    at = problem.costs(current)
    change = ((costs - at[:, None]) * scale[:, None]).sum(axis=2)
    slack = np.maximum(((limits - at) * scale).sum(axis=1), 0.0) + _ROUNDING
    bins = int(np.clip(64 * len(tables), 1_000, 10_000))
    answers = np.empty_like(current)
    for i, room in enumerate(slack):
        # Losses after single moves, because a move may make other dimensions, and their losses, irrelevant.
        table = moves.split(losses[i]) if objective == "sum" else tables
        answers[i] = choose_options(table, moves.split(change[i]), [room], objective, bins)[0]
    return np.where(idle, memory, answers), memory


def _share(problem: Problem, moves: Moves, candidates: IntArray, limits: FloatArray) -> IntArray:
    """Give each budget the best candidate found for any of them that meets it."""
    shared = candidates.copy()
    costs = problem.costs(candidates)
    order = np.argsort(moves.loss(candidates), kind="stable")
    for i, limit in enumerate(limits):
        shared[i] = candidates[next(k for k in order if (costs[k] <= limit).all())]
    return shared
