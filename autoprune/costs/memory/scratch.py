"""Scratch memory of an operation as a function of its sizes, found by running it.

Kernels allocate memory of their own: a convolution may unfold its input, or copy it and its weight into blocks of
channels. Its amount has no noise. Between the widths at which another kernel is chosen, it is a sum of products of
sizes and of sizes rounded up, to a block or to irregular steps, so a few runs determine it, and a few more check it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, combinations_with_replacement, product

import numpy as np

from autoprune.costs.operations.allocations import Allocation
from autoprune.costs.operations.parts import Family
from autoprune.protocols import FloatArray

log = logging.getLogger(__name__)

Values = tuple[int, ...]
Rounding = int | Values
"""Rounding up to the next multiple of a number, or to the next of these values, ascending."""

BLOCKS = (16, 8, 1, 4, 32, 64)
"""Numbers whose multiples sizes may be rounded up to: channels of one register, of one tile."""

_CHECKS = 4  # runs that a fit is judged on
_TOLERANCE = 0.01  # of all memory of the operation: a fit with a larger error is refined
_SMALL = 32  # a box of at most this number of sizes is measured as a whole
_MOST_RUNS = 160  # of one family
_MOST_STEPS = 16  # irregular steps of a variable: beyond, finding them takes too many runs
_MOST_BLOCKS = 2  # variables with separate roundings; more share one block, as there are too many combinations


@dataclass(frozen=True)
class Cell:
    """Sizes within which one formula holds.

    Attributes:
        low: Least value of each variable, length v.
        end: The value of each variable beyond the last, length v.
        blocks: Rounding of each variable, length v.
        coefficients: Of `_features`, for each moment that can be the peak, shape (moments, features).
    """

    low: Values
    end: Values
    blocks: tuple[Rounding, ...]
    coefficients: FloatArray


@dataclass(frozen=True)
class Scratch:
    """Scratch memory of a family of operations: bytes in addition to its arguments and results.

    Attributes:
        cells: Formulas; they share no sizes and leave none out.
        error: Largest error in runs that they are not fitted to, as a fraction of all that it allocates.
    """

    cells: tuple[Cell, ...]
    error: float

    def predict(self, values: FloatArray) -> FloatArray:
        """Bytes at values of the variables, shape (n, v) to (n,)."""
        lowest = np.min([cell.low for cell in self.cells], axis=0)
        highest = np.max([cell.end for cell in self.cells], axis=0) - 1
        inside = np.clip(values, lowest, highest)
        out = np.zeros(len(values))
        for cell in self.cells:
            rows = ((inside >= cell.low) & (inside < cell.end)).all(axis=1)
            if rows.any():
                out[rows] = (_features(inside[rows], cell.blocks) @ cell.coefficients.T).max(axis=1)
        bytes_: FloatArray = np.maximum(out, 0.0)
        return bytes_


def fit_scratch(family: Family, run: Callable[[Values], Allocation]) -> Scratch | None:
    """Find the scratch memory of a family at any sizes; None if it takes none.

    Args:
        family: Operations alike.
        run: Runs one at the given values of the variables.
    """
    fitter = _Fitter(family, run, np.random.default_rng(0))
    low, end = fitter.box()
    points = [*fitter.corners(low, end), *fitter.draws(low, end, 2)]
    if all(max(fitter.at(point).scratch, default=0) <= 0 for point in points):
        return None
    cells = fitter.cells()
    log.info("scratch of %s: %d formulas from %d runs", family.key, len(cells), len(fitter.known))
    return Scratch(tuple(cells), fitter.error)


@dataclass(frozen=True)
class _Box:
    """Sizes from `low` to before `end`, with the error of a formula there, or without one and with a place to split."""

    low: Values
    end: Values
    error: float
    split: tuple[int, int] | None
    cell: Cell | None


def _halves(box: _Box, axis: int, split: int) -> tuple[tuple[Values, Values], tuple[Values, Values]]:
    low, end = box.low, box.end
    return (low, (*end[:axis], split, *end[axis + 1 :])), ((*low[:axis], split, *low[axis + 1 :]), end)


class _Fitter:
    def __init__(self, family: Family, run: Callable[[Values], Allocation], rng: np.random.Generator) -> None:
        self.family = family
        self.run = run
        self.rng = rng
        self.known: dict[Values, Allocation] = {}
        self.error = 0.0
        self._stairs: list[Values] | None = None

    def box(self) -> tuple[Values, Values]:
        """Lowest value of each variable, and the first beyond the largest."""
        family = self.family
        low = tuple(max(least // step, 1) * step for least, step in zip(family.lowest, family.steps, strict=True))
        return low, tuple(most + step for most, step in zip(family.highest, family.steps, strict=True))

    def at(self, values: Values) -> Allocation:
        if values not in self.known:
            self.known[values] = self.run(values)
        return self.known[values]

    def corners(self, low: Values, end: Values) -> list[Values]:
        high = [value - step for value, step in zip(end, self.family.steps, strict=True)]
        return list(dict.fromkeys(product(*zip(low, high, strict=True))))

    def draws(self, low: Values, end: Values, n: int) -> list[Values]:
        steps = np.array(self.family.steps, dtype=np.int64)
        drawn = self.rng.integers(np.array(low) // steps, np.array(end) // steps, (n, len(low))) * steps
        return [tuple(row) for row in drawn.tolist()]

    def cells(self) -> list[Cell]:
        """Fit formulas for all sizes; the worst box is split first."""
        open_ = [self._judged(*self.box())]
        ended = []
        while open_:
            worst = max(open_, key=lambda box: box.error)
            open_.remove(worst)
            where = None if worst.error <= _TOLERANCE or self._spent() else self._split(worst)
            if where is None:
                ended.append(worst if worst.cell is not None else self._fitted(worst.low, worst.end))
            else:
                open_ += [self._judged(low, end) for low, end in _halves(worst, *where)]
        self.error = max(box.error for box in ended)
        return [box.cell for box in ended if box.cell is not None]

    def _judged(self, low: Values, end: Values) -> _Box:
        corners = self.corners(low, end)
        points = [*corners, *self._points(low, end)]
        if (other := self._unlike(points)) is not None:
            return _Box(low, end, np.inf, self._boundary(corners[0], other), None)
        return self._fitted(low, end)

    def _fitted(self, low: Values, end: Values) -> _Box:
        """Fit the formula with the least error in a box."""
        corners = self.corners(low, end)
        drawn = [point for point in self._points(low, end) if point not in corners]
        fitted = [*corners, *drawn[:-_CHECKS]]
        checks = drawn[-_CHECKS:]
        alike = len({self.at(point).pattern for point in (*fitted, *checks)}) == 1
        choices = self._choices()
        errors = [self._error(fitted, checks, blocks, alike) for blocks in choices]
        if min(errors) > _TOLERANCE and any(self.stairs()):
            choices = self._choices(stairs=True)
            errors = [self._error(fitted, checks, blocks, alike) for blocks in choices]
        blocks = choices[int(np.argmin(errors))]
        return _Box(low, end, min(errors), None, Cell(low, end, blocks, self._fit(fitted, blocks, alike)))

    def _points(self, low: Values, end: Values) -> list[Values]:
        """Points of a box to measure: all of it if it is small, else the known ones and enough others."""
        ranges = [range(a, e, step) for a, e, step in zip(low, end, self.family.steps, strict=True)]
        if math.prod(map(len, ranges)) <= _SMALL:
            return list(product(*ranges))
        inside = [point for point in self.known if all(v in own for v, own in zip(point, ranges, strict=True))]
        columns = (1 + 2 * len(low)) * (2 + 2 * len(low)) // 2  # of `_features`
        more = max(columns - len(inside), 0) + _CHECKS
        return list(dict.fromkeys([*inside, *self.draws(low, end, more)]))

    def _split(self, box: _Box) -> tuple[int, int] | None:
        return box.split or self._drop(self.corners(box.low, box.end)) or self._middle(box.low, box.end)

    def _choices(self, *, stairs: bool = False) -> list[tuple[Rounding, ...]]:
        """Ways to round each variable; with `stairs`, by steps where a variable has them."""
        v = len(self.family.steps)
        known = self.stairs() if stairs else [()] * v
        if v > _MOST_BLOCKS:
            return [tuple(own or block for own in known) for block in BLOCKS]
        ways: list[list[Rounding]] = [[own, *BLOCKS] if own else [*BLOCKS] for own in known]
        return list(product(*ways))

    def stairs(self) -> list[Values]:
        """Last values of the steps that each variable is rounded up to; empty for a variable without steps."""
        if self._stairs is None:
            low, end = self.box()
            self._stairs = [self._steps(low, end, axis) for axis in range(len(low))]
        return self._stairs

    def _steps(self, low: Values, end: Values, axis: int) -> Values:
        """Steps along one variable, with the others at their largest; equal ends of a range mean no step within."""
        top = tuple(value - step for value, step in zip(end, self.family.steps, strict=True))
        step = self.family.steps[axis]
        ends = [top[axis]]

        def taken(value: int) -> tuple[str, Values]:
            found = self.at((*top[:axis], value, *top[axis + 1 :]))
            return found.pattern, found.scratch

        if low[axis] == top[axis] or taken(top[axis]) != taken(top[axis] - step):
            return ()
        open_ = [(low[axis], top[axis])]
        while open_:
            a, b = open_.pop()
            if taken(a) == taken(b):
                continue
            if b - a > step:
                middle = (a + b) // 2 // step * step
                open_ += [(a, middle), (middle, b)]
            elif len(ends) == _MOST_STEPS or self._spent():
                return ()
            else:
                ends.append(a)
        return tuple(sorted(ends)) if len(ends) > 1 else ()

    def _drop(self, corners: Sequence[Values]) -> tuple[int, int] | None:
        """Variable, and its least value after a drop: less memory at a larger size means another kernel."""
        for a, b in combinations(corners, 2):  # in ascending order
            axes = [axis for axis in range(len(a)) if a[axis] != b[axis]]
            peak = self.at(a).peak
            if len(axes) == 1 and peak > self.at(b).peak:
                return axes[0], self._bisect(a, b, axes[0], partial(self._takes, peak))
        return None

    def _takes(self, peak: int, point: Values) -> bool:
        return self.at(point).peak >= peak

    def _middle(self, low: Values, end: Values) -> tuple[int, int] | None:
        """Variable of the widest range, as a ratio, and its geometric mean; None if it has one value."""
        ratios = [(e - step) / a for a, e, step in zip(low, end, self.family.steps, strict=True)]
        if max(ratios, default=1) == 1:
            return None
        axis = int(np.argmax(ratios))
        step = self.family.steps[axis]
        middle = int(np.sqrt(low[axis] * end[axis])) // step * step
        return axis, max(middle, low[axis] + step)

    def _spent(self) -> bool:
        return len(self.known) > _MOST_RUNS

    def _unlike(self, points: Sequence[Values]) -> Values | None:
        """First point where the operation allocates in another pattern than at the first point of all."""
        if self._spent():
            return None
        first = self.at(points[0]).pattern
        return next((point for point in points if self.at(point).pattern != first), None)

    def _boundary(self, a: Values, b: Values) -> tuple[int, int]:
        """Variable, and its least value after a change between two points that are unlike."""
        for axis in range(len(a)):
            moved = (*a[:axis], b[axis], *a[axis + 1 :])
            if self.at(moved).pattern != self.at(a).pattern:
                break
            a = moved
        a, b = sorted((a, (*a[:axis], b[axis], *a[axis + 1 :])))
        pattern = self.at(a).pattern
        return axis, self._bisect(a, b, axis, lambda point: self.at(point).pattern == pattern)

    def _bisect(self, a: Values, b: Values, axis: int, holds: Callable[[Values], bool]) -> int:
        """Least value of a variable between points `a` and `b` at which `holds` is no longer true."""
        low = a[axis]
        high = b[axis]
        step = self.family.steps[axis]
        while high - low > step:
            middle = (low + high) // 2 // step * step
            if holds((*a[:axis], middle, *a[axis + 1 :])):
                low = middle
            else:
                high = middle
        return high

    def _fit(self, points: Sequence[Values], blocks: tuple[Rounding, ...], alike: bool) -> FloatArray:
        """Coefficients for each moment that can be the peak, or of the peak alone where points are not `alike`."""
        features = self._features(points, blocks)
        scratch = [self.at(point).scratch for point in points]
        targets = np.array(scratch if alike else [[max(moments)] for moments in scratch], dtype=np.float64)
        scale = np.abs(features).max(axis=0)
        weight = 1 / self._peaks(points)[:, None]
        solved = np.linalg.lstsq(features / scale * weight, targets * weight, rcond=1e-10)[0]
        coefficients: FloatArray = (solved / scale[:, None]).T
        return coefficients

    def _error(
        self, fitted: Sequence[Values], checks: Sequence[Values], blocks: tuple[Rounding, ...], alike: bool
    ) -> float:
        """Largest error of a fit, as a fraction of the peak, on the fitted points and on the others."""
        judged = (*fitted, *checks)
        predicted = (self._features(judged, blocks) @ self._fit(fitted, blocks, alike).T).max(axis=1)
        measured = [max(self.at(point).scratch) for point in judged]
        return float(np.max(np.abs(predicted - measured) / self._peaks(judged)))

    def _peaks(self, points: Sequence[Values]) -> FloatArray:
        return np.array([max(self.at(point).peak, 1) for point in points], dtype=np.float64)

    def _features(self, points: Sequence[Values], blocks: tuple[Rounding, ...]) -> FloatArray:
        return _features(np.array(points, dtype=np.float64).reshape(len(points), len(self.family.steps)), blocks)


def _features(values: FloatArray, blocks: Sequence[Rounding]) -> FloatArray:
    """Products of up to two sizes, as they are and rounded up; (n, v) to (n, features)."""
    rounded = [_rounded(values[:, axis], block) for axis, block in enumerate(blocks)]
    sizes = np.column_stack([values, *rounded])
    pairs = combinations_with_replacement(range(sizes.shape[1]), 2)
    squares = [sizes[:, i] * sizes[:, j] for i, j in pairs]
    return np.column_stack([np.ones(len(values)), sizes, *squares])


def _rounded(values: FloatArray, block: Rounding) -> FloatArray:
    ends = np.array(block, dtype=np.float64)
    up: FloatArray = ends[np.searchsorted(ends, values)] if ends.ndim else np.ceil(values / ends) * ends
    return up
