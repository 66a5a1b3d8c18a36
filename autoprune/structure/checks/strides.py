"""Strides of ``as_strided``: the dimension of the source that each dimension runs along."""

from __future__ import annotations

from collections.abc import Sequence

from autoprune.structure.tracing.record import Op, Record


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements.

    Example:
        >>> contiguous_strides((2, 3, 4))
        (12, 4, 1)
    """
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides[: len(shape)]))


def strided_steps(record: Record, op: Op) -> list[tuple[int | None, int]] | None:
    """Dimension of the source and its step, for each dimension of the result of ``as_strided``.

    A dimension of one index runs along none. Windows over time are two dimensions along the same one.

    Returns:
        None where the source is not contiguous, or a stride is no number of steps along any one dimension.
    """
    source = record.values[op.args["self"].id]
    if source.strides != contiguous_strides(source.shape) or op.args.get("storage_offset"):
        return None
    steps: list[tuple[int | None, int]] = []
    for size, stride in zip(op.args["size"], op.args["stride"], strict=True):
        if size == 1:
            steps.append((None, 1))
            continue
        along = next(
            (
                dim
                for dim, (length, step) in enumerate(zip(source.shape, source.strides, strict=True))
                if stride and stride % step == 0 and stride // step * (size - 1) < length
            ),
            None,
        )
        if along is None:
            return None
        steps.append((along, stride // source.strides[along]))
    return steps
