"""Random search: the honest baseline, spread over the whole budget range."""

from __future__ import annotations

from typing import final

import numpy as np
from numpy.typing import NDArray

from autoprune.optimizers.history import Archive
from autoprune.optimizers.position import position_of
from autoprune.optimizers.problem import Problem
from autoprune.protocols import Evaluations, FloatArray, IntArray

_HALVINGS = 10


@final
class RandomSearch:
    """Proposes random candidates at random costs within the budget range; learns nothing from evaluations.

    Args:
        problem: The problem to search.
        seed: Not negative; the same seed gives the same proposals.
    """

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        self._problem = problem
        self._archive = Archive(problem, seed)

    def ask(self, n: int) -> IntArray:
        """Return up to `n` new feasible candidates, int64, shape (<= n, d); empty when none is left."""
        return self._archive.ask(n, lambda k, rng: draw(self._problem, k, rng))

    def tell(self, evaluations: Evaluations) -> None:
        """Remember the candidates, so that they are not proposed again."""
        self._archive.tell(evaluations)

    def pend(self, candidates: IntArray) -> None:
        """Take candidates (n, d) as proposed already."""
        self._archive.pend(candidates)


def draw(problem: Problem, n: int, rng: np.random.Generator) -> IntArray:
    """Draw feasible candidates whose costs spread over the budget range; shape (n, d), duplicates possible.

    Each has its own profile, from uniform over all dimensions to independent in each: uniform pruning is hard to beat
    where the dimensions matter equally, and poor where they do not.
    """
    heterogeneity = rng.random((n, 1))
    levels = heterogeneity * rng.random((n, len(problem.sizes)))
    return move_to_costs(problem, levels, draw_costs(problem, n, rng))


def draw_costs(problem: Problem, n: int, rng: np.random.Generator) -> FloatArray:
    """Draw the largest costs of candidates, uniform over the budget range; shape (n, c)."""
    low, high = problem.budget_range.T
    costs: FloatArray = low + rng.random((n, len(low))) * (high - low)
    return costs


def move_to_costs(problem: Problem, levels: FloatArray, costs: FloatArray) -> IntArray:
    """Shift whole profiles, up or down, until they just meet their limits.

    Args:
        problem: The space.
        levels: Relative position of each entry along its options, in [0, 1], shape (n, d).
        costs: Largest costs of each candidate, shape (n, c); raised to those of the problem's cheapest one.

    Returns:
        Feasible candidates, shape (n, d).
    """
    last = problem.sizes - 1
    limits = np.minimum(np.maximum(costs, problem.costs(problem.cheapest[None])), problem.limits)

    def shifted(by: FloatArray) -> IntArray:
        shift = by[:, None] * problem.ordered
        return np.rint(np.clip(levels + shift, 0.0, 1.0) * last).astype(np.int64)

    over = np.full(len(levels), -1.0)
    within = np.ones(len(levels))
    for _ in range(_HALVINGS):
        middle = (over + within) / 2
        met = problem.feasible(shifted(middle), limits)
        within, over = np.where(met, middle, within), np.where(met, over, middle)
    # The last profile over the limits, not the first within: the repair then uses the rest of the budget.
    return problem.repair(shifted(over), limits)


def fill_up(
    problem: Problem,
    candidates: IntArray,
    limits: FloatArray,
    rng: np.random.Generator,
    first: NDArray[np.bool_] | None = None,
) -> IntArray:
    """Raise dimensions towards dense while the limits allow, so that no budget is left unused.

    Every candidate takes its dimensions in its own random order, and raises each as far as possible, one option at a
    time. Dimensions without an order stay.

    Args:
        problem: The space and its costs.
        candidates: Feasible within `limits`, shape (n, d).
        limits: Largest costs of each candidate, shape (n, c).
        rng: Draws the orders.
        first: Dimensions that come before all others, shape (n, d).

    Returns:
        Canonical candidates within their limits, shape (n, d).
    """
    position = position_of(problem, candidates)
    rows = np.arange(len(candidates))
    filled = position.candidates
    order = rng.random(filled.shape) - (0 if first is None else first)
    for dim in np.argsort(order, axis=1).T:
        active = np.flatnonzero(problem.ordered[dim] & (filled[rows, dim] > 0))
        while active.size:
            costs = position.after(active, dim[active], filled[active, dim[active]] - 1)
            active = active[(costs <= limits[active]).all(axis=1)]
            position.move(active, dim[active], filled[active, dim[active]] - 1)
            active = active[filled[active, dim[active]] > 0]
    return np.array(problem.canonical(filled))
