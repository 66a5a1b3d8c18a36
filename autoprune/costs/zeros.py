"""Costs that know which elements of weights are zero: multiplications that remain, and bytes of compressed weights."""

from __future__ import annotations

from typing import Protocol, final

import numpy as np

from autoprune.protocols import FloatArray, IntArray, SearchSpace, SetsZeros
from autoprune.structure.elements import LeftElements, extents_of, presence_of
from autoprune.structure.structure import Structure

INDEX_BYTES = 4
"""Bytes of an index of a compressed row, which counts elements of one weight."""


class Exact(Protocol):
    """Costs of widths that are needed here."""

    def flops(self, widths: FloatArray) -> FloatArray:
        """Multiply-accumulates of one sample, shape (n,)."""
        ...

    def state_bytes(self, widths: FloatArray) -> FloatArray:
        """Bytes of parameters and buffers, shape (n,)."""
        ...


class ZeroSpace(SearchSpace, SetsZeros, Protocol):
    """Space that sets elements of weights to zero."""


@final
class ZeroCosts:
    """Costs of candidates of a space that may set elements of weights to zero.

    Args:
        structure: Uses of its weights.
        exact: Costs without regard to zeros.
    """

    def __init__(self, structure: Structure, exact: Exact) -> None:
        self._structure = structure
        self._exact = exact
        self._columns = [group.name for group in structure.groups]
        self._columns += [presence_of(branch.name) for branch in structure.branches]

    def sparse_flops(self, space: ZeroSpace, candidates: IntArray) -> FloatArray:
        """Multiply-accumulates of one sample without those by elements set to zero, shape (n,)."""
        whole = self._exact.flops(space.widths(candidates))
        times = np.array([self._structure.uses[name].times for name in space.zeroed_weights], dtype=np.float64)
        return whole - space.zeros_by_weight(candidates) @ times

    def stored_bytes(self, space: ZeroSpace, candidates: IntArray) -> FloatArray:
        """Bytes of parameters and buffers, each weight with zeros in its smallest form (`stored_as`), shape (n,)."""
        widths = space.widths(candidates)
        names = space.zeroed_weights
        count = LeftElements([extents_of(self._structure, name) for name in names], self._columns)
        rows, _, elements = count.planes(widths)
        item = np.array([self._structure.uses[name].item_bytes for name in names], dtype=np.int64)
        least = np.minimum.reduce(stored_as(rows, elements, space.zeros_by_weight(candidates), item))
        whole = self._exact.state_bytes(widths)
        stored: FloatArray = whole - (elements * item - least).sum(axis=1)
        return stored


def stored_as(
    rows: IntArray, elements: IntArray, zeros: IntArray, item_bytes: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Bytes of matrices as they are, with a bit for each element, and as compressed rows.

    The second is the size of 2:4, too, whose two bits for each element that stays are as many.

    Args:
        rows: Of each matrix.
        elements: Of each matrix.
        zeros: Among them.
        item_bytes: Of an element.
    """
    left = elements - zeros
    dense = elements * item_bytes
    bits = left * item_bytes + (elements + 7) // 8
    compressed = left * (item_bytes + INDEX_BYTES) + (rows + 1) * INDEX_BYTES
    return dense, bits, compressed
