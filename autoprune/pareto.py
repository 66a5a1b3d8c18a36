"""Dominance between points whose every objective is minimised."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def non_dominated(objectives: ArrayLike) -> NDArray[np.bool_]:
    """Mark the points that no other point dominates.

    One point dominates another when it is no worse in every objective and better in at least one, so exact duplicates
    do not dominate each other and are all kept. A point with a NaN is never on the front and dominates nothing.
    Takes O(n * front * m) time.

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
    # In lexical order nothing is dominated by a later point, so each survivor is final when its turn comes.
    order = np.lexsort(points.T[::-1])
    waiting = order[~np.isnan(points[order]).any(axis=1)]
    front = np.zeros(len(points), dtype=np.bool_)
    while waiting.size:
        first = points[waiting[0]]
        twins = (points[waiting] == first).all(axis=1)
        front[waiting[twins]] = True
        waiting = waiting[(points[waiting] < first).any(axis=1)]
    return front


def hypervolume(objectives: ArrayLike, reference: ArrayLike) -> float:
    """Volume dominated by the points, shape (n, m), and bounded by `reference`, shape (m,); larger is better.

    Points that are not better than `reference` in every objective add nothing.
    """
    from pymoo.indicators.hv import HV

    points = np.asarray(objectives, dtype=np.float64)
    inside = points[(points < np.asarray(reference)).all(axis=1)]
    return float(HV(ref_point=np.asarray(reference, dtype=np.float64))(inside)) if len(inside) else 0.0
