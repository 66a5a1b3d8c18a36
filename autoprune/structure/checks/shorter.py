"""Smaller example that runs the same operations, so that checks of values of a large one take less time.

The units, their slots and the code's use of sizes do not depend on the number of samples or tokens; the checks of
shapes still use the whole example.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoprune.structure.containers import tensors_in
from autoprune.structure.example import Example
from autoprune.structure.labels import Edge, Propagation
from autoprune.structure.macs import dense_macs
from autoprune.structure.propagate import propagate
from autoprune.structure.tracing.record import Record
from autoprune.structure.tracing.trace import trace
from autoprune.structure.units import Group, Units

ENOUGH_MACS = 2**32
"""Multiply-accumulates of a pass above which a smaller example is tried, and its target: about 0.1 s in float64."""

FEWEST = 8
"""Positions that stay of a dimension other than the samples."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shorter:
    """Beginning of every input, with the labels of a pass on it.

    Attributes:
        flow: Its operations and values are those of the whole example, by index.
        example: The model with these inputs.
    """

    flow: Propagation
    example: Example

    def tied_as(self, whole: Propagation) -> Propagation | None:
        """Return the labels with the ties of the whole example; None if these do not fit."""
        here = np.full(whole.count, -1, dtype=np.int64)
        here[0] = 0
        for value, dims in whole.labels.items():
            if whole.record.values[value].name:
                for there, own in zip(dims, self.flow.of(value), strict=True):
                    if there is not None and own is not None:
                        here[there] = own
        added = [Edge(edge.op, here[edge.a], here[edge.b]) for edge in whole.edges[whole.propagated :]]
        if any((edge.a < 0).any() or (edge.b < 0).any() for edge in added):
            return None
        return replace(self.flow, edges=[*self.flow.edges, *added])


def shorten(flow: Propagation, example: Example) -> Shorter | None:
    """Cut a large example down, if the model then runs the same operations; else None."""
    record = flow.record
    macs = sum(dense_macs(record, op) for op in record.ops)
    leaves = tensors_in(example.inputs, objects=True)
    numbers = {leaf.is_floating_point() or leaf.is_complex() for leaf in leaves if leaf.dtype != torch.bool}
    # Whole numbers next to others may be indices into these, and point past their end.
    if macs < 2 * ENOUGH_MACS or len(numbers) > 1:
        return None
    for cut in _cuts(leaves, record.batch, macs / ENOUGH_MACS):
        small = example.mapped(cut)
        try:
            found = trace(small, training=_trains_otherwise(record))
        except Exception as error:  # a model may need the original sizes
            log.info("the model does not run on a smaller example: %s", error)
            continue
        if _same(record, found):
            return Shorter(propagate(found, flow.sites), small)
    return None


def same_units(one: Units, other: Units) -> bool:
    """Return whether two sets of units have the same names and slots."""
    return len(one.groups) == len(other.groups) and all(
        _same_group(a, b) for a, b in zip(one.groups, other.groups, strict=True)
    )


def _same_group(a: Group, b: Group) -> bool:
    if (a.name, a.size, a.multiple, len(a.slots)) != (b.name, b.size, b.multiple, len(b.slots)):
        return False
    return all(
        x.tensor == y.tensor and x.dim == y.dim and np.array_equal(x.indices, y.indices)
        for x, y in zip(a.slots, b.slots, strict=True)
    )


def _cuts(leaves: list[Tensor], batch: int, excess: float) -> Iterator[Callable[[Tensor], Tensor]]:
    """Propose ways to cut inputs: two samples with the longest other dimensions shorter; then one sample, or two.

    A model of images of one size takes no shorter ones, and on a single sample it does half of the work of two. A model
    that squeezes its samples needs two.
    """
    samples = min(batch, 2)
    excess *= samples / batch
    longest = max((size for leaf in leaves for size in leaf.shape[1:]), default=0)
    dims = max((list(leaf.shape[1:]).count(longest) for leaf in leaves), default=0)
    length = longest
    while excess > 1 and length // 2 >= FEWEST and (length % 2 == 0 or length == longest):
        length = (length + 1) // 2  # an odd length is of a convolutional network, to which each will do
        excess /= 2**dims

    def cut(tensor: Tensor, samples: int, longest: int = 0, length: int = 0) -> Tensor:
        for dim, size in enumerate(tensor.shape):
            if dim == 0 and size == batch:
                tensor = tensor.narrow(0, 0, samples)
            elif dim > 0 and size == longest:
                tensor = tensor.narrow(dim, 0, length)
        return tensor.clone()

    if length < longest:
        yield lambda tensor: cut(tensor, samples, longest, length)
    if batch > 1:
        yield lambda tensor: cut(tensor, 1)
    if samples < batch:
        yield lambda tensor: cut(tensor, samples)


def _same(whole: Record, small: Record) -> bool:
    """Return whether two records hold the same operations on the same values, apart from sizes."""
    trained = _trains_otherwise(whole)

    def outline(record: Record) -> tuple[Any, ...]:
        ops = [(op.func, op.inputs(), op.results(), op.module) for op in (*record.ops, *record.training)]
        met = record.values if trained else record.values[: record.met]
        values = [(value.kind, value.name, len(value.shape), value.dtype) for value in met]
        last = (record.twins, record.trained, record.training_ends) if trained else ()
        return ops, values, record.inputs, record.outputs, *last

    return outline(whole) == outline(small)


def _trains_otherwise(record: Record) -> bool:
    """Return whether a pass in training mode runs more than one in evaluation."""
    return bool(record.training or record.training_ends)
