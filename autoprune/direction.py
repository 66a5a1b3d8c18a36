"""Direction of a metric: which of two scores is better, and by how much."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from autoprune.protocols import FloatArray

Values = TypeVar("Values", float, FloatArray, Tensor)


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
