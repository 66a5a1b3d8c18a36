"""Candidates as the cost functions of users get them: option indices, and what they mean, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoprune.protocols import FloatArray, IntArray, SearchSpace
from autoprune.structure.branches.branch import Presence
from autoprune.structure.structure import Structure


@dataclass(frozen=True, eq=False)
class Candidates:
    """A population of n candidates.

    Attributes:
        indices: Option indices, int64, shape (n, d); 0 is dense.
    """

    indices: IntArray
    _space: SearchSpace = field(repr=False)
    _presence: Presence = field(repr=False)

    @classmethod
    def of(cls, indices: IntArray, space: SearchSpace, structure: Structure) -> Candidates:
        """Give option indices, shape (n, d), their meaning in a space for a traced model."""
        return cls(indices, space, structure.presence)

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def widths(self) -> Mapping[str, FloatArray]:
        """Units kept in each group, by its name in `autoprune.inspect`, shape (n,) each; 0 where it is dropped."""
        return dict(zip(self._presence.groups, self._effective.T, strict=False))

    @cached_property
    def present(self) -> Mapping[str, FloatArray]:
        """Presence of each branch of the model, by name: 1 where it is kept and 0 where it is dropped, shape (n,)."""
        branches = self._effective.T[len(self._presence.groups) :]
        return {branch.name: column for branch, column in zip(self._presence.branches, branches, strict=True)}

    @cached_property
    def _effective(self) -> FloatArray:
        return self._presence.effective(self._space.widths(self.indices))

    @cached_property
    def options(self) -> Mapping[str, NDArray[Any]]:
        """Option chosen in each dimension of the space, by name, shape (n,) each: a width, or a sparsity."""
        return {
            dimension.name: np.array(dimension.options)[column]
            for dimension, column in zip(self._space.dimensions, self.indices.T, strict=True)
        }


GivenCost = Callable[[Candidates], FloatArray]
"""Cost that a user gives: candidates in, float64 (n,) out."""
