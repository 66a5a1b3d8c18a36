"""Tables of times of families of operations on grids of sizes, with interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from autoprune.protocols import FloatArray, IntArray


@dataclass(frozen=True)
class Table:
    """Time of a family of operations on a grid.

    Attributes:
        key: Of the family.
        kind: Of the family.
        axes: Values of each variable, ascending.
        aligned: Multiples of this and the values between them have separate points in the grid, see
            `autoprune.costs.operations.parts.Family`.
        ms: Milliseconds at each point, shape of the grid; extrapolated where no layer of the network comes near.
        low: Lower ends of the 95 % intervals.
        high: Upper ends.
    """

    key: str
    kind: str
    axes: tuple[tuple[int, ...], ...]
    ms: np.ndarray[Any, np.dtype[np.float64]]
    low: np.ndarray[Any, np.dtype[np.float64]]
    high: np.ndarray[Any, np.dtype[np.float64]]
    aligned: int = 1


Place = tuple[IntArray, IntArray, FloatArray]
"""Points of an axis to the left and right of each value, and the position between them, in [0, 1]."""


def place(axis: Sequence[int], aligned: int, values: FloatArray) -> Place:
    """Find the neighbours of values on an axis: aligned points for multiples of `aligned`, else the other points."""
    points = np.array(axis, dtype=np.int64)
    left, right = np.zeros((2, len(values)), dtype=np.int64)
    t: FloatArray = np.zeros(len(values))
    # Aligned sizes may run on faster code, and a line from an aligned point to an unaligned one would mix the two.
    for kind in (True, False):
        rows = np.flatnonzero((values % aligned == 0) == kind)
        own = np.flatnonzero((points % aligned == 0) == kind)
        # An axis may have points of one kind only, which then serve all values.
        own = own if len(own) else np.arange(len(points))
        after = np.clip(np.searchsorted(points[own], values[rows], side="right"), 1, max(len(own) - 1, 1))
        left[rows], right[rows] = own[after - 1], own[np.minimum(after, len(own) - 1)]
        gaps = np.maximum(points[right[rows]] - points[left[rows]], 1)
        # Beyond its ends an axis is constant, because times do not extrapolate along a line.
        t[rows] = np.clip((values[rows] - points[left[rows]]) / gaps, 0.0, 1.0)
    return left, right, t


def interpolate(table: Table, places: Sequence[Place]) -> FloatArray | float:
    """Interpolate multilinearly, shape (n,); a number for an operation of constant size."""
    if not places:
        return float(table.ms)
    total: FloatArray = np.zeros(len(places[0][0]))
    for corner in product((0, 1), repeat=len(places)):
        weight: FloatArray = np.ones(len(total))
        index = []
        for up, (left, right, t) in zip(corner, places, strict=True):
            weight = weight * (t if up else 1 - t)
            index.append(right if up else left)
        total += weight * table.ms[tuple(index)]
    return total
