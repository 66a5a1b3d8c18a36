"""Elements of weights as exact functions of the widths of groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np

from autoprune.protocols import FloatArray, IntArray
from autoprune.structure.structure import Structure

Extent = tuple[int, tuple[tuple[str, int], ...]]
"""Size of one dimension of a weight: its constant part, and groups with the share of each of their units."""

EXTENT_FORM = {"fixed": int, "shares": {str: int}}


def extents_of(structure: Structure, weight: str) -> tuple[Extent, ...]:
    """Sizes of the dimensions of a weight as functions of the widths, then the presence of each branch around it."""
    found = []
    for dim, size in enumerate(structure.weights[weight]):
        shares: dict[str, int] = {}
        for group in structure.groups:
            members = sum(slot.indices.shape[1] for slot in group.slots if slot.tensor == weight and slot.dim == dim)
            if members:
                shares[group.name] = members
                size -= members * group.size
        found.append((size, tuple(shares.items())))
    presences = ((0, ((presence_of(branch.name), 1),)) for branch in structure.branches if weight in branch.parameters)
    return (*found, *presences)


def presence_of(branch: str) -> str:
    """Name of the width of a branch, 1 where it is kept and 0 where it is dropped; no group has such a name."""
    return f"branch {branch}"


def extents_to_json(extents: Sequence[Extent]) -> list[dict[str, Any]]:
    """JSON-ready form of the sizes of one weight."""
    return [{"fixed": fixed, "shares": dict(shares)} for fixed, shares in extents]


def extents_from_json(data: Sequence[Mapping[str, Any]]) -> tuple[Extent, ...]:
    """Restore what `extents_to_json` wrote."""
    return tuple((int(each["fixed"]), tuple(each["shares"].items())) for each in data)


@final
class LeftElements:
    """Counts the elements of weights at widths.

    Args:
        weights: Sizes of the dimensions of each weight.
        columns: Names of the groups and of the presences of branches, in the order of widths.
    """

    def __init__(self, weights: Sequence[Sequence[Extent]], columns: Sequence[str]) -> None:
        from scipy.sparse import csr_array

        places = {name: i for i, name in enumerate(columns)}
        sizes = [extent for extents in weights for extent in extents]
        entries = [(row, places[name], each) for row, (_, shares) in enumerate(sizes) for name, each in shares]
        row, column, each = np.array(entries, dtype=np.int64).reshape(-1, 3).T
        self._columns = len(columns)
        self._fixed = np.array([fixed for fixed, _ in sizes], dtype=np.int64)
        self._shares = csr_array((each, (row, column)), shape=(len(sizes), len(columns)))
        self._starts = np.cumsum([0, *map(len, weights)])[:-1]

    def __call__(self, widths: FloatArray) -> IntArray:
        """Elements left of each weight, int64, shape (n, weights), at widths (n, groups + branches).

        The columns of branches may be left out where all are kept.
        """
        left: IntArray = np.multiply.reduceat(self._sizes(widths), self._starts, axis=1)
        return left

    def planes(self, widths: FloatArray) -> tuple[IntArray, IntArray, IntArray]:
        """Sizes of the first two dimensions of each weight, and elements left, int64, shape (n, weights) each.

        The second is meaningless for a weight of one dimension.
        """
        sizes = self._sizes(widths)
        second = np.minimum(self._starts + 1, sizes.shape[1] - 1)
        return sizes[:, self._starts], sizes[:, second], np.multiply.reduceat(sizes, self._starts, axis=1)

    def _sizes(self, widths: FloatArray) -> IntArray:
        missing = self._columns - widths.shape[1]
        whole = np.pad(widths, ((0, 0), (0, missing)), constant_values=1.0).astype(np.int64)
        sizes: IntArray = self._fixed + (self._shares @ whole.T).T
        return sizes
