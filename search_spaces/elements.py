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
    """Sizes of the dimensions of a weight as functions of the widths."""
    found = []
    for dim, size in enumerate(structure.weights[weight]):
        shares: dict[str, int] = {}
        for group in structure.groups:
            members = sum(slot.indices.shape[1] for slot in group.slots if slot.tensor == weight and slot.dim == dim)
            if members:
                shares[group.name] = members
                size -= members * group.size
        found.append((size, tuple(shares.items())))
    return tuple(found)


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
        groups: Names of the groups, in the order of widths.
    """

    def __init__(self, weights: Sequence[Sequence[Extent]], groups: Sequence[str]) -> None:
        from scipy.sparse import csr_array

        columns = {name: i for i, name in enumerate(groups)}
        sizes = [extent for extents in weights for extent in extents]
        entries = [(row, columns[name], each) for row, (_, shares) in enumerate(sizes) for name, each in shares]
        row, column, each = np.array(entries, dtype=np.int64).reshape(-1, 3).T
        self._groups = len(groups)
        self._fixed = np.array([fixed for fixed, _ in sizes], dtype=np.int64)
        self._shares = csr_array((each, (row, column)), shape=(len(sizes), len(groups)))
        self._starts = np.cumsum([0, *map(len, weights)])[:-1]

    def __call__(self, widths: FloatArray) -> IntArray:
        """Elements left of each weight, int64, shape (n, weights), at widths (n, groups or more)."""
        sizes = self._fixed + (self._shares @ widths[:, : self._groups].astype(np.int64).T).T
        left: IntArray = np.multiply.reduceat(sizes, self._starts, axis=1)
        return left
