"""Correction of batch-norm statistics for the change by pruning: none where nothing was removed, for any samples."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.data.batch import Batch, batch_size
from autoprune.evaluators.adaptive_bn import moments_of, statistics
from autoprune.evaluators.scoring.out_of_memory import BatchMoments, Passes
from autoprune.importance.calibration import Calibration
from autoprune.importance.padding import kept_positions, positions_of
from autoprune.structure.slicing.slicing import Edit

SETTLED = 0.02
"""Standard deviations of a channel by which statistics of some batches may differ from those of all."""

LEAST_SAMPLES = 128
"""Samples that statistics are taken of in any case."""

_MOST = 1e6  # the variance of a channel is corrected by at most this factor, in either direction
_DEAD = 1e-12  # of the running variance: less is no variance to compare with


@dataclass(frozen=True)
class _Norm:
    """Batch norm in the dense model: in each row m - a, v and b of the inputs that it normalises, see `Correction`.

    Where b is too small to compare with it is NaN. Float64, shape (3, channels) each: candidates take their channels
    from all three at once.

    Attributes:
        calls: For each batch and call.
        whole: Over all of them.
    """

    calls: Sequence[Tensor]
    whole: Tensor

    @classmethod
    def of(cls, norm: tuple[Tensor, Tensor], calls: Sequence[BatchMoments]) -> _Norm:
        """Take the running statistics of a norm, and the moments of its inputs in each call."""
        mean, var = (each.double() for each in norm)

        def rows(moments: BatchMoments) -> Tensor:
            assert moments.var is not None
            safe = moments.var.clamp(min=torch.finfo(moments.var.dtype).tiny)
            spread = torch.where(moments.var > _DEAD * var, safe, torch.nan)
            return torch.stack([mean - moments.mean, var, spread])

        return cls([rows(moments) for moments in calls], rows(BatchMoments.of_parts(calls)))

    def pooled(self, calls: int) -> Tensor:
        """Rows over the first calls, each of which weighs the same; shape (3, channels)."""
        shift, var, spread = (torch.stack([rows[i] for rows in self.calls[:calls]]) for i in range(3))
        mean = shift.mean(0)
        return torch.stack([mean, var.mean(0), spread.mean(0) + (shift - mean).square().mean(0)])

    def kept(self, index: Tensor) -> _Norm:
        """The same of the channels that stay."""
        return _Norm([rows[:, index] for rows in self.calls], self.whole[:, index])


class Correction:
    """Gives batch norms of a pruned model statistics under which their outputs have the moments of the dense model's.

    A running mean m and variance v with which the dense model normalises inputs of mean a and variance b become
    c + (m - a) sqrt(d / b) and v d / b where the inputs of the pruned model have mean c and variance d on the same
    samples. Where the running statistics are those of the samples, these are c and d, as in re-estimation; where they
    are not, the outputs have the moments that the dense model gives them. Moments are of all samples, and paired:
    during the pass, each batch is normalised by its difference from the same batch in the dense model, so that small
    batches do no harm.

    Args:
        calibration: Its model is in evaluation mode, with buffers of its own.
    """

    def __init__(self, calibration: Calibration) -> None:
        dense = calibration.model
        self._batches = calibration.batches
        names = {module: name for name, module in dense.named_modules()}
        with torch.no_grad():
            calls = _measured(statistics(dense), self._batches, partial(calibration.forward, dense), lambda *_: None)
        own = statistics(dense)
        self._dense = {names[norm]: (own[norm], seen) for norm, seen in calls.items()}
        self._norms = {name: _Norm.of(*found) for name, found in self._dense.items()}

    @property
    def batches(self) -> Sequence[Batch]:
        """Batches that candidates run on."""
        return self._batches

    def first(self, count: int) -> Correction:
        """Copy that takes the first `count` batches alone, of the dense model and of candidates."""
        other = copy.copy(self)
        share = count / len(self._batches)
        other._batches = self._batches[:count]
        other._dense = {name: (own, seen[: round(share * len(seen))]) for name, (own, seen) in self._dense.items()}
        other._norms = {name: _Norm.of(*found) for name, found in other._dense.items()}
        return other

    def converged(self, module: nn.Module, edit: Edit, run: Callable[[Batch], object]) -> int:
        """Number of batches after which the corrected statistics of a pruned module are those of all batches.

        To `SETTLED`, the root mean square over the channels of each norm, in standard deviations, with at least
        `LEAST_SAMPLES` samples.

        Args:
            module: As for `apply`, which it goes through.
            edit: As there.
            run: As there.
        """
        seen = self.apply(module, edit, run)
        sizes = np.cumsum([batch_size(batch) for batch in self._batches])
        total = len(self._batches)
        for count in range(1, total):
            if sizes[count - 1] >= LEAST_SAMPLES and all(
                len(calls) % total == 0 and _apart(self._kept_norm(edit, name), calls, count / total) <= SETTLED
                for name, calls in seen.items()
            ):
                return count
        return total

    def _kept_norm(self, edit: Edit, name: str) -> _Norm:
        return _kept(edit, name, self._norms[name])

    def apply(self, module: nn.Module, edit: Edit, run: Callable[[Batch], object]) -> dict[str, list[BatchMoments]]:
        """Correct the running statistics of a pruned module in evaluation mode, by replacing its buffers.

        Args:
            module: Cut from the dense model.
            edit: The edit that it was cut by.
            run: Runs it on a batch; norms that do not run are left as they are.

        Returns:
            Moments of the inputs of each norm that ran, by its name, in the order of its calls.
        """
        names = {part: name for name, part in module.named_modules()}
        norms = {
            norm: _kept(edit, names[norm], self._norms[names[norm]])
            for norm in statistics(module)
            if names[norm] in self._norms
        }

        def correct(norm: _BatchNorm, call: int, own: BatchMoments) -> None:
            if call < len(norms[norm].calls):
                _correct(norm, norms[norm].calls[call], own)

        modes = [(part, part.training) for part in module.modules()]
        module.eval()
        try:
            with torch.no_grad():
                seen = _measured(norms, self._batches, run, correct)
        finally:
            for part, mode in modes:
                part.training = mode
        for norm, calls in seen.items():
            if len(calls) > 1 or len(norms[norm].calls) > 1:  # else the only call left them so
                _correct(norm, norms[norm].whole, BatchMoments.of_parts(calls))
        return {names[norm]: calls for norm, calls in seen.items()}


def _apart(dense: _Norm, calls: Sequence[BatchMoments], share: float) -> float:
    """Difference of the statistics corrected by the first calls from those by all, in standard deviations."""
    few = round(share * len(calls))
    mean, var = _corrected(dense.pooled(few), BatchMoments.of_parts(calls[:few]))
    whole_mean, whole_var = _corrected(dense.whole, BatchMoments.of_parts(calls))
    if not len(mean):
        return 0.0
    spread = whole_var.clamp(min=torch.finfo(whole_var.dtype).tiny)
    shift = (mean - whole_mean).square() / spread
    scale = ((var / spread).clamp(min=0).sqrt() - 1).square()
    return float(torch.maximum(shift.mean().sqrt(), scale.mean().sqrt()))


def _measured(
    norms: Iterable[_BatchNorm],
    batches: Sequence[Batch],
    run: Callable[[Batch], object],
    act: Callable[[_BatchNorm, int, BatchMoments], None],
) -> dict[_BatchNorm, list[BatchMoments]]:
    """Moments of the inputs of norms in each of their calls; `act` is called before each, with its number."""
    passes = Passes()
    seen = defaultdict[_BatchNorm, list[BatchMoments]](list)
    within = Counter[_BatchNorm]()

    def measure(norm: _BatchNorm, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        (x,) = (*args, *kwargs.values())
        whole, new = passes.moments(lambda: moments_of(_real(x, mask), torch.float64))
        if new:
            seen[norm].append(whole)
        act(norm, before[norm] + within[norm], whole)
        within[norm] += 1

    def run_part(part: Batch) -> object:
        within.clear()
        return run(part)

    hooks = [norm.register_forward_pre_hook(measure, with_kwargs=True) for norm in norms]
    try:
        for batch in batches:
            mask = positions_of(batch)
            before = Counter({norm: len(calls) for norm, calls in seen.items()})
            passes.run(run_part, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """Values at positions that are no padding, of sequences (samples, channels, positions)."""
    kept = kept_positions(mask, (len(x), *x.shape[2:])) if x.ndim == 3 else None
    return x if kept is None else x.movedim(1, -1)[kept]


def _kept(edit: Edit, name: str, dense: _Norm) -> _Norm:
    """Take the channels that stay."""
    index = edit.slices.get(f"{name}.running_mean", {}).get(0)
    return dense if index is None else dense.kept(torch.from_numpy(index).to(dense.whole.device))


def _correct(norm: _BatchNorm, dense: Tensor, now: BatchMoments) -> None:
    """Give a norm the statistics under which inputs with moments `now` give what those of `dense` gave in its place."""
    assert norm.running_mean is not None
    kind = norm.running_mean.dtype
    mean, var = _corrected(dense, now, norm.eps)
    norm.running_mean, norm.running_var = mean.to(kind), var.to(kind)


def _corrected(dense: Tensor, now: BatchMoments, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and variance for `_correct`, so that the variance and eps have the ratio of the variances."""
    assert now.var is not None
    shift, var, spread = dense
    ratio = (now.var / spread).nan_to_num_(nan=1.0).clamp_(1 / _MOST, _MOST)
    return now.mean + shift * ratio.sqrt(), (var * ratio + eps * (ratio - 1)).clamp_(min=0)
