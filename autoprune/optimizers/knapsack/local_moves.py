"""Single changes and exchanges that lower a table's loss, each checked under the true cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from autoprune.costs.changes import Counted
from autoprune.optimizers.knapsack.multiple_choice import Objective
from autoprune.optimizers.position import adding_up, counted
from autoprune.optimizers.problem import Problem
from autoprune.protocols import FloatArray, IntArray

_ENTRIES_AT_ONCE = 2**18  # of one cost call: bounds its memory to a few megabytes, which also stay in the cache
_FEWEST_GAIN = 1e-12  # relative to the largest loss: less is rounding
_EXCHANGES = 64  # pairs of each candidate that are priced under the true cost, the most promising first
_PARTNERS = 128  # raises and lowerings of each candidate that pairs are made of
_ROUNDS = 8
_POWER = 4
_DIMS_PER_STEP = 32  # every 32 dimensions allow one more lowering by the same prices, which are slow to compute


@final
class Moves:
    """Moves: every option of every dimension, M in all, as a single change of any candidate.

    Args:
        problem: The space and its true costs.
        losses: Loss of each option, d arrays of shape (sizes[j],).
        objective: Combination of the losses of a candidate: their sum, or the largest.

    Attributes:
        dims: The dimension of each move, shape (M,).
        options: Its option there, shape (M,).
    """

    def __init__(self, problem: Problem, losses: Sequence[FloatArray], objective: Objective) -> None:
        sizes = problem.sizes
        self._problem = problem
        self._minimax = objective == "minimax"
        self._starts: IntArray = np.cumsum(sizes) - sizes
        self.dims: IntArray = np.repeat(np.arange(len(sizes)), sizes)
        self.options: IntArray = np.arange(sizes.sum()) - self._starts[self.dims]
        self._raw: FloatArray = np.concatenate(list(losses))
        largest = np.abs(self._raw).max() or 1.0
        # A sum of high powers is nearly the maximum, and tells moves apart that leave the maximum as it is.
        self._losses = np.sign(self._raw) * np.abs(self._raw / largest) ** _POWER if self._minimax else self._raw
        self._tiny = _FEWEST_GAIN * np.abs(self._losses).max()

    def split(self, values: FloatArray) -> list[FloatArray]:
        """Cut values of all moves, shape (M,), into one array for each dimension."""
        return np.split(values, self._starts[1:])

    def loss(self, candidates: IntArray) -> FloatArray:
        """Return the objective of canonical candidates (n, d), shape (n,): the sum of losses, or the largest."""
        chosen = self._raw[self._starts + candidates]
        best: FloatArray = chosen.max(axis=1) if self._minimax else chosen.sum(axis=1)
        return best

    def after(self, candidates: IntArray) -> tuple[FloatArray, FloatArray]:
        """True costs (n, M, c) and steering losses (n, M) of candidates (n, d) after each single move."""
        n = len(candidates)
        m = len(self.dims)
        costs, losses = self._after(candidates, np.repeat(np.arange(n), m), np.tile(np.arange(m), n))
        return costs.reshape(n, m, -1), losses.reshape(n, m)

    def idle(self, values: FloatArray) -> NDArray[np.bool_]:
        """Dimensions in which no move changes any of values (n, M, ...), shape (n, d): those made irrelevant."""
        flat = values.reshape(*values.shape[:2], -1)
        changed = (flat != flat[:, self._starts[self.dims]]).any(axis=2)
        return ~np.logical_or.reduceat(changed, self._starts, axis=1)

    def settle(self, candidates: IntArray, limits: FloatArray) -> IntArray:
        """Lower candidates (n, d) until they meet limits (n, c), then raise what can be raised; shape (n, d)."""
        return self.fill(self._lower(np.array(self._problem.canonical(candidates)), limits), limits)

    def fill(self, candidates: IntArray, limits: FloatArray) -> IntArray:
        """Raise options of feasible candidates, the most rewarding first, until none can be raised within the limits.

        To raise is to take any lower index of an ordered dimension, whatever the table says of it, or an option of
        lower loss of one without an order.
        """
        position = adding_up(self._problem, candidates)
        if position is not None:
            return self._fill_counted(position, limits)
        filled = candidates.copy()
        rows = np.arange(len(candidates))
        for _ in range(2 * len(self.dims)):
            ordered = self._problem.ordered[self.dims]
            # Without an order every other option is a move; along an order only those towards dense are.
            row, move = np.nonzero(~ordered | (self.options < filled[rows][:, self.dims]))
            costs, losses = self._after(filled[rows], row, move)
            gain = self._steer(filled[rows])[row] - losses
            # Towards dense no gain is required: losses are noisy, and unused budget is wasted.
            met = (costs <= limits[rows[row]]).all(axis=1) & (ordered[move] | (gain > self._tiny))
            priority = np.full((len(rows), len(self.dims)), -np.inf)
            priority[row[met], move[met]] = gain[met]
            best = priority.argmax(axis=1)
            raised = np.isfinite(priority.max(axis=1))
            # A candidate without a move stays without one, so later rounds leave it out.
            rows, best = rows[raised], best[raised]
            if not rows.size:
                break
            filled[rows, self.dims[best]] = self.options[best]
            filled[rows] = self._problem.canonical(filled[rows])
        return filled

    def _fill_counted(self, position: Counted, limits: FloatArray) -> IntArray:
        """Fill as `fill` does; after each move, update only the moves that depend on it."""
        filled = position.candidates
        room = position.room(limits)
        for i in range(len(filled)):
            row = np.full(len(self.dims), i)
            left = room[i]
            gain = self._gains(filled[i], self.dims, self.options)
            change = position.change(row, self.dims, self.options)
            for _ in range(2 * len(self.dims)):
                priority = np.where((change <= left).all(axis=1), gain, -np.inf)
                best = int(priority.argmax())
                if priority[best] == -np.inf:
                    break
                left -= change[best]
                dim = self.dims[best : best + 1]
                position.move(row[:1], dim, self.options[best : best + 1])
                _, dims = position.coupled(row[:1], dim)
                moves = self._moves_of(dims)
                change[moves] = position.change(row[: len(moves)], self.dims[moves], self.options[moves])
                own = self._moves_of(dim)
                gain[own] = self._gains(filled[i], self.dims[own], self.options[own])
        return filled

    def _gains(self, candidate: IntArray, dims: IntArray, options: IntArray) -> FloatArray:
        """Gain in loss of moves of a candidate (d,); minus infinity for those that `fill` does not make."""
        now = candidate[dims]
        gain = self._losses[self._starts[dims] + now] - self._losses[self._starts[dims] + options]
        allowed = np.where(self._problem.ordered[dims], options < now, gain > self._tiny)
        return np.where(allowed, gain, -np.inf)

    def _moves_of(self, dims: IntArray) -> IntArray:
        """Positions of all moves in some dimensions."""
        count = self._problem.sizes[dims]
        moves: IntArray = np.arange(count.sum()) + np.repeat(self._starts[dims] - (np.cumsum(count) - count), count)
        return moves

    def exchange(self, candidates: IntArray, limits: FloatArray) -> IntArray:
        """Raise one dimension and lower another where that lowers the loss within the limits; then fill.

        It prices the pairs with the largest gain among those that nearly fit if the two changes of cost are added; in
        products of sizes, raising one factor and lowering another costs less than that.
        """
        best = candidates.copy()
        rows = np.arange(len(best))
        for _ in range(_ROUNDS):
            if not rows.size:
                break
            swapped = self.fill(self._swap(best[rows], limits[rows]), limits[rows])
            better = self._steer(swapped) < self._steer(best[rows]) - self._tiny
            better &= self.loss(swapped) <= self.loss(best[rows])  # powers only stand in for the largest loss
            best[rows[better]] = swapped[better]
            rows = rows[better]
        return best

    def _steer(self, canonical: IntArray) -> FloatArray:
        """Sum of (powers of) losses that single moves are compared by, shape (n,)."""
        summed: FloatArray = self._losses[self._starts + canonical].sum(axis=1)
        return summed

    def _after(self, candidates: IntArray, row: IntArray, move: IntArray) -> tuple[FloatArray, FloatArray]:
        """True costs (k, c) and steering losses (k,) of canonical candidates ``row[i]`` after moves ``move[i]``."""
        position = counted(self._problem, candidates)
        if position is not None:
            dims, options = self.dims[move], self.options[move]
            now = self._losses[self._starts[dims] + candidates[row, dims]]
            steered = self._steer(candidates)[row] + (self._losses[move] - now) * position.left[row, dims]
            whole = np.flatnonzero(position.drops(dims))  # these make other entries irrelevant, or relevant again
            if whole.size:
                changed = candidates[row[whole]]
                changed[np.arange(len(whole)), dims[whole]] = options[whole]
                steered[whole] = self._steer(self._problem.canonical(changed))
            return position.after(row, dims, options), steered
        costs = np.empty((len(row), len(self._problem.limits)))
        losses = np.empty(len(row))
        chunk = max(1, _ENTRIES_AT_ONCE // candidates.shape[1])
        for start in range(0, len(row), chunk):
            part = slice(start, start + chunk)
            changed = candidates[row[part]]
            changed[np.arange(len(changed)), self.dims[move[part]]] = self.options[move[part]]
            changed = self._problem.canonical(changed)
            costs[part], losses[part] = self._problem.cost_function(changed), self._steer(changed)
        return costs, losses

    def _lower(self, candidates: IntArray, limits: FloatArray) -> IntArray:
        """Repeat the move with the least loss per unit of excess removed, until the limits are met; shape (n, d)."""
        lowered = candidates
        rows = np.flatnonzero(~self._problem.feasible(lowered, limits))
        for _ in range(4 * candidates.shape[1]):
            if not rows.size:
                break
            excess = _excess(self._problem.costs(lowered[rows]), limits[rows])
            costs, losses = self.after(lowered[rows])
            removed = excess[:, None] - _excess(costs, limits[rows][:, None])
            harm = losses - self._steer(lowered[rows])[:, None]
            helps = removed > 1e-12 * excess[:, None]
            price = np.where(helps, harm / np.where(helps, removed, 1.0), np.inf)
            helped = helps.any(axis=1)
            lowered[rows[~helped]] = self._problem.repair(lowered[rows[~helped]], limits[rows[~helped]])
            rows, price = rows[helped], price[helped]
            for _ in range(1 + candidates.shape[1] // _DIMS_PER_STEP):
                best = price.argmin(axis=1)
                helped = np.isfinite(price.min(axis=1))
                moved, best = rows[helped], best[helped]
                lowered[moved, self.dims[best]] = self.options[best]
                lowered[moved] = self._problem.canonical(lowered[moved])
                price[helped] = np.where(self.dims == self.dims[best][:, None], np.inf, price[helped])
                over = ~self._problem.feasible(lowered[rows], limits[rows])
                rows, price = rows[over], price[over]
                if not rows.size:
                    break
        if rows.size:
            lowered[rows] = self._problem.repair(lowered[rows], limits[rows])
        return lowered

    def _swap(self, candidates: IntArray, limits: FloatArray) -> IntArray:
        """Find the best exchange of each candidate, or return the candidate itself; shape (n, d)."""
        cost = self._problem.costs(candidates)
        costs, losses = self.after(candidates)
        change = (costs - cost[:, None]) / limits[:, None]
        slack = 1 - cost / limits
        gain = self._steer(candidates)[:, None] - losses
        swapped = candidates.copy()
        for i in range(len(candidates)):
            up, down = self._pairs(gain[i], change[i], slack[i])
            trials = np.repeat(candidates[i : i + 1], len(up) + 1, axis=0)
            trials[np.arange(len(up)), self.dims[up]] = self.options[up]
            trials[np.arange(len(up)), self.dims[down]] = self.options[down]
            trials = self._problem.canonical(trials)
            met = self._problem.feasible(trials, limits[i])
            swapped[i] = trials[np.where(met, self._steer(trials), np.inf).argmin()]
        return swapped

    def _pairs(self, gain: FloatArray, change: FloatArray, slack: FloatArray) -> tuple[IntArray, IntArray]:
        """Choose at most `_EXCHANGES` pairs of a move to raise and one to lower."""
        ups = np.flatnonzero(gain > self._tiny)
        downs = np.flatnonzero((gain <= 0) & (change < 0).any(axis=1))
        ups = ups[np.argsort(-gain[ups], kind="stable")[:_PARTNERS]]
        downs = downs[np.argsort(-gain[downs], kind="stable")[:_PARTNERS]]
        net = gain[ups][:, None] + gain[downs]
        over = (change[ups][:, None] + change[downs] - slack).max(axis=2)
        product = (np.abs(change[ups][:, None]) * np.abs(change[downs])).max(axis=2) ** 0.5 / 4
        useful = (net > self._tiny) & (over <= product) & (self.dims[ups][:, None] != self.dims[downs])
        a, b = np.nonzero(useful)
        first = np.argsort(-net[a, b], kind="stable")[:_EXCHANGES]
        return ups[a[first]], downs[b[first]]


def _excess(costs: FloatArray, limits: FloatArray) -> FloatArray:
    """Excess of costs (..., c) over limits, relative to each and summed, shape (...)."""
    over: NDArray[np.float64] = np.maximum(costs / limits - 1, 0.0).sum(axis=-1)
    return over
