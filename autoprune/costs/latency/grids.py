"""Time families of operations on a grid of sizes that is denser near steps in their time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
import torch
from numpy.typing import NDArray

from autoprune.costs.latency.tables import Table
from autoprune.costs.latency.timing import Call, Clock, Effort, Over, Repeated, TimeOverError, Timing, compare, never
from autoprune.costs.operations.parts import Family
from autoprune.protocols import FloatArray

log = logging.getLogger(__name__)

Values = tuple[int, ...]
Points = dict[Values, tuple[float, float, float]]
"""Milliseconds at values of the variables, with the 95 % interval."""

_FIRST = 5  # points of an axis before steps are looked for
_MOST_POINTS = {1: 65, 2: 17, 3: 7}  # of an axis, by the number of variables; later axes may take unused points
_TOLERANCE = 0.04  # a point further from the line between its neighbours, as a fraction of it, is a step
_SHARE = 0.003  # families that take a smaller part of the dense network keep the first points
_OPERATIONS = Effort(rounds=6, most_rounds=18, tolerance=0.03, block_seconds=5e-4, most_seconds=0.3)
_AT_ONCE = 24  # calls whose tensors exist at once


@dataclass
class Bench:
    """Measures points and remembers them.

    Attributes:
        clock: Takes the time.
        reference: Call of constant cost that all operations are compared with, so that a drifting machine cancels out.
        reference_ms: Its time at the machine's usual speed; that of the first comparison if not given.
        known: Points of each family measured so far, by its key.
        save: Called after each batch of measurements, so that an interrupted run can continue.
        timings: Everything timed by this object.
        over: Whether time is over, so that nothing more is measured.
    """

    clock: Clock
    reference: Call
    reference_ms: float = 0.0
    known: dict[str, Points] = field(default_factory=dict)
    save: Callable[[], None] = lambda: None
    timings: list[Timing] = field(default_factory=list)
    over: Over = never

    def measure(self, family: Family, values: Sequence[Values]) -> None:
        """Time a family at values that are not known yet.

        Raises:
            TimeOverError: If time was over before; the measurements until then are saved.
        """
        known = self.known.setdefault(family.key, {})
        missing = [point for point in dict.fromkeys(values) if point not in known]
        assert not missing or family.make is not None
        try:
            for start in range(0, len(missing), _AT_ONCE):
                some = missing[start : start + _AT_ONCE]
                calls = [family.make(point) for point in some]  # type: ignore[misc]  # asserted above
                timings = self.compare(calls, _OPERATIONS)
                for point, call, timing in zip(some, calls, timings, strict=True):
                    unit = self.reference_ms / (call.times if isinstance(call, Repeated) else 1)
                    known[point] = (timing.ratio * unit, timing.low * unit, timing.high * unit)
        except TimeOverError:
            self.save()
            raise
        if missing:
            self.save()

    def compare(self, calls: Sequence[Call], effort: Effort) -> list[Timing]:
        """Time calls against the reference."""
        with torch.inference_mode():
            timings = compare(calls, self.reference, self.clock, effort, seed=len(self.timings), over=self.over)
        self.reference_ms = self.reference_ms or timings[0].ms / timings[0].ratio
        self.timings += timings
        return timings


def measure_tables(families: Sequence[Family], bench: Bench) -> list[Table]:
    """Time every family on its grid."""
    runnable = []
    for family in families:
        try:
            bench.measure(family, family.dense)
        except OSError:  # of the file of measurements, or because time is over
            raise
        except Exception as error:  # an operation may need arguments that random tensors are not
            log.warning("left out of the latency model, because it cannot be run alone (%s): %s", error, family.key)
            continue
        runnable.append(family)
    dense = {family.key: sum(bench.known[family.key][values][0] for values in family.dense) for family in runnable}
    total = sum(dense.values())
    tables = []
    for i, family in enumerate(runnable):
        refine = dense[family.key] > _SHARE * total
        axes: tuple[Values, ...] = ()
        v = len(family.lowest)
        most = _MOST_POINTS.get(v, 4)
        for a in range(v):
            taken = int(np.prod([len(axis) for axis in axes], dtype=np.int64))
            axes += (_axis(family, a, bench, refine, most ** (a + 1) // taken),)
        needed = _reached(family, axes)
        bench.measure(family, [point for point, need in zip(product(*axes), needed.flat, strict=True) if need])
        known = bench.known[family.key]
        grid = np.array([known.get(point, (np.nan,) * 3) for point in product(*axes)])
        ms, low, high = (_filled(values) for values in grid.T.reshape(3, *map(len, axes)))
        tables.append(Table(family.key, family.kind, axes, ms, low, high, family.aligned))
        log.info("latency of parts: %d of %d families measured", i + 1, len(runnable))
    return tables


def _reached(family: Family, axes: Sequence[Values]) -> NDArray[np.bool_]:
    """Points of a grid around sizes that some operation can have: none is larger than the dense one.

    One family may hold convolutions of 16 to 96, 96 to 24 and 24 to 144 channels, but none of 144 to 144.
    """
    needed: NDArray[np.bool_] = np.zeros([len(axis) for axis in axes], dtype=np.bool_)
    for dense in set(family.dense):
        own = [_up_to(axis, most, family.aligned) for axis, most in zip(axes, dense, strict=True)]
        needed[np.ix_(*own)] = True
    return needed


def _up_to(axis: Values, most: int, aligned: int) -> NDArray[np.bool_]:
    """Points of an axis below a value, and the next one of each kind, aligned or not."""
    found = np.zeros(len(axis), dtype=np.bool_)
    for kind in (True, False):
        own = [i for i, value in enumerate(axis) if (value % aligned == 0) == kind]
        found[own[: 1 + sum(axis[i] < most for i in own)]] = True
    return found


def _filled(grid: FloatArray) -> FloatArray:
    """Fill the gaps of a grid by extrapolation from their neighbours; no operation has sizes there."""
    for point in np.argwhere(np.isnan(grid)):  # in an order in which the points before each one are known
        a, b = np.flatnonzero(point)[:2]
        one, other, both = point.copy(), point.copy(), point.copy()
        one[a] -= 1
        other[b] -= 1
        both[[a, b]] -= 1
        grid[tuple(point)] = grid[tuple(one)] * grid[tuple(other)] / grid[tuple(both)]
    return grid


def _axis(family: Family, a: int, bench: Bench, refine: bool, most: int) -> Values:
    """Choose at most `most` values of one variable, aligned ones first."""
    step = family.steps[a]
    lowest = max(family.lowest[a] // step, 1) * step
    highest = family.highest[a]
    values = sorted({*range(lowest, highest, step), highest})
    aligned = [value for value in values if value % family.aligned == 0]
    others = [value for value in values if value % family.aligned]
    points: Values = ()
    for i, own in enumerate(filter(None, (aligned, others))):
        points += _points(family, a, own, bench, refine, most - (len(points) if i else _FIRST * bool(others)))
    return tuple(sorted(points))


def _widest(family: Family, a: int) -> Values:
    """Dense operation with the largest value of one variable; of several, the one with the largest others."""
    return max(family.dense, key=lambda values: (values[a], math.prod(values)))


def _points(family: Family, a: int, values: Sequence[int], bench: Bench, refine: bool, most: int) -> Values:
    """Choose at most `most` of some values: evenly spread, then halving intervals whose middle is off the line.

    The other variables are those of the dense operation with the largest value of this one; these values become points
    of their axes.
    """
    even = np.linspace(max(values[-1] / 16, values[0]), values[-1], _FIRST)
    nearest = {int(np.abs(np.subtract(values, x)).argmin()) for x in even}
    crossing = {_widest(family, other)[a] for other in range(len(family.lowest))}
    points = sorted({0, len(values) - 1, *nearest, *(i for i, value in enumerate(values) if value in crossing)})
    widest = _widest(family, a)

    def at(i: int) -> Values:
        return (*widest[:a], values[i], *widest[a + 1 :])

    def ms(i: int) -> float:
        return bench.known[family.key][at(i)][0]

    bench.measure(family, [at(i) for i in points])
    open_gaps = list(pairwise(points)) if refine else []
    while open_gaps and len(points) < most:
        middles = {(p, q): (p + q) // 2 for p, q in open_gaps if q - p > 1}
        bench.measure(family, [at(m) for m in middles.values()])
        off = []
        for (p, q), m in middles.items():
            line = ms(p) + (ms(q) - ms(p)) * (values[m] - values[p]) / (values[q] - values[p])
            value, low, high = bench.known[family.key][at(m)]
            deviation = abs(value - line) / line
            if deviation > _TOLERANCE + (high - low) / 2 / value:
                off.append((deviation, p, m, q))
        off.sort(reverse=True)  # the largest steps come first where not all fit
        open_gaps = []
        for _, p, m, q in off[: most - len(points)]:
            points.append(m)
            open_gaps += [(p, m), (m, q)]
        points.sort()
    return tuple(values[i] for i in points)
