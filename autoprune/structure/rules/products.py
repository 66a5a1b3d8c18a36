"""Dimensions that multiply-accumulates are products of."""

from __future__ import annotations

from autoprune.structure.tracing.record import Op, Record


def dims_of(record: Record, value: int, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
    """List a range of the dimensions of a value, each as (value, dimension)."""
    return [(value, dim) for dim in range(len(record.values[value].shape))[start:stop]]


def argument(op: Op, name: str) -> int:
    """Return the value of an argument that is a tensor."""
    return int(op.args[name].id)
