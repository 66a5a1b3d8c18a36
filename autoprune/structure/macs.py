"""Multiply-accumulates of a record, by the formulas of its operations, and the operations without one.

Operations that sum products count: convolutions, matrix products of all forms, bilinear layers, distances, weighted
bags and attention. Elementwise products, norms, pooling, resampling and fast Fourier transforms do not, as in PyTorch's
own counter. A product of complex numbers counts as one, and a sparse matrix by the entries that it stores.
"""

from __future__ import annotations

from math import prod

import torch

from autoprune.structure.rules.registry import Product, operation_of
from autoprune.structure.tracing.record import Op, Record, Ref


def products_of(record: Record, op: Op) -> list[Product]:
    """Multiply-accumulates of an operation, for the whole traced batch; empty if it has no formula."""
    count = operation_of(op).macs
    return [] if count is None else count(record, op)


def dense_macs(record: Record, op: Op) -> float:
    """Multiply-accumulates of an operation at the sizes that were traced."""
    products = products_of(record, op)
    return sum(each * prod(record.values[value].shape[dim] for value, dim in dims) for each, dims in products)


def uncounted(record: Record) -> tuple[str, ...]:
    """List operations that may multiply a parameter with data and have no formula, with their modules, once each.

    These are operations on several tensors of floats, one of which depends on parameters and one on the inputs.
    """
    learned = {i for i, value in enumerate(record.values) if value.kind == "parameter"}
    given = set(record.inputs)
    found: dict[str, None] = {}
    for op in record.ops[: record.first]:
        read = set(op.inputs())
        if learned & read and given & read and not _is_free(record, op):
            found.setdefault(f"{op.func.namespace}::{op.where()}")
        for reached in (learned, given):
            if reached & read:
                reached.update(op.results(), _written(op))
    return tuple(found)


def _written(op: Op) -> list[int]:
    arguments = [a.name for a in op.func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [op.args[name].id for name in arguments if isinstance(op.args.get(name), Ref)]


def _is_free(record: Record, op: Op) -> bool:
    """Return whether an operation has a formula, or sums no products."""

    def floats(values: list[int]) -> list[int]:
        dtypes = ((i, record.values[i].dtype) for i in values if record.values[i].shape)
        return [i for i, dtype in dtypes if dtype.is_floating_point or dtype.is_complex]

    known = operation_of(op)
    if known.macs is not None or known.free or torch.Tag.pointwise in op.func.tags:
        return True
    if op.func.namespace == "aten" and (known.rule is not None or op.name.startswith("_foreach")):
        return True
    return len(set(floats(op.inputs()))) < 2 or not floats(op.results())
