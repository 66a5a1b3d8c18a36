"""Time families of operations at a grid of sizes that is denser where their time has a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
import torch

from autoprune.costs.parts import Family
from autoprune.costs.tables import Table
from autoprune.costs.timing import Call, Clock, Repeated, Timing, compare

log = logging.getLogger(__name__)

Values = tuple[int, ...]
Points = dict[Values, tuple[float, float, float]]
"""Milliseconds at values of the variables, with the 95 % interval."""

_FIRST = 5  # points of an axis before steps are looked for
_MOST_POINTS = {1: 65, 2: 17, 3: 7}  # of an axis, by the number of variables; what one leaves, later ones may take
_TOLERANCE = 0.04  # a point further from the line between its neighbours, as a fraction of it, is a step
_SHARE = 0.003  # families that take a smaller part of the dense network keep the first points
_AT_ONCE = 24  # calls whose tensors exist at once


@dataclass
class Bench:
    """Measures points and remembers them.

    Attributes:
        clock: Takes the time.
        reference: What all operations are compared with: of constant cost, so that a drifting machine cancels out.
        reference_ms: What it takes at the machine's usual speed; that of the first comparison if not given.
        known: Points of each family measured so far, by its key.
        save: Called after each batch of measurements, so that an interrupted run can go on.
        timings: Everything timed by this object.
    """

    clock: Clock
    reference: Call
    reference_ms: float = 0.0
    known: dict[str, Points] = field(default_factory=dict)
    save: Callable[[], None] = lambda: None
    timings: list[Timing] = field(default_factory=list)

    def measure(self, family: Family, values: Sequence[Values]) -> None:
        """Time a family at values that are not known yet."""
        known = self.known.setdefault(family.key, {})
        missing = [point for point in dict.fromkeys(values) if point not in known]
        assert not missing or family.make is not None
        for start in range(0, len(missing), _AT_ONCE):
            some = missing[start : start + _AT_ONCE]
            calls = [family.make(point) for point in some]  # type: ignore[misc]  # asserted above
            timings = self.compare(calls, tolerance=0.03, block_seconds=5e-4)
            for point, call, timing in zip(some, calls, timings, strict=True):
                unit = self.reference_ms / (call.times if isinstance(call, Repeated) else 1)
                known[point] = (timing.ratio * unit, timing.low * unit, timing.high * unit)
        if missing:
            self.save()

    def compare(self, calls: Sequence[Call], tolerance: float, block_seconds: float) -> list[Timing]:
        """Time calls against the reference."""
        with torch.inference_mode():
            timings = compare(
                calls,
                self.reference,
                self.clock,
                rounds=6,
                most_rounds=18,
                tolerance=tolerance,
                block_seconds=block_seconds,
                most_seconds=0.3,
                seed=len(self.timings),
            )
        self.reference_ms = self.reference_ms or timings[0].ms / timings[0].ratio
        self.timings += timings
        return timings


def measure_tables(families: Sequence[Family], counts: Sequence[int], bench: Bench) -> list[Table]:
    """Time every family on its grid; `counts` says how often each occurs in the dense network."""
    runnable = []
    for family, count in zip(families, counts, strict=True):
        try:
            bench.measure(family, [family.highest])
        except OSError:  # of the file that keeps what is measured
            raise
        except Exception as error:  # an operation may need arguments that random tensors are not
            log.warning("left out of the latency model, because it cannot be run alone (%s): %s", error, family.key)
            continue
        runnable.append((family, count))
    dense = {family.key: count * bench.known[family.key][family.highest][0] for family, count in runnable}
    total = sum(dense.values())
    tables = []
    for i, (family, _) in enumerate(runnable):
        refine = dense[family.key] > _SHARE * total
        axes: tuple[Values, ...] = ()
        v, most = len(family.highest), _MOST_POINTS.get(len(family.highest), 4)
        for a in range(v):
            taken = int(np.prod([len(axis) for axis in axes], dtype=np.int64))
            axes += (_axis(family, a, bench, refine, most ** (a + 1) // taken),)
        bench.measure(family, list(product(*axes)))
        grid = np.array([bench.known[family.key][point] for point in product(*axes)])
        ms, low, high = grid.T.reshape(3, *map(len, axes))
        tables.append(Table(family.key, family.kind, axes, ms, low, high, family.aligned))
        log.info("latency of parts: %d of %d families measured", i + 1, len(runnable))
    return tables


def _axis(family: Family, a: int, bench: Bench, refine: bool, most: int) -> Values:
    """At most so many values of one variable, those that are aligned first."""
    step = family.steps[a]
    lowest, highest = max(family.lowest[a] // step, 1) * step, family.highest[a]
    values = sorted({*range(lowest, highest, step), highest})
    aligned = [value for value in values if value % family.aligned == 0]
    others = [value for value in values if value % family.aligned]
    points: Values = ()
    for i, own in enumerate(filter(None, (aligned, others))):
        points += _points(family, a, own, bench, refine, most - (len(points) if i else _FIRST * bool(others)))
    return tuple(sorted(points))


def _points(family: Family, a: int, values: Sequence[int], bench: Bench, refine: bool, most: int) -> Values:
    """At most so many of some values: evenly spread, then halving intervals whose middle is off the line."""
    even = np.linspace(max(values[-1] / 16, values[0]), values[-1], _FIRST)
    nearest = {int(np.abs(np.subtract(values, x)).argmin()) for x in even}
    points = sorted({0, len(values) - 1, *nearest})  # indices of values

    def at(i: int) -> Values:
        return (*family.highest[:a], values[i], *family.highest[a + 1 :])

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
