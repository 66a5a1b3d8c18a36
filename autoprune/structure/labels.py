"""Labels of the indices of tensor dimensions, and the joins and freezes between them.

Every index of every parameter dimension gets a label. Labels that are *joined* are removed together, those that are
*frozen* must stay. A dimension without labels, ``None``, is fixed: batch, space, anything of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autoprune.protocols import IntArray
from autoprune.structure.tracing.record import Op, Record

Labels = IntArray | None
"""Labels of one tensor dimension, shape (size,); None where every index is fixed."""

Dims = list[Labels]
"""Labels of one tensor, one entry a dimension."""

OUTER = 0
INNER = 1

FIXED: IntArray = np.zeros(1, dtype=np.int64)
"""Label 0, of an index that stays."""


@dataclass(frozen=True)
class Edge:
    """Joins labels `a` and `b`, elementwise, because of operation `op`."""

    op: int
    a: IntArray
    b: IntArray


@dataclass(frozen=True)
class Freeze:
    """Labels that must stay because of operation `op` (-1: the model's outputs), with the reason in words."""

    op: int
    labels: IntArray
    reason: str


@dataclass
class Propagation:
    """Labels of every value, and the joins and freezes between them.

    Attributes:
        choices: For an ambiguous site (operation index), which factor of a product dimension carries the units,
            counted from the outermost. Sites not named follow the rule's default.
        sites: The sites, with the choice taken at each.
        factors: Number of choices at each site.
        multiples: Labels of dimensions whose size must stay a multiple of a number, with the number.
        read: Values that an operation reads or the model returns.
        propagated: Number of edges made by rules; those after them are ties that the code needs.
        scores: Matrix products whose result goes into a softmax: attention scores, scaled by the contracted dimension.
        found: Last result of `find_units`.
    """

    record: Record
    choices: Mapping[int, int] = field(default_factory=dict)
    labels: dict[int, Dims] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    sites: dict[int, int] = field(default_factory=dict)
    factors: dict[int, int] = field(default_factory=dict)
    read: frozenset[int] = frozenset()
    scores: frozenset[int] = frozenset()
    count: int = 1
    multiples: list[tuple[IntArray, int]] = field(default_factory=list)
    propagated: int = 0
    found: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    _invented: set[int] = field(default_factory=set)

    def fresh(self, size: int, *, invented: bool = True) -> Labels:
        """Make new labels for a dimension; a dimension of one index cannot shrink and stays fixed.

        Args:
            size: Indices of the dimension.
            invented: Whether the labels belong to no parameter, and only follow the labels that they are joined with.
        """
        if size <= 1:
            return None
        labels = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        if invented:
            self._invented.add(int(labels[0]))
        return labels

    def invented(self, labels: IntArray) -> bool:
        """Return whether labels are fresh ones of no parameter, not yet replaced by labels joined with them."""
        return int(labels[0]) in self._invented

    def of(self, value: int) -> Dims:
        """Labels of a value; a parameter or buffer gets its own at its first use, any other unknown value is fixed."""
        if value not in self.labels:
            known = self.record.values[value]
            numbers = known.dtype.is_floating_point or known.dtype.is_complex
            learned = known.kind in ("parameter", "buffer") and numbers
            self.labels[value] = [self.fresh(size, invented=False) if learned else None for size in known.shape]
        return self.labels[value]

    def join(self, op: Op, a: Labels, b: Labels) -> Labels:
        """Tie two aligned dimensions and return the labels of their common result."""
        if a is None or b is None:
            self.freeze(op, b if a is None else a, f"tied to a fixed dimension by {op.where()}")
            return None
        if len(a) != len(b):
            for labels in (a, b):
                self.freeze(op, labels, f"tied to a dimension of another size by {op.where()}")
            return None
        if a is not b:
            self.edges.append(Edge(op.index, a, b))
        return b if self.invented(a) else a

    def freeze(self, op: Op | None, labels: Labels, reason: str) -> None:
        """Freeze `labels`: they must stay."""
        if labels is not None:
            self.freezes.append(Freeze(-1 if op is None else op.index, labels, reason))

    def tie(self, op: Op, grid: IntArray) -> IntArray:
        """Join the labels in each row of `grid`, shape (units, members), and return the first of each row."""
        first = np.ascontiguousarray(grid[:, 0])
        for column in range(1, grid.shape[1]):
            self.edges.append(Edge(op.index, first, np.ascontiguousarray(grid[:, column])))
        return first

    def choose(self, op: Op, default: int, factors: int = 2) -> int:
        """Take the choice for an ambiguous site, and remember that it is one."""
        if op.index in self.record.twins:  # training treats a layer as evaluation does
            return self.sites.get(self.record.twins[op.index], default)
        self.factors[op.index] = factors
        self.sites[op.index] = self.choices.get(op.index, default)
        return self.sites[op.index]
