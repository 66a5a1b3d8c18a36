"""Feasibility under true costs of any shape: the cheapest candidate, and the smallest change that meets the limits.

The repair has two phases, each for a whole population at once. First a candidate moves straight towards a candidate
known to be feasible, until it is feasible itself: all dimensions fall in proportion, whereas lowering the most
expensive layer in every step would steer every search to the same shapes. Then every entry that was moved is put back
as far as the limits allow, the one furthest from its original value first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoprune.costs.changes import Counted
from autoprune.errors import InfeasibleBudgetError
from autoprune.optimizers.position import counted, position_of
from autoprune.protocols import FloatArray, IntArray

if TYPE_CHECKING:
    from autoprune.optimizers.problem import Problem

ENUMERABLE = 2**14
"""Spaces of at most this many candidates are listed where that makes an answer exact."""

_GRID = 16  # points between start and goal that are tried one by one, because a cost may fall and rise again
_HALVINGS = 8  # then the first step that succeeded is halved this often
_SWEEPS = 50


def find_cheapest(problem: Problem, limits: FloatArray) -> IntArray:
    """Find the candidate that stays furthest within the limits, counted by the worst ratio of cost to limit.

    Exact where the space can be enumerated; otherwise coordinate descent from several starts, which is also exact for
    one cost that is additive, a product of tables, or monotone.

    Args:
        problem: The space and its costs; its own limits are not used.
        limits: Shape (c,), positive.

    Returns:
        A canonical feasible candidate, shape (d,).

    Raises:
        InfeasibleBudgetError: If none was found.
    """
    if problem.size <= ENUMERABLE:
        pool = problem.enumerate()
    else:
        d = len(problem.sizes)
        pool = _descend(problem, _spread(problem, np.repeat([[0.0], [0.5], [1.0]], d, axis=1)), 1 / limits)
        if not problem.feasible(pool, limits).any():  # search further, also for the least of each cost alone
            starts = [pool, _spread(problem, np.random.default_rng(0).random((8, d)))]
            starts += [_descend(problem, pool, alone) for alone in np.diag(1 / limits)]
            pool = np.concatenate([*starts, _descend(problem, np.concatenate(starts), 1 / limits)])
    costs = problem.costs(pool)
    ratios = costs / limits
    best = np.lexsort((ratios.sum(axis=1), ratios.max(axis=1)))[0]
    if (costs[best] > limits).any():
        raise InfeasibleBudgetError(_explain(problem.cost_names, limits, costs.min(axis=0), costs[best]))
    cheapest: IntArray = problem.canonical(pool[[best]])[0]
    return cheapest


def _spread(problem: Problem, levels: FloatArray) -> IntArray:
    """Options nearest to levels in [0, 1], shape (n, d)."""
    return np.rint(levels * (problem.sizes - 1)).astype(np.int64)


def _explain(names: tuple[str, ...], limits: FloatArray, least: FloatArray, nearest: FloatArray) -> str:
    each = [
        f"{name} must be at least {_said(name, low)}, the cheapest reachable, got {_said(name, limit)}"
        for name, low, limit in zip(names, least, limits, strict=True)
        if low > limit
    ]
    if not each:
        costs = ", ".join(
            f"{name} {cost:.6g} (limit {x:.6g})" for name, cost, x in zip(names, nearest, limits, strict=True)
        )
        each = [f"each limit can be met alone but not all together; the nearest candidate costs {costs}"]
    return f"no candidate is within the budget: {'; '.join(each)}. Raise the limit or widen the space"


def _said(name: str, value: float) -> str:
    """Format a cost; for the time of a sample also the throughput, because users limit that."""
    return f"{value:.6g}" + (f" ({1e3 / value:.6g}/s)" if name == "ms_per_sample" and value > 0 else "")


def _descend(problem: Problem, starts: IntArray, weights: FloatArray) -> IntArray:
    """Improve starts (s, d) one dimension at a time, by the largest weighted cost, then by their sum."""
    position = position_of(problem, starts)
    current = position.candidates
    rows = np.arange(len(starts))
    for _ in range(_SWEEPS):
        before = current.copy()
        for j, size in enumerate(problem.sizes.tolist()):
            row = np.repeat(rows, size)
            option = np.tile(np.arange(size), len(rows))
            weighted = (position.after(row, np.full(len(row), j), option) * weights).reshape(len(rows), size, -1)
            best = np.lexsort((weighted.sum(axis=2), weighted.max(axis=2)), axis=-1)[:, 0]
            position.move(rows, np.full(len(rows), j), best)
        if np.array_equal(current, before):
            break
    return current


def move_within(problem: Problem, candidates: IntArray, anchors: IntArray, limits: FloatArray) -> IntArray:
    """Move candidates (n, d) within limits (n, c), towards feasible anchors (n, d) and no further than needed.

    Returns:
        Canonical feasible candidates, shape (n, d); see `Problem.repair` for what they guarantee.
    """
    moved = _approach(problem, candidates, anchors, limits)
    home = candidates
    while True:
        moved = _put_back(problem, moved, home, limits)
        canonical = problem.canonical(moved)
        if np.array_equal(canonical, moved):
            return moved
        # Indices only fall from here on, so the loop ends: entries that became irrelevant stay at 0.
        moved = np.array(canonical)
        home = np.minimum(home, canonical)


def _approach(problem: Problem, start: IntArray, goal: IntArray, limits: FloatArray) -> IntArray:
    """Go from start to a feasible goal, both (n, d), and stop at the first feasible point found."""
    reached = np.ones(len(start))
    waiting = np.arange(len(start))
    for t in np.arange(1, _GRID) / _GRID:
        points = _between(problem, start[waiting], goal[waiting], np.full(len(waiting), t))
        met = problem.feasible(points, limits[waiting])
        reached[waiting[met]] = t
        waiting = waiting[~met]
    over = reached - 1 / _GRID
    for _ in range(_HALVINGS):
        middle = (over + reached) / 2
        met = problem.feasible(_between(problem, start, goal, middle), limits)
        reached, over = np.where(met, middle, reached), np.where(met, over, middle)
    return _between(problem, start, goal, reached)


def _between(problem: Problem, start: IntArray, goal: IntArray, t: FloatArray) -> IntArray:
    """Point at t (n,) between start and goal; a dimension without an order jumps half-way."""
    steps = np.rint(t[:, None] * (goal - start)).astype(np.int64)
    return np.where(problem.ordered, start + steps, np.where(t[:, None] < 0.5, start, goal))


def _put_back(problem: Problem, moved: IntArray, home: IntArray, limits: FloatArray) -> IntArray:
    """Take entries of moved (n, d) back towards home (n, d) until any further single change breaks a limit."""
    moved = moved.copy()
    rows = np.arange(len(moved))
    while rows.size:
        _steps_back(problem, moved, home, limits, rows)
        rows = _jumps_back(problem, moved, home, limits, rows)
    return moved


def _steps_back(problem: Problem, moved: IntArray, home: IntArray, limits: FloatArray, rows: IntArray) -> None:
    """Take single steps in place, the entry furthest from home first, one for each row and round.

    An entry whose step broke a limit is not tried again, which is right for monotone costs; for the others
    `_jumps_back` looks again at everything.
    """
    position = counted(problem, moved[rows])
    if position is not None:
        moved[rows] = _counted_steps_back(problem, position, home[rows], limits[rows])
        return
    alive = np.zeros(moved.shape, dtype=np.bool_)
    alive[rows] = moved[rows] != home[rows]
    while alive.any():
        row, dim = np.nonzero(alive)
        gap = home[row, dim] - moved[row, dim]
        value = moved[row, dim] + np.sign(gap)
        met = _changed_feasible(problem, moved, row, dim, value, limits)
        alive[row[~met], dim[~met]] = False
        distance = np.abs(gap) / np.maximum(problem.sizes[dim] - 1, 1)
        chosen = _best_of_each_row(row, distance, met)
        moved[row[chosen], dim[chosen]] = value[chosen]
        alive &= moved != home


def _counted_steps_back(problem: Problem, position: Counted, home: IntArray, limits: FloatArray) -> IntArray:
    """Take the same steps, and after each look again only at those that it bears on; shape (n, d)."""
    moved = position.candidates
    room = position.room(limits)
    alive = moved != home
    change = np.zeros((*moved.shape, room.shape[1]))
    row, dim = np.nonzero(alive)
    while True:
        change[row, dim] = position.change(row, dim, moved[row, dim] + np.sign(home[row, dim] - moved[row, dim]))
        alive &= (change <= room[:, None]).all(axis=2)
        if not alive.any():
            return moved
        distance = np.where(alive, np.abs(home - moved) / np.maximum(problem.sizes - 1, 1), 0.0)
        row = np.flatnonzero(alive.any(axis=1))
        dim = distance[row].argmax(axis=1)
        room[row] -= change[row, dim]
        position.move(row, dim, moved[row, dim] + np.sign(home[row, dim] - moved[row, dim]))
        alive[row, dim] = moved[row, dim] != home[row, dim]
        row, dim = position.coupled(row, dim)
        row, dim = row[alive[row, dim]], dim[alive[row, dim]]


def _jumps_back(problem: Problem, moved: IntArray, home: IntArray, limits: FloatArray, rows: IntArray) -> IntArray:
    """Try every index between an entry and home; apply the longest change of each row and return those rows."""
    row, dim = np.nonzero(moved[rows] != home[rows])
    row = rows[row]
    gap = moved[row, dim] - home[row, dim]
    count = np.abs(gap)
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    row = np.repeat(row, count)
    dim = np.repeat(dim, count)
    sign = np.repeat(np.sign(gap), count)
    value = home[row, dim] + sign * offset
    met = _changed_feasible(problem, moved, row, dim, value, limits)
    length = np.abs(moved[row, dim] - value) / np.maximum(problem.sizes[dim] - 1, 1)
    chosen = _best_of_each_row(row, length, met)
    moved[row[chosen], dim[chosen]] = value[chosen]
    return row[chosen]


def _changed_feasible(
    problem: Problem, moved: IntArray, row: IntArray, dim: IntArray, value: IntArray, limits: FloatArray
) -> NDArray[np.bool_]:
    """Return whether each candidate ``moved[row]`` meets its limits with entry `dim` set to `value`; shape (m,)."""
    within = position_of(problem, moved).after(row, dim, value) <= limits[row]
    met: NDArray[np.bool_] = np.all(within, axis=1)
    return met


def _best_of_each_row(row: IntArray, priority: FloatArray, allowed: NDArray[np.bool_]) -> IntArray:
    """Positions of the allowed entry of highest priority in each row; ties go to the first, so that runs agree."""
    allowed_at = np.flatnonzero(allowed)
    order = allowed_at[np.lexsort((-priority[allowed_at], row[allowed_at]))]
    _, first = np.unique(row[order], return_index=True)
    best: IntArray = order[first]
    return best
