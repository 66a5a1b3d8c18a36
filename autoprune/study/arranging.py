"""Choice of the arrangement of samples: batches as large as caches like them, and images with channels last.

The rules look at sizes alone, and never at a clock, so that a search comes out the same another time. Figures:
docs/memory.md.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from autoprune.arguments import said
from autoprune.data.arrangement import Arrangement
from autoprune.data.batch import Batch, batch_size, divisible, inputs, pieces, tensors
from autoprune.data.subsets import Subsets
from autoprune.evaluators.activation_cache.limits import bytes_of
from autoprune.importance.calibration import Calibration
from autoprune.metrics.judge import Judge
from autoprune.metrics.scorers import main_output

log = logging.getLogger(__name__)

CACHE_BYTES = 2**21
"""Bytes that the largest tensor of a pass should take, as far as that leaves batches of `_FEW` samples."""

ALLOCATED_BYTES = 2**24
"""Bytes that it should take in any case: glibc hands larger tensors back to the system again and again."""

IMAGE_BYTES = 2**15
"""Bytes of the largest tensor of a sample from which on convolutions gain from channels last."""

TOLERANCE = 1e-5
"""Largest difference of outputs, as a share of the largest of them, that an arrangement may make."""

_FEW = 32  # samples, so that Python's time for each batch stays small
_REUSE = 64  # multiply-accumulates for each byte of weights that a batch has to read


def arranged(subsets: Subsets, judge: Judge, calibration: Calibration) -> Subsets:
    """Arrange samples so that scoring them takes less time on a CPU, where that leaves outputs as they are.

    Args:
        subsets: As drawn.
        judge: Judges single samples, or nothing is arranged: what judges a set may average over its batches.
        calibration: With the dense model, in evaluation mode, with buffers of its own.
    """
    first = subsets.validation[0]
    if next(tensors(first)).device.type != "cpu" or not (judge.per_sample and divisible(first)):
        return subsets
    largest = _largest(calibration, pieces(first, 2)[0])
    if not largest:
        return subsets
    images = any(_is_image(tensor) for tensor in tensors(inputs(first)))
    fast = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch does not annotate it
    last = images and largest >= IMAGE_BYTES and fast
    samples = suited(largest, bytes_of(calibration.model), calibration.structure.macs)
    most = max(map(batch_size, (*subsets.validation, *subsets.test)))
    for wanted in dict.fromkeys((Arrangement(samples, last), Arrangement(samples))):
        wanted = replace(wanted, samples=None if most <= samples else samples)
        few = pieces(first, samples + 1)[0]  # one sample more than a batch of those wanted
        if wanted != Arrangement() and _same(calibration, judge, few, wanted, samples):
            return replace(subsets.arranged(wanted), notes=(*subsets.notes, _note(wanted)))
    return subsets


def suited(largest: int, weights: int, macs: float) -> int:
    """Number of samples in a batch, a power of two.

    Args:
        largest: Bytes of the largest tensor of one sample.
        weights: Bytes of the parameters, which each batch reads.
        macs: Multiply-accumulates of one sample.
    """
    cached = CACHE_BYTES / largest
    few = min(_FEW, ALLOCATED_BYTES / largest)
    return 1 << (int(max(cached, few, _REUSE * weights / max(macs, 1.0), 1)).bit_length() - 1)


def _is_image(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_floating_point()


def _largest(calibration: Calibration, few: Batch) -> int:
    """Bytes of the largest output of a layer, for one sample."""
    found = [0]

    def note(_: nn.Module, args: object, output: object) -> None:
        found.append(max((tensor.nbytes for tensor in tensors(output)), default=0))

    layers = [part for part in calibration.model.modules() if not any(True for _ in part.children())]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            calibration.forward(calibration.model, few)
    finally:
        for hook in hooks:
            hook.remove()
    return max(found) // batch_size(few)


def _same(calibration: Calibration, judge: Judge, batch: Batch, wanted: Arrangement, samples: int) -> bool:
    """Return whether the dense model gives the first samples, arranged, what it gives all, and the judge takes them."""
    run = calibration.forward
    with torch.no_grad():
        whole = main_output(run(calibration.model, batch)).float()
        try:
            (part,) = wanted.of(pieces(batch, samples)[:1], cut=False)
            outputs = run(calibration.model, part)
            ours = main_output(outputs).float()
            if not judge.needs_dense:
                judge.score_batch(outputs, part)
        except Exception as error:  # a model or a metric of the user may need the other layout, and say so in any way
            log.info("samples stay as they were drawn: %s", said(error))
            return False
    whole = whole[: len(ours)] if ours.ndim and whole.ndim else whole
    if ours.shape != whole.shape:
        return False
    return bool((ours - whole).abs().max() <= TOLERANCE * whole.abs().max())


def _note(wanted: Arrangement) -> str:
    batches = "" if wanted.samples is None else f"in batches of at most {wanted.samples} samples"
    images = "with channels last in memory" if wanted.channels_last else ""
    told = " and ".join(part for part in (batches, images) if part)
    return f"samples are scored {told}, which suits the processor's caches; outputs agree to {TOLERANCE:g}"
