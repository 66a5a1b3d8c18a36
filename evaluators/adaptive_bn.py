"""Adaptive batch norm: re-estimate the running statistics of a pruned network before judging it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from autoprune.batches import Batch
from autoprune.evaluators.protocol import Context
from autoprune.protocols import Failure, IntArray, Measurement
from autoprune.sources import seeded
from autoprune.structure.slicing import Edit, Slicer


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
        dense = self._slicer.cut(Edit({}, {})).eval()  # cut, because the bare skeleton shares the model's buffers
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
            bad = int((~(np.isfinite(signal) & np.isfinite(metric))).sum())
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

    A batch of n of the samples that a layer has seen so far weighs n / seen, so running averages end as averages over
    samples, and over its calls where a layer is called several times. What has one value a channel has no variance: a
    single sample without positions, which a layer normalises with the statistics that it has and does not count.

    Args:
        module: Changed in place: running means and variances only.
        batches: Calibration data.
        forward: Runs `module` on a batch.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    with torch.no_grad(), _averaging(module, norms), _FastBatchNorm():
        for batch in batches:
            forward(batch)


@contextmanager
def _averaging(module: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    momenta = [norm.momentum for norm in norms]
    counters = [norm.num_batches_tracked for norm in norms]
    seen = dict.fromkeys(norms, 0)

    def weigh(norm: _BatchNorm, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        (x,) = (*args, *kwargs.values())
        norm.training = x.numel() > x.shape[1]
        if norm.training:
            seen[norm] += len(x)
            norm.momentum = len(x) / seen[norm]

    module.eval()
    hooks = [norm.register_forward_pre_hook(weigh, with_kwargs=True) for norm in norms]
    for norm in norms:
        norm.num_batches_tracked = None  # not counted: these batches are no training
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum, counter in zip(norms, momenta, counters, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter
        for m, mode in modes:
            m.training = mode


class _FastBatchNorm(TorchFunctionMode):
    """Runs ``F.batch_norm`` through vectorised reductions where PyTorch's CPU kernel sums one value after the other.

    That kernel takes about ten times as long as normalising with known statistics does: a fifth of an evaluation of
    ResNet-20 at 32x32 (benchmarks/overhead.py).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``F.batch_norm``, with means to 1e-6 of the standard deviation and variances to 1e-5 of themselves."""
    known = _moments(x) if training and running_mean is not None and running_var is not None else None
    if known is None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    mean, var, count = known
    running_mean.lerp_(mean, momentum)  # type: ignore[union-attr]
    running_var.lerp_(var * (count / (count - 1)), momentum)  # type: ignore[union-attr]
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, int] | None:
    """Mean and biased variance of each channel, and the number of values in one; None where PyTorch does better."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.is_contiguous() or x.shape[2:].numel() < 16:
        return None
    rows, count = x.flatten(2), x.numel() // x.shape[1]
    mean = rows.mean(2).double().mean(0)
    var = torch.linalg.vector_norm(rows, dim=2).double().square().sum(0) / count - mean.square()
    if (mean.square() > 100 * var).any():  # the difference has lost too many digits
        return None
    return mean.float(), var.float(), count
