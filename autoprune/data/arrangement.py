"""Arrangement of samples in memory: batches that suit the caches of a processor, and images with channels last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.data.batch import Batch, batch_size, map_tensors, pieces, targets, tensors


@dataclass(frozen=True)
class Arrangement:
    """Arrangement of samples.

    Attributes:
        samples: Most of them in a batch that only scores are taken of; None for batches as they are.
        channels_last: Whether images lie with their channels last.
    """

    samples: int | None = None
    channels_last: bool = False

    def of(self, batches: Sequence[Batch], cut: bool) -> tuple[Batch, ...]:
        """Arrange batches, which are cut into even parts only if `cut`."""
        parts = [part for batch in batches for part in (self._parts(batch) if cut else [batch])]
        return tuple(map(_channels_last, parts)) if self.channels_last else tuple(parts)

    def counts(self, batches: Sequence[Batch]) -> list[int]:
        """Number of parts that each batch is cut into."""
        return [len(self._parts(batch)) for batch in batches]

    def _parts(self, batch: Batch) -> list[Batch]:
        if self.samples is None:
            return [batch]
        size = batch_size(batch)
        parts = -(-size // self.samples)
        return pieces(batch, -(-size // max(parts, 1)))


def _channels_last(batch: Batch) -> Batch:
    """Copy the images among the inputs of a batch with their channels last; targets stay as they are."""
    kept = {id(tensor) for tensor in tensors(targets(batch))}

    def arranged(tensor: Tensor) -> Tensor:
        if id(tensor) in kept or tensor.ndim != 4 or not tensor.is_floating_point():
            return tensor
        return tensor.contiguous(memory_format=torch.channels_last)

    return map_tensors(arranged, batch)
