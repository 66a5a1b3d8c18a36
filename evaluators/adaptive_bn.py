"""Adaptive batch norm: re-estimate the running statistics of a pruned network before judging it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.batches import Batch, batch_size
from autoprune.evaluators.protocol import Context
from autoprune.protocols import Failure, IntArray, Measurement
from autoprune.sources import seeded
from autoprune.structure.slicing import Slicer


class AdaptiveBN:
    """Scores a candidate with the weights it inherits and batch-norm statistics of its own.

    Statistics are the exact average over the calibration samples, whatever the order of the batches. A model without
    batch norm is scored as it is. The dense candidate keeps the statistics that it was trained with.

    Reference:
        Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning", ECCV 2020,
        arXiv:2007.02491. The paper lets the usual momentum of 0.1 forget the old statistics; here they are replaced.
    """

    def prepare(self, context: Context) -> None:
        """Make the skeleton that every candidate is cut from."""
        self._context = context
        self._slicer = Slicer(context.model)
        dense = self._slicer.skeleton.eval()
        self._dense = {part: self._dense_outputs(dense, part) for part in ("validation", "test")}

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        """Score candidates on validation batches."""
        return [self._measure(candidate, "validation", chunk or slice(None)) for candidate in candidates]

    def test(self, candidate: IntArray) -> Measurement | Failure:
        """Score a candidate on the held-out samples."""
        return self._measure(candidate, "test", slice(None))

    def build(self, candidate: IntArray) -> nn.Module:
        """A plain module with the statistics that were scored."""
        context = self._context
        module = context.structure.build(context.model, context.space.pruning(candidate.tolist()))
        with seeded(0):
            self._calibrate(module, candidate)
        return module

    def _measure(self, candidate: IntArray, part: str, chunk: slice) -> Measurement | Failure:
        started = time.perf_counter()
        context = self._context
        batches: Sequence[Batch] = getattr(context.subsets, part)[chunk]
        try:
            with seeded(0):
                module = self._slicer.cut(context.structure.edit(context.space.pruning(candidate.tolist())))
                module.eval()
                self._calibrate(module, candidate)
                run = _forward(context, module)
                signal, metric = context.judge.measure(run, batches, self._dense[part][chunk])
        except Exception as error:  # whatever a user's model or metric raises costs this candidate alone
            return Failure(f"{type(error).__name__}: {error}", time.perf_counter() - started)
        seconds = time.perf_counter() - started
        if not (np.isfinite(signal).all() and np.isfinite(metric).all()):
            bad = int((~np.isfinite(signal)).sum())
            return Failure(f"the score of {bad} of {len(signal)} samples is NaN or infinite", seconds)
        return Measurement(signal, metric, seconds)

    def _calibrate(self, module: nn.Module, candidate: IntArray) -> None:
        if candidate.any():
            recalibrate(module, self._context.subsets.calibration, _forward(self._context, module))

    def _dense_outputs(self, dense: nn.Module, part: str) -> tuple[Tensor | None, ...]:
        context = self._context
        with seeded(0):
            return context.judge.dense_outputs(_forward(context, dense), getattr(context.subsets, part))


def _forward(context: Context, module: nn.Module) -> Callable[[Batch], object]:
    return lambda batch: context.forward(module, batch)


def recalibrate(module: nn.Module, batches: Sequence[Batch], forward: Callable[[Batch], object]) -> None:
    """Replace batch-norm statistics by their exact average over `batches`; training modes come back as they were.

    A batch of n of the samples seen so far weighs n / seen, so running averages end as averages over samples. A batch
    of one sample has no variance and is left out.

    Args:
        module: Changed in place: running means and variances only.
        batches: Calibration data.
        forward: Runs `module` on a batch.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    usable = [batch for batch in batches if batch_size(batch) > 1]
    if not norms or not usable:
        return
    seen = 0
    with torch.no_grad(), _averaging(module, norms):
        for batch in usable:
            seen += batch_size(batch)
            for norm in norms:
                norm.momentum = batch_size(batch) / seen
            forward(batch)


@contextmanager
def _averaging(module: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    momenta = [norm.momentum for norm in norms]
    counters = [norm.num_batches_tracked for norm in norms]
    module.eval()
    for norm in norms:
        norm.training = True
        norm.num_batches_tracked = None  # not counted: these batches are no training
    try:
        yield
    finally:
        for norm, momentum, counter in zip(norms, momenta, counters, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
        for m, mode in modes:
            m.training = mode
