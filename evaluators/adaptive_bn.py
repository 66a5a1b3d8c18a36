"""Adaptive batch norm: re-estimate the running statistics of a pruned network before judging it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.data.batch import Batch
from autoprune.evaluators.activation_cache.cache import checked_bytes
from autoprune.evaluators.protocol import Context
from autoprune.evaluators.scoring.out_of_memory import BatchMoments, Passes
from autoprune.evaluators.scoring.scorer import Adapted
from autoprune.protocols import Failure, IntArray, Measurement
from autoprune.structure.slicing.slicing import Edit


class AdaptiveBN:
    """Scores a candidate with the weights it inherits and batch-norm statistics of its own.

    Statistics are the exact average over the calibration samples, whatever the order of the batches. A model without
    batch norm is scored as it is. The dense candidate keeps the statistics that it was trained with.

    Args:
        share_bytes: Most memory for what candidates share, on the model's device: those that agree up to some module
            compute everything up to there once, with the same scores to the last bit. 0 shares nothing; None: 1 GiB,
            and less for large models, see `autoprune.evaluators.activation_cache.limits`.

    Reference:
        Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning", ECCV 2020,
        arXiv:2007.02491. The paper lets the usual momentum of 0.1 forget the old statistics; here they are replaced.
    """

    def __init__(self, share_bytes: int | None = None) -> None:
        self._share_bytes = checked_bytes(share_bytes)

    def prepare(self, context: Context) -> None:
        """Make the skeleton that every candidate is cut from."""

        def adapt(module: nn.Module, _: Edit, run: Callable[[Batch], object]) -> None:
            recalibrate(module, context.subsets.calibration, run)

        self._adapted = Adapted(context, adapt, share_bytes=self._share_bytes)

    def order(self, candidates: IntArray) -> IntArray:
        """Return the order of evaluation in which candidates share most."""
        return self._adapted.order(candidates)

    def rest(self) -> None:
        """Free the memory of the latest candidate."""
        self._adapted.rest()

    def release(self) -> None:
        """Forget what candidates share."""
        self._adapted.release()

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        """Score candidates on validation batches."""
        return self._adapted.evaluate(candidates, chunk)

    def test(self, candidate: IntArray) -> Measurement | Failure:
        """Score a candidate on the held-out samples."""
        return self._adapted.test(candidate)

    def build(self, candidate: IntArray) -> nn.Module:
        """A plain module with the statistics that were scored."""
        return self._adapted.build(candidate)


def recalibrate(module: nn.Module, batches: Sequence[Batch], forward: Callable[[Batch], object]) -> None:
    """Replace batch-norm statistics by their exact average over `batches`; training modes come back as they were.

    A batch of n of the samples that a layer has seen so far weighs n / seen, so running averages end as averages over
    samples, and over its calls where a layer is called several times. A single sample without positions has one value
    a channel, and so no variance: a layer normalises it with its present statistics and does not count it.

    Args:
        module: Changed in place: running means and variances only.
        batches: Calibration data.
        forward: Runs `module` on a batch.
    """
    if not statistics(module):
        return
    passes = Passes()
    with torch.no_grad(), averaging(module, passes):
        for batch in batches:
            passes.run(forward, batch)


def statistics(module: nn.Module) -> dict[_BatchNorm, tuple[Tensor, Tensor]]:
    """Running mean and variance of the batch norms that have them."""
    return {
        m: (m.running_mean, m.running_var)
        for m in module.modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None and m.running_var is not None
    }


@contextmanager
def averaging(module: nn.Module, passes: Passes | None = None) -> Iterator[None]:
    """Let batch norms normalise each batch with its own statistics, and leave them with the averages of these.

    Batches that run through `passes` are divided where they do not fit into memory.

    The layers stay in evaluation mode and a hook hands them the statistics, because PyTorch's training mode on a CPU
    sums one value after the other: a fifth of an evaluation of ResNet-20 at 32x32 (benchmarks/execution/overhead.py).
    """
    averages = statistics(module)
    modes = [(m, m.training) for m in module.modules()]
    seen = dict.fromkeys(averages, 0)
    passes = passes or Passes()

    def measure(norm: _BatchNorm, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        (x,) = (*args, *kwargs.values())
        mean, var = averages[norm]
        whole, new = passes.moments(lambda: moments_of(x, mean.dtype))
        if whole.count > 1:
            assert whole.var is not None
            if new:
                seen[norm] += whole.samples
                mean.lerp_(whole.mean, whole.samples / seen[norm])
                var.lerp_(whole.var * (whole.count / (whole.count - 1)), whole.samples / seen[norm])
            mean, var = whole.mean, whole.var
        norm.running_mean, norm.running_var = mean, var

    module.eval()
    hooks = [norm.register_forward_pre_hook(measure, with_kwargs=True) for norm in averages]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm, (mean, var) in averages.items():
            norm.running_mean, norm.running_var = mean, var
        for m, mode in modes:
            m.training = mode


def moments_of(x: Tensor, dtype: torch.dtype) -> BatchMoments:
    """Moments per channel of x (samples, channels, ...), to 1e-6 of the standard deviation and 1e-5 of the variance."""
    count = x.numel() // x.shape[1]
    if count == 0:
        return BatchMoments(len(x), 0, x.new_zeros(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype))
    if x.device.type == "cpu" and x.dtype == torch.float32 and (sums := _sums(x)) is not None:
        mean = sums[0] / count
        square = mean.square()
        var = sums[1] / count - square
        if (square <= 100 * var).all():  # else the difference has lost too many digits
            return BatchMoments(len(x), count, mean.to(dtype), var.to(dtype))
    dims = [0, *range(2, x.ndim)]
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), dims, correction=0)
    return BatchMoments(len(x), count, mean.to(dtype), var.to(dtype))


def _sums(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Sums and sums of squares per channel, in the order of the memory; None where that is not known.

    PyTorch vectorises sums and norms along rows on a CPU, but not `var_mean`, which takes ten times as long.
    """
    if x.shape[2:].numel() < 16:
        return None
    if x.is_contiguous():
        rows = x.flatten(2)
        norm = torch.linalg.vector_norm(torch.linalg.vector_norm(rows, dim=2), dim=0, dtype=torch.float64)
        return rows.sum(2).sum(0, dtype=torch.float64), norm.square()
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)
        return rows.sum(1).sum(0, dtype=torch.float64), rows.square().sum(1).sum(0, dtype=torch.float64)
    return None
