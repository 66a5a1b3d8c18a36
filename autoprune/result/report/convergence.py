"""Convergence of a search: the share of the area below the front, after each trial."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING, Any

from autoprune.protocols import OK
from autoprune.result.report.packing import rounded

if TYPE_CHECKING:
    from autoprune.result.search_result import SearchResult

_MARGIN = 0.05  # of the extent: distance of the reference point from the worst of the final front


def convergence_of(result: SearchResult) -> dict[str, Any] | None:
    """Compute the hypervolume of score and first limited cost over the trials; None with fewer than two points.

    Both are scaled by the extent of the points, and the reference point lies just beyond the worst of the front, so
    that the values are between 0 and about 1.

    Returns:
        ``"trial"``: number of trials after which it grew, ascending; ``"value"``: hypervolume then.
    """
    name = next(iter(result.limits))
    key = result.direction.key
    points = [
        (i, trial.costs[name], key(trial.score))
        for i, trial in enumerate(result.trials)
        if trial.status == OK and trial.feasible
    ]
    front = [(trial.costs[name], key(trial.score)) for trial in result.front]
    if len(points) < 2 or not front:
        return None
    low = [min(point[axis] for point in front) for axis in (0, 1)]
    high = [max(point[axis] for point in front) for axis in (0, 1)]
    if high == low:
        high = [max(point[1 + axis] for point in points) for axis in (0, 1)]
    extent = [end - start if end > start else 1.0 for start, end in zip(low, high, strict=True)]
    area = _Area(1 + _MARGIN, 1 + _MARGIN)
    found = []
    for i, cost, score in points:
        if area.add((cost - low[0]) / extent[0], (score - low[1]) / extent[1]):
            found.append((i + 1, rounded(area.value, 5)))
    last = len(result.trials)
    if found and found[-1][0] < last:
        found.append((last, found[-1][1]))
    return {"cost": name, "trial": [i for i, _ in found], "value": [value for _, value in found]}


class _Area:
    """Area that points dominate, lower is better in both, up to a reference point; updated point by point.

    The staircase of undominated points is kept by rising first and falling second coordinate.
    """

    def __init__(self, right: float, top: float) -> None:
        self.value = 0.0
        self._right = right
        self._top = top
        self._x: list[float] = []
        self._y: list[float] = []

    def add(self, x: float, y: float) -> bool:
        """Add a point; return whether the area grew."""
        if x >= self._right or y >= self._top:
            return False
        place = bisect.bisect_right(self._x, x)
        if place and self._y[place - 1] <= y:
            return False
        first = place - 1 if place and self._x[place - 1] == x else place
        end = first
        height = self._y[first - 1] if first else self._top
        left = x
        gained = 0.0
        while end < len(self._x) and self._y[end] >= y:  # these are dominated by the new one
            gained += (self._x[end] - left) * (height - y)
            left, height = self._x[end], self._y[end]
            end += 1
        right = self._x[end] if end < len(self._x) else self._right
        gained += (right - left) * (height - y)
        self._x[first:end] = [x]
        self._y[first:end] = [y]
        self.value += gained
        return gained > 0
