"""Multiple-choice knapsack: one option for each dimension, least loss within a budget, for all budgets at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autoprune.errors import InfeasibleBudgetError
from autoprune.protocols import FloatArray, IntArray

Objective = Literal["sum", "minimax"]

_FUZZ = 1e-9  # of a bin: rounding error of a division that gives a whole number of bins


def choose_options(
    losses: Sequence[ArrayLike],
    costs: Sequence[ArrayLike],
    budgets: ArrayLike,
    objective: Objective = "sum",
    bins: int = 10_000,
) -> IntArray:
    """Choose one option of each dimension, with the least loss within each of many budgets.

    ``"sum"`` minimises the sum of the losses by dynamic programming over costs in `bins` equal steps between the
    cheapest choice and the largest budget: O(d k bins) time for all budgets together, d bins bytes of memory. Costs
    are rounded up, so no answer exceeds its budget, and each is at least as good as the exact optimum of a budget
    smaller by d bins. Where costs are whole numbers whose greatest common divisor takes no more than `bins` steps, it
    is the exact optimum. Among equal losses the cheaper option wins.

    ``"minimax"`` minimises the largest loss, exactly, and among those choices the cost: every dimension takes the
    cheapest option whose loss is within the largest. The rest of the budget stays unspent, because the least sum as
    second objective would need one table for each largest loss.

    Args:
        losses: Loss of each option, lower is better, finite; d arrays of any positive lengths.
        costs: Cost of each option in the unit of `budgets`, finite, of the same shapes; need not fall along the
            options, and may be negative where they are differences.
        budgets: The largest total cost allowed, shape (n,).
        objective: ``"sum"`` or ``"minimax"``.
        bins: Resolution of costs; unused by ``"minimax"``.

    Returns:
        The option chosen in each dimension for each budget, int64, shape (n, d).

    Raises:
        InfeasibleBudgetError: If a budget is below the cost of the cheapest options.
        ValueError: If an argument has the wrong shape or is out of range.

    Example:
        >>> choose_options([[0.0, 3.0], [0.0, 1.0, 1.5]], [[2, 1], [3, 2, 1]], budgets=[5, 3, 2])
        array([[0, 0],
               [0, 2],
               [1, 2]])

    Reference:
        Frantar and Alistarh, "SPDY: Accurate Pruning with Speedup Guarantees", ICML 2022, arXiv:2201.13096,
        Algorithm 1; here one table answers every budget.
    """
    loss, cost, limits = _checked(losses, costs, budgets, objective, bins)
    cheapest = np.array([np.lexsort((a, c))[0] for a, c in zip(loss, cost, strict=True)])[None]
    least = total(cost, cheapest)[0]
    if limits.size and limits.min() < least:
        raise InfeasibleBudgetError(
            f"budgets must be at least {least:.6g}, the cost of the cheapest option of every dimension, "
            f"got {limits.min():.6g}"
        )
    if not limits.size:
        return np.zeros((0, len(loss)), dtype=np.int64)
    return _least_sum(loss, cost, limits, least, bins) if objective == "sum" else _least_maximum(loss, cost, limits)


def total(tables: Sequence[FloatArray], options: IntArray) -> FloatArray:
    """Sum the entries of tables for options (n, d) over the dimensions, shape (n,)."""
    summed = np.zeros(len(options))
    for table, chosen in zip(tables, options.T, strict=True):
        summed += table[chosen]
    return summed


def _checked(
    losses: Sequence[ArrayLike], costs: Sequence[ArrayLike], budgets: ArrayLike, objective: str, bins: int
) -> tuple[list[FloatArray], list[FloatArray], FloatArray]:
    loss = [np.asarray(row, dtype=np.float64) for row in losses]
    cost = [np.asarray(row, dtype=np.float64) for row in costs]
    limits = np.asarray(budgets, dtype=np.float64)
    shapes = [row.shape for row in loss]
    if not loss or shapes != [row.shape for row in cost] or any(len(s) != 1 or s[0] < 1 for s in shapes):
        raise ValueError(
            f"losses and costs must be arrays of the same positive lengths, one for each dimension, got {shapes} and "
            f"{[row.shape for row in cost]}"
        )
    if not all(np.isfinite(row).all() for row in (*loss, *cost)):
        raise ValueError("losses and costs must be finite; leave out options that are impossible")
    if limits.ndim != 1 or np.isnan(limits).any():
        raise ValueError(f"budgets must be numbers of shape (n,), got {budgets!r}")
    if objective not in ("sum", "minimax"):
        raise ValueError(f"objective must be 'sum' or 'minimax', got {objective!r}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    return loss, cost, limits


def _least_sum(
    losses: list[FloatArray], costs: list[FloatArray], limits: FloatArray, least: float, bins: int
) -> IntArray:
    above = [row - row.min() for row in costs]  # the cheapest options cost nothing, so that every bin has an answer
    span = min(limits.max() - least, sum(row.max() for row in above))
    unit = _unit(np.concatenate(above), span, bins)
    steps = [np.maximum(np.ceil(row / unit - _FUZZ), row > 0).astype(np.int64) for row in above]
    last = int(span / unit + _FUZZ)
    back = _fill_table(losses, steps, last)
    at = np.minimum(np.floor((limits - least) / unit + _FUZZ), last).astype(np.int64)
    chosen = _trace_back(back, steps, at)
    while (over := total(costs, chosen) > limits).any():  # by rounding errors of the sum only
        at[over] -= 1
        chosen[over] = _trace_back(back, steps, at[over])
    return chosen


def _unit(above: FloatArray, span: float, bins: int) -> float:
    """Size of a bin: exact for whole numbers where `bins` suffice."""
    if span <= 0:
        return 1.0
    if (above == np.rint(above)).all() and above.max() < 2**53:
        divisor = float(np.gcd.reduce(above.astype(np.int64)))
        if span <= divisor * bins:
            return divisor
    return span / bins


def _fill_table(losses: list[FloatArray], steps: list[IntArray], last: int) -> NDArray[np.signedinteger]:
    """Option of each dimension in the best choice for each number of bins up to `last`, shape (d, last + 1)."""
    most = max(len(row) for row in losses)
    back = np.empty((len(losses), last + 1), dtype=np.min_scalar_type(-most))
    value, spare = np.zeros(last + 1), np.empty(last + 1)
    for pointer, loss, step in zip(back, losses, steps, strict=True):
        order = np.lexsort((loss, step))
        useful = _falling(loss, order)
        pointer.fill(useful[0])
        best = value + loss[useful[0]]
        for option in useful[1:]:
            shift = int(step[option])
            if shift > last:
                break
            offer = np.add(value[: last + 1 - shift], loss[option], out=spare[: last + 1 - shift])
            np.copyto(pointer[shift:], option, where=offer < best[shift:], casting="unsafe")
            np.minimum(best[shift:], offer, out=best[shift:])
        value = best
    return back


def _trace_back(back: NDArray[np.signedinteger], steps: list[IntArray], at: IntArray) -> IntArray:
    """Follow the table from the bins `at` (n,) of the last dimension; shape (n, d)."""
    left = at.copy()
    chosen = np.empty((len(steps), len(at)), dtype=np.int64)
    for j in range(len(steps) - 1, -1, -1):
        chosen[j] = back[j, left]
        left -= steps[j][chosen[j]]
    return chosen.T


def _least_maximum(losses: list[FloatArray], costs: list[FloatArray], limits: FloatArray) -> IntArray:
    """Find the smallest largest loss whose cost meets the budget: the cost only falls as the loss allowed grows."""
    records = [_cheaper_and_cheaper(loss, cost) for loss, cost in zip(losses, costs, strict=True)]
    at = np.concatenate([loss[kept] for kept, loss in zip(records, losses, strict=True)])
    change = np.concatenate([np.diff(cost[kept], prepend=0.0) for kept, cost in zip(records, costs, strict=True)])
    order = np.argsort(at, kind="stable")
    needed = np.cumsum(change[order])
    thresholds, first = np.unique(at[order], return_index=True)
    needed = needed[np.r_[first[1:], len(order)] - 1]
    reached = thresholds >= max(row.min() for row in losses)  # below, some dimension has no option at all
    thresholds, needed = thresholds[reached], needed[reached]

    slack = 1e-12 * np.abs(change).sum()
    level = np.searchsorted(-needed, -(limits + slack))
    while True:
        level = np.minimum(level, len(thresholds) - 1)
        columns = [
            kept[np.searchsorted(loss[kept], thresholds[level], side="right") - 1]
            for kept, loss in zip(records, losses, strict=True)
        ]
        chosen = np.array(columns, dtype=np.int64).T
        over = total(costs, chosen) > limits
        if not over.any():
            return chosen
        level = level + over  # by rounding errors of the sum only


def _cheaper_and_cheaper(loss: FloatArray, cost: FloatArray) -> IntArray:
    """Options by rising loss, each cheaper than all before it."""
    return _falling(cost, np.lexsort((cost, loss)))


def _falling(values: FloatArray, order: IntArray) -> IntArray:
    """Positions in an order whose value is below all before; the first one always is."""
    ranked = values[order]
    kept = np.ones(len(order), dtype=np.bool_)
    kept[1:] = ranked[1:] < np.minimum.accumulate(ranked)[:-1]
    return order[kept]
