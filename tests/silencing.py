"""A space that drops parts of a model without branches: it leaves one unit, and nothing else speaks about it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoprune.protocols import FloatArray, IntArray, Pruning
from autoprune.search_spaces import SPACES, Choice, Choices
from autoprune.search_spaces.registry import Kind


@dataclass(frozen=True)
class Gates:
    """Dimensions that either keep groups or leave one unit of each, and then silence them; wraps `Choices`."""

    inner: Choices

    @classmethod
    def of(cls, order: Mapping[str, Sequence[int]], gates: Mapping[str, Sequence[str]]) -> "Gates":
        SPACES["gates"] = Kind(None, cls)
        options = {
            name: Choice([{g: len(order[g]) for g in groups}, dict.fromkeys(groups, 1)], labels=("kept", "dropped"))
            for name, groups in gates.items()
        }
        return cls(Choices(order, options))

    def silenced(self, candidates: IntArray) -> np.ndarray:
        return (self.inner.widths(candidates) == 1) & (self.inner.widths(0 * candidates) > 1)

    @property
    def dimensions(self):
        return self.inner.dimensions

    @property
    def sizes(self) -> IntArray:
        return self.inner.sizes

    def canonical(self, candidates: IntArray) -> IntArray:
        return candidates

    def decode(self, candidate: Sequence[int]) -> dict[str, Any]:
        return self.inner.decode(candidate)

    def pruning(self, candidate: Sequence[int]) -> Pruning:
        return self.inner.pruning(candidate)

    def widths(self, candidates: IntArray) -> FloatArray:
        return self.inner.widths(candidates)

    def zeroed(self, candidates: IntArray) -> FloatArray:
        return self.inner.zeroed(candidates)

    def describe(self) -> str:
        return "gates"

    def to_json(self) -> dict[str, Any]:
        return {"type": "gates", "inner": self.inner.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Gates":
        return cls(Choices.from_json(data["inner"]))
