"""Propagation of labels over a record, which finds the indices of tensor dimensions that must be removed together.

Every index of every parameter dimension gets a label. The rule of each operation gives the labels of its results, those
that it *joins* (they are removed together) and those that it *freezes* (they must stay). A dimension without labels,
``None``, is fixed: batch, space, anything of the input. Propagation leaves no state on the record, so that the choices
at ambiguous sites can be tried in milliseconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from autoprune.protocols import IntArray
from autoprune.structure.record import Op, Record
from autoprune.structure.time_limit import look

Labels = IntArray | None
"""Labels of one tensor dimension, shape (size,); None where every index is fixed."""

Dims = list[Labels]
"""Labels of one tensor, one entry a dimension."""

OUTER = 0
INNER = 1
log = logging.getLogger(__name__)

PASSING = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "expand", "clone", "transpose", "permute", "unsqueeze", "squeeze"),
        *("masked_fill", "masked_fill_", "_to_copy", "contiguous", "alias", "slice", "roll"),
    )
)
"""Operations that rearrange or mask scores without mixing them."""

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
            learned = known.kind in ("parameter", "buffer") and known.dtype.is_floating_point
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


def propagate(record: Record, choices: Mapping[int, int] | None = None) -> Propagation:
    """Apply the rule of every operation in turn, then freeze the labels of the outputs."""
    from autoprune.structure.rules import rule_of

    flow = Propagation(record, choices or {})
    ran = (*record.ops, *record.training)
    ends = (*record.outputs, *record.training_ends)
    flow.read = frozenset((*(value for op in ran for value in op.inputs()), *ends))
    flow.scores = attention_scores(record)
    for i, known in enumerate(record.values):
        if known.name and i not in flow.read:
            flow.labels[i] = [None] * len(known.shape)  # it is not known what may be removed, so all of it stays
    for op in ran:
        look()
        apply = rule_of(op)
        results = _without_rule(flow, op, "has no rule") if apply is None else _apply(flow, op, apply)
        read = set(op.inputs())
        for value, dims in zip(op.results(), results, strict=True):
            if value not in read:  # a value returned in place keeps the labels that it has
                flow.labels[value] = dims
    for value in record.outputs:
        for labels in flow.of(value):
            flow.freeze(None, labels, "returned by the model")
    for value in record.training_ends:
        for labels in flow.of(value):
            flow.freeze(None, labels, "returned by the model in training")
    flow.propagated = len(flow.edges)
    return flow


def _apply(flow: Propagation, op: Op, apply: Callable[[Propagation, Op], list[Dims]]) -> list[Dims]:
    """Apply a rule; one that fails for its operation freezes all labels of the operation."""
    try:
        results = apply(flow, op)
    except Exception as error:  # an operation may come in forms that its rule was not written for
        log.warning("the rule of %s failed (%r); what it touches stays", op.where(), error)
        return _without_rule(flow, op, "is not understood")
    for value, dims in zip(op.results(), results, strict=True):
        sizes = [None if labels is None else len(labels) for labels in dims]
        shape = flow.record.values[value].shape
        if len(sizes) != len(shape) or any(n not in (None, size) for n, size in zip(sizes, shape, strict=True)):
            log.warning("the rule of %s gave labels %s for shape %s; what it touches stays", op.where(), sizes, shape)
            return _without_rule(flow, op, "is not understood")
    return results


def _without_rule(flow: Propagation, op: Op, why: str) -> list[Dims]:
    for value in op.inputs():
        for labels in flow.of(value):
            flow.freeze(op, labels, f"{op.where()} {why}")
    return [[None] * len(flow.record.values[value].shape) for value in op.results()]


def attention_scores(record: Record) -> frozenset[int]:
    """Find batched products of two activations that reach a softmax through elementwise operations and views only.

    Removing a part of the contracted dimension would change the scale by its size, usually 1 / sqrt(d).
    """
    weights = {i for i, value in enumerate(record.values) if value.name}
    for op in record.ops:
        if weights.issuperset(op.inputs()):
            weights.update(op.results())
    normalised: set[int] = set()
    products = []
    for op in reversed(record.ops):
        if op.name in ("_softmax", "_safe_softmax", "softmax"):
            normalised.update(op.inputs())
        elif normalised.isdisjoint(op.results()):
            continue
        elif op.name in ("bmm", "baddbmm"):
            if weights.isdisjoint(op.inputs()[-2:]):  # a layer on a sequence is a batched product, too
                products.append(op.index)
        elif op.name in PASSING or torch.Tag.pointwise in op.func.tags:
            normalised.update(op.inputs())
    return frozenset(products)
