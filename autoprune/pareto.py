"""Comparisons: the direction of a metric, and dominance between points where every objective is minimised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from autoprune.protocols import FloatArray

Values = TypeVar("Values", float, FloatArray, Tensor)

_BLOCK = 256  # points compared at once


@dataclass(frozen=True)
class Direction:
    """Direction of a metric, such as an accuracy (higher is better) or a loss.

    Example:
        >>> accuracy = Direction(higher_is_better=True)
        >>> accuracy.better(0.9, 0.8), accuracy.worse_by(0.75, 1.0), accuracy.meets(0.9, worst=0.8)
        (True, 0.25, True)
        >>> sorted([0.7, 0.9, 0.8], key=accuracy.key)
        [0.9, 0.8, 0.7]
    """

    higher_is_better: bool

    def better(self, score: float, other: float) -> bool:
        """Return whether a score is better than another; False where they are equal, or one is NaN."""
        return bool(score > other if self.higher_is_better else score < other)

    def meets(self, score: float, worst: float | None) -> bool:
        """Return whether a score is no worse than the worst one allowed, if any; False for NaN then."""
        return worst is None or bool(score >= worst if self.higher_is_better else score <= worst)

    def worse_by(self, score: float, other: float) -> float:
        """Difference by which a score is worse than another; negative where it is better."""
        return other - score if self.higher_is_better else score - other

    def worsened(self, score: float, by: float) -> float:
        """Score that is worse by a difference."""
        return score - by if self.higher_is_better else score + by

    def best(self, scores: Iterable[float]) -> float:
        """Best of some scores, at least one."""
        return max(scores) if self.higher_is_better else min(scores)

    def key(self, scores: Values) -> Values:
        """Scores turned to lower-is-better, of any shape; sorts from the best to the worst."""
        return -scores if self.higher_is_better else scores


def non_dominated(objectives: ArrayLike) -> NDArray[np.bool_]:
    """Mark the points that no other point dominates.

    One point dominates another when it is no worse in every objective and better in at least one, so exact duplicates
    do not dominate each other and are all kept. A point with a NaN is never on the front and dominates nothing.
    Takes O(n log n) time for up to two objectives, O(n * front * m) beyond.

    Args:
        objectives: Shape (n, m), lower is better.

    Returns:
        True for the points on the front, shape (n,).

    Raises:
        ValueError: If `objectives` is not two-dimensional.

    Example:
        >>> non_dominated([[1, 3], [2, 2], [2, 3], [1, 3]])
        array([ True,  True, False,  True])
    """
    points = np.asarray(objectives, dtype=np.float64)
    if points.ndim != 2:
        raise ValueError(f"objectives must have shape (n, m), got {points.shape}")
    front = np.zeros(len(points), dtype=np.bool_)
    known = np.flatnonzero(~np.isnan(points).any(axis=1))
    # In lexical order nothing is dominated by a later point, and duplicates share one row.
    distinct, row = np.unique(points[known], axis=0, return_inverse=True)
    mark = _staircase if points.shape[1] <= 2 else _survivors
    front[known] = mark(distinct)[row.reshape(-1)]
    return front


def _staircase(points: FloatArray) -> NDArray[np.bool_]:
    """Mark the front of distinct points in lexical order, of at most two objectives: each new least second one."""
    if points.shape[1] < 2:
        first: NDArray[np.bool_] = np.eye(1, len(points), dtype=np.bool_)[0]
        return first
    least_before: FloatArray = np.minimum.accumulate(np.append(np.inf, points[:-1, 1]))
    keep: NDArray[np.bool_] = np.asarray(points[:, 1] < least_before, dtype=np.bool_)
    keep[:1] = True  # even where its second objective is infinite
    return keep


def _survivors(points: FloatArray) -> NDArray[np.bool_]:
    """Mark the front of distinct points in lexical order, a block at a time against the front of those before it."""
    keep = np.zeros(len(points), dtype=np.bool_)
    for start in range(0, len(points), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(points)))
        before = np.flatnonzero(keep[:start])
        block = block[~_dominated(points[block], points[before])]
        # A dominating point is not equal, because points are distinct, so only a point itself has to be left out.
        keep[block] = np.logical_not(_dominated(points[block], points[block], itself=True))
    return keep


def _dominated(points: FloatArray, others: FloatArray, itself: bool = False) -> NDArray[np.bool_]:
    """Mark points for which one of `others` is no worse in every objective, shape (n,); with `itself`, another row."""
    no_worse = np.ones((len(points), len(others)), dtype=np.bool_)
    for mine, theirs in zip(points.T, others.T, strict=True):
        no_worse &= theirs <= mine[:, None]
    if itself:
        np.fill_diagonal(no_worse, False)
    return np.asarray(no_worse.any(axis=1), dtype=np.bool_)


def hypervolume(objectives: ArrayLike, reference: ArrayLike) -> float:
    """Compute the volume that points (n, m) dominate, bounded by `reference`, shape (m,); larger is better.

    Points that are not better than `reference` in every objective add nothing.
    """
    from pymoo.indicators.hv import HV

    points = np.asarray(objectives, dtype=np.float64)
    inside = points[(points < np.asarray(reference)).all(axis=1)]
    return float(HV(ref_point=np.asarray(reference, dtype=np.float64))(inside)) if len(inside) else 0.0
