"""Correction of batch-norm statistics for the change by pruning: none where nothing was removed, for any samples."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.batches import Batch
from autoprune.evaluators.adaptive_bn import moments_of, statistics
from autoprune.evaluators.memory import BatchMoments, Passes
from autoprune.evaluators.padding import kept_positions, positions_of
from autoprune.importance.calibration import Calibration
from autoprune.structure.slicing import Edit

_MOST = 1e6  # the variance of a channel is corrected by at most this factor, in either direction
_DEAD = 1e-12  # of the running variance: less is no variance to compare with


@dataclass(frozen=True)
class _Norm:
    """Batch norm in the dense model.

    Attributes:
        mean: Running mean, float64, shape (channels,).
        var: Running variance.
        calls: Moments of its inputs in each batch and call.
        whole: The same over all of them.
    """

    mean: Tensor
    var: Tensor
    calls: Sequence[BatchMoments]
    whole: BatchMoments


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
        self._norms = {
            names[norm]: _Norm(
                own[norm][0].double().clone(), own[norm][1].double().clone(), seen, BatchMoments.of_parts(seen)
            )
            for norm, seen in calls.items()
        }

    def apply(self, module: nn.Module, edit: Edit, run: Callable[[Batch], object]) -> None:
        """Correct the running statistics of a pruned module in evaluation mode, by replacing its buffers.

        Args:
            module: Cut from the dense model.
            edit: The edit that it was cut by.
            run: Runs it on a batch; norms that do not run are left as they are.
        """
        names = {part: name for name, part in module.named_modules()}
        norms = {norm: self._norms[names[norm]] for norm in statistics(module) if names[norm] in self._norms}
        kept = {norm: _kept(edit, names[norm], dense.mean) for norm, dense in norms.items()}

        def correct(norm: _BatchNorm, call: int, own: BatchMoments) -> None:
            if call < len(norms[norm].calls):
                _correct(norm, norms[norm], norms[norm].calls[call], own, kept[norm])

        modes = [(part, part.training) for part in module.modules()]
        module.eval()
        try:
            with torch.no_grad():
                seen = _measured(norms, self._batches, run, correct)
        finally:
            for part, mode in modes:
                part.training = mode
        for norm, calls in seen.items():
            _correct(norm, norms[norm], norms[norm].whole, BatchMoments.of_parts(calls), kept[norm])


def _measured(
    norms: Iterable[_BatchNorm],
    batches: Sequence[Batch],
    run: Callable[[Batch], object],
    act: Callable[[_BatchNorm, int, BatchMoments], None],
) -> dict[_BatchNorm, list[BatchMoments]]:
    """Moments of the inputs of norms in each of their calls; `act` is called before each, with its number."""
    passes, seen, within = Passes(), defaultdict[_BatchNorm, list[BatchMoments]](list), Counter[_BatchNorm]()

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
            mask, before = positions_of(batch), Counter({norm: len(calls) for norm, calls in seen.items()})
            passes.run(run_part, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """Values at positions that are no padding, of sequences (samples, channels, positions)."""
    kept = kept_positions(mask, (len(x), *x.shape[2:])) if x.ndim == 3 else None
    return x if kept is None else x.movedim(1, -1)[kept]


def _kept(edit: Edit, name: str, mean: Tensor) -> Tensor:
    """Channels that stay."""
    index = edit.slices.get(f"{name}.running_mean", {}).get(0)
    return torch.arange(len(mean), device=mean.device) if index is None else torch.from_numpy(index).to(mean.device)


def _correct(norm: _BatchNorm, dense: _Norm, before: BatchMoments, now: BatchMoments, kept: Tensor) -> None:
    """Give a norm the statistics under which inputs with moments `now` give what `before` gave in the dense model."""
    assert before.var is not None
    assert now.var is not None
    mean, var, was, spread = (each[kept] for each in (dense.mean, dense.var, before.mean, before.var))
    ratio = torch.where(spread > _DEAD * var, now.var / spread.clamp(min=torch.finfo(spread.dtype).tiny), 1.0)
    ratio = torch.nan_to_num(ratio, nan=1.0).clamp(1 / _MOST, _MOST)
    assert norm.running_mean is not None
    kind = norm.running_mean.dtype
    norm.running_mean = (now.mean + (mean - was) * ratio.sqrt()).to(kind)
    norm.running_var = (var * ratio + norm.eps * (ratio - 1)).clamp(min=0).to(kind)  # so that v + eps has the ratio
