"""Padding: find the real positions of a batch from its mask, so that the others do not count in averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from autoprune.data.batch import Batch, inputs, tensors


def positions_of(batch: Batch) -> Tensor | None:
    """Positions of a batch that are no padding, bool, shape (samples, positions); None without a mask.

    A mask is a tensor of two dimensions that holds zeros and ones and goes with another input of this form: the entry
    of a mapping whose key ends in "mask", or an input on its own. ``"attention_mask"`` has ones where something is.
    Others may have them where nothing is: padding is a run at one end of each row, so what stands at the other end,
    alike in all rows, is real.
    """
    args, kwargs = inputs(batch)
    shapes = [tuple(tensor.shape[:2]) for tensor in tensors((args, kwargs)) if tensor.ndim > 1]
    named = [(key, value) for key, value in _entries(kwargs) if key.endswith("mask")]
    for key, value in (*named, *(("", value) for value in args)):
        if _is_mask(value) and shapes.count(tuple(value.shape)) > 1:
            kept = value.bool()
            if not key.endswith("attention_mask"):
                kept = _oriented(kept) if key or _one_run(kept) else torch.ones_like(kept)
            if kept.any() and not kept.all():
                return kept
    return None


def kept_positions(mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Lay a mask out like rows of a given shape, (samples, positions) or (positions, samples); None for others."""
    if mask is None:
        return None
    if tuple(shape) == tuple(mask.shape) or tuple(shape) == (mask.numel(),):
        return mask
    return mask.T if tuple(shape) == tuple(mask.T.shape) else None


def _entries(kwargs: Mapping[str, object]) -> list[tuple[str, object]]:
    return [(str(key), value) for key, value in kwargs.items()]


def _is_mask(value: object) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or value.ndim != 2 or not value.numel():
        return False
    return value.dtype == torch.bool or bool(((value == 0) | (value == 1)).all())


def _one_run(kept: Tensor) -> bool:
    """Return whether each row is a run of one value and then of the other, in the same order."""
    steps = kept.int().diff(dim=1)
    return bool((steps >= 0).all() or (steps <= 0).all())


def _oriented(kept: Tensor) -> Tensor:
    for column in (kept[:, 0], kept[:, -1]):
        if (column == column[0]).all() and not (kept == column[0]).all():
            return kept == column[0]
    return torch.ones_like(kept)
