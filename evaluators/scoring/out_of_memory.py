"""Batches that do not fit into memory go in halves, with the same results but for rounding."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from autoprune.data.batch import Batch, batch_size, divisible, pieces, tensors
from autoprune.data.sampling import cuda_is_used

log = logging.getLogger(__name__)

T = TypeVar("T")
_SIGNS = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out; PyTorch has no single class for that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


class Halving:
    """Runs a function on batches, and again on their halves as often as memory runs out.

    The size that fits is kept for later batches.
    """

    def __init__(self) -> None:
        self._most: int | None = None

    def __call__(self, run: Callable[[list[Batch]], T], batches: Sequence[Batch]) -> T:
        """Call `run` with the batches, or with the parts of them that fit, in order.

        Raises:
            RuntimeError: The error of `run`, if even single samples do not fit, or batches that cannot be cut.
        """
        while True:
            parts = [part for batch in batches for part in split(batch, self._most)]
            try:
                return run(parts)
            except Exception as error:  # torch has several types for it; all others are raised again
                most = max((batch_size(part) for part in parts if divisible(part)), default=1)
                if not is_out_of_memory(error) or most == 1:
                    raise
                message = str(error).partition("\n")[0]
            # Here and not above, because the error holds references to the tensors that filled the memory.
            if cuda_is_used():
                torch.cuda.empty_cache()
            self._most = (most + 1) // 2
            log.warning("out of memory on batches of %d, going on with %d (%s)", most, self._most, message)


def split(batch: Batch, most: int | None) -> list[Batch]:
    """The batch in parts of at most `most` samples; the batch itself where it is no larger, or cannot be cut."""
    return [batch] if most is None else pieces(batch, most)


def fitting(forward: Callable[[Batch], Any]) -> Callable[[Batch], Any]:
    """A forward that joins the outputs of the parts of a batch where the whole does not fit.

    Args:
        forward: Gives the outputs for a batch, those of each sample independent of the others. What it returns is
            joined where each tensor or list in it has an entry for each sample.
    """
    halving = Halving()
    return lambda batch: halving(partial(_outputs, forward), [batch])


def _outputs(forward: Callable[[Batch], Any], parts: list[Batch]) -> Any:
    if len(parts) == 1:
        return forward(parts[0])
    return joined([forward(part) for part in parts], [batch_size(part) for part in parts])


def joined(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Outputs of a whole batch from those of its parts.

    Args:
        outputs: Nested structures of the same form.
        sizes: Number of samples of each part.

    Raises:
        ValueError: If something in them has no entry for each sample.
    """
    first = outputs[0]
    if all(_is_rows(each, n) for each, n in zip(outputs, sizes, strict=True)):
        return torch.cat(list(outputs))
    if isinstance(first, Mapping):
        whole = copy.copy(first) if isinstance(first, MutableMapping) else dict(first)
        for key in first:
            whole[key] = joined([each[key] for each in outputs], sizes)
        return whole
    if isinstance(first, list) and [len(each) for each in outputs] == list(sizes) and not _is_rows(first[0], sizes[0]):
        return [entry for each in outputs for entry in each]  # one entry for each sample, as detectors give
    if isinstance(first, list | tuple) and len({len(each) for each in outputs}) == 1:
        values = [joined(each, sizes) for each in zip(*outputs, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    if any(True for _ in tensors(outputs)) or any(each != first for each in outputs):
        raise ValueError(
            f"a batch that does not fit into memory was scored in {len(sizes)} parts, but outputs of type "
            f"{type(first).__name__} do not join to those of the whole; use smaller batches, or outputs= to choose"
        )
    return first


def _is_rows(output: Any, n: int) -> bool:
    """Return whether an output is a tensor with a row for each of n samples."""
    return isinstance(output, Tensor) and output.ndim > 0 and len(output) == n


@dataclass(frozen=True)
class BatchMoments:
    """Mean and biased variance of each channel over a batch.

    Attributes:
        samples: Samples of the batch.
        count: Values of each channel: samples times positions.
        mean: Shape (channels,).
        var: Shape (channels,), or None where it is not needed.
    """

    samples: int
    count: int
    mean: Tensor
    var: Tensor | None = None

    @classmethod
    def of_parts(cls, parts: Sequence[BatchMoments]) -> BatchMoments:
        """Moments of a batch from those of its parts, exact but for rounding in float64."""
        samples = sum(p.samples for p in parts)
        count = sum(p.count for p in parts)
        kept = [p for p in parts if p.count]
        if not kept:
            return parts[0]
        mean = torch.stack([p.count / count * p.mean.double() for p in kept]).sum(0)
        var = None
        if all(p.var is not None for p in kept):
            spread = [
                p.count / count * (p.var.double() + (p.mean.double() - mean).square())
                for p in kept
                if p.var is not None
            ]
            var = torch.stack(spread).sum(0).to(kept[0].mean.dtype)
        return cls(samples, count, mean.to(kept[0].mean.dtype), var)


class _NextPart(BaseException):
    """Ends the forward of a part where moments of the whole batch are needed; no ``except Exception`` catches it."""


class Passes:
    """Runs forwards whose hooks act on moments of the whole batch, in parts where it does not fit into memory.

    Then there is a pass over the parts for each such layer, up to that layer: the rest depends on the moments of the
    whole batch. That is slow, and the only way for which it does not matter how a batch was divided.
    """

    def __init__(self) -> None:
        self._halving = Halving()
        self._known: list[BatchMoments] | None = None
        self._parts: list[BatchMoments] = []
        self._place = self._used = 0
        self._divided = False

    def run(self, forward: Callable[[Batch], object], batch: Batch) -> None:
        """Run a forward on a batch."""
        self._known = []
        self._used = 0
        try:
            self._halving(partial(self._run_parts, forward), [batch])
        finally:
            self._known = None

    def moments(self, measure: Callable[[], BatchMoments]) -> tuple[BatchMoments, bool]:
        """Moments of the whole batch at this call of a hook, and whether they are returned for the first time.

        Args:
            measure: Takes the moments of the input of the hook. Outside `run` that is the whole batch.
        """
        if self._known is None:
            return measure(), True
        place = self._place
        self._place = self._place + 1
        if place == len(self._known):
            own = measure()
            if self._divided:
                self._parts.append(own)
                raise _NextPart
            self._known.append(own)
        fresh = place == self._used
        self._used += fresh
        return self._known[place], fresh

    def _run_parts(self, forward: Callable[[Batch], object], parts: list[Batch]) -> None:
        """Pass over the parts until each gets to its end; moments found with larger parts still hold."""
        assert self._known is not None
        self._divided = len(parts) > 1
        while True:
            self._parts = []
            for part in parts:
                self._place = 0
                try:
                    forward(part)
                except _NextPart:
                    continue
            if not self._parts:
                return
            if len(self._parts) < len(parts):
                raise ValueError(
                    "a batch that does not fit into memory cannot be divided, because the model calls other layers for "
                    "one part than for another; use smaller batches"
                )
            self._known.append(BatchMoments.of_parts(self._parts))
