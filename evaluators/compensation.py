"""Compensation: change what reads the removed units so that it gives nearly what it gave before, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.batches import Batch
from autoprune.evaluators.adaptive_bn import averaging, statistics
from autoprune.evaluators.measuring import Adapted
from autoprune.evaluators.memory import BatchMoments, Passes
from autoprune.evaluators.moments import Moments, layer_moments
from autoprune.evaluators.protocol import Context
from autoprune.evaluators.sharing import SHARE_BYTES, checked_bytes
from autoprune.protocols import Failure, IntArray, Measurement
from autoprune.sources import seeded
from autoprune.structure.slicing import Edit


class Compensated:
    """Scores a candidate after re-fitting its layers to the dense model: weights, then biases and statistics.

    The layers that are re-fitted are those that read units: linear layers and ungrouped convolutions with a weight of
    their own, transposed convolutions left out. Their inputs are looked at once, in the dense model on the calibration
    samples, so the weights of a candidate cost one linear system for each layer. Biases and batch-norm statistics share
    one pass over these samples. The dense candidate stays as it is. `build` delivers what was scored; parameters keep
    their names and shapes.

    Args:
        bn: Re-estimate batch-norm statistics, as `AdaptiveBN` does.
        bias: Choose the biases that give the outputs of each layer their mean in the dense model. A layer without a
            bias is left alone: adding one would change the keys of its state dict, and behind batch norm, where most
            such layers are, it would have no effect.
        least_squares: Fit the weights on the inputs that stay to the outputs of the dense layer, see `least_squares`;
            about the mean where a bias or batch norm takes care of that. Weights with elements set to zero keep them.
        ridge: How strongly the fit is held to the inherited weights, see `least_squares`.
        memory_bytes: Most memory for the products of inputs, columns squared times 8 for each layer; the largest
            layers keep their weights when it is not enough, which the log says.
        share_bytes: Most memory for what candidates share, see `AdaptiveBN`.

    Reference:
        Bias: An et al., "Fluctuation-based Adaptive Structured Pruning", AAAI 2024, arXiv:2312.11983, who put the mean
        of each removed input in its place; here the mean is restored on what the pruned model really feeds a layer, so
        that the errors of earlier layers count too. Least squares: He et al., "Channel Pruning for Accelerating Very
        Deep Neural Networks", ICCV 2017, arXiv:1707.06168, here from the dense activations alone, for every layer at
        once.
    """

    def __init__(
        self,
        bn: bool = True,
        bias: bool = True,
        least_squares: bool = True,
        ridge: float = 1e-3,
        memory_bytes: int = 2**30,
        share_bytes: int = SHARE_BYTES,
    ) -> None:
        if not 0 < ridge < np.inf:
            raise ValueError(f"ridge must be positive and finite, a share of the mean square of inputs, got {ridge}")
        if memory_bytes < 0:
            raise ValueError(f"memory_bytes must be at least 0, got {memory_bytes}")
        self._bn, self._bias, self._least_squares = bn, bias, least_squares
        self._ridge, self._memory_bytes, self._share_bytes = ridge, memory_bytes, checked_bytes(share_bytes)

    def prepare(self, context: Context) -> None:
        """Look at what layers read, and make the skeleton that every candidate is cut from."""
        self._context = context
        self._moments: dict[str, Moments] = {}
        if self._bias or self._least_squares:
            memory = self._memory_bytes if self._least_squares else 0
            calibration = context.subsets.calibration
            with seeded(0):
                self._moments = layer_moments(context.model, context.structure, calibration, context.forward, memory)
        for name, moments in self._moments.items():
            if moments.products is not None and (self._normalised(moments) or self._shifts(name, moments)):
                moments.products -= torch.outer(moments.mean, moments.mean)
        self._adapted = Adapted(context, self._adapt, share_bytes=self._share_bytes)

    def order(self, candidates: IntArray) -> IntArray:
        """The order of evaluation in which candidates share most."""
        return self._adapted.order(candidates)

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
        """A plain module with the weights, biases and statistics that were scored."""
        return self._adapted.build(candidate)

    def _normalised(self, moments: Moments) -> bool:
        return self._bn and moments.normalised

    def _shifts(self, name: str, moments: Moments) -> bool:
        """Whether the bias of a layer is chosen anew."""
        biased = self._context.model.get_submodule(name).bias is not None
        return self._bias and biased and not self._normalised(moments)

    @torch.no_grad()
    def _adapt(self, module: nn.Module, edit: Edit, run: Callable[[Batch], object]) -> None:
        context, means = self._context, {}
        for name, moments in self._moments.items():
            layer, dense = module.get_submodule(name), context.model.get_submodule(name)
            slices, whole = edit.slices.get(f"{name}.weight", {}), dense.get_parameter("weight")
            target = _rows(whole, slices).double().flatten(1)
            if 1 in slices and moments.products is not None and f"{name}.weight" not in edit.zeroed:
                columns = np.arange(target.shape[1]).reshape(whole.shape[1], -1)[slices[1]].ravel()
                kept = torch.from_numpy(columns).to(target.device)
                _replace(layer, "weight", least_squares(target, moments.products, kept, self._ridge))
            if self._shifts(name, moments):
                means[layer] = target @ moments.mean + _rows(dense.get_parameter("bias"), slices)
        passes = Passes()
        with averaging(module, passes) if self._bn else nullcontext(), shifting(means, passes):
            if means or (self._bn and statistics(module)):
                for batch in context.subsets.calibration:
                    passes.run(run, batch)


def _rows(parameter: Tensor, slices: Mapping[int, IntArray]) -> Tensor:
    return parameter[torch.from_numpy(slices[0]).to(parameter.device)] if 0 in slices else parameter.detach()


def _replace(layer: nn.Module, key: str, value: Tensor) -> None:
    """Give a layer a new parameter, never new values: it may share the one that it has."""
    old = layer.get_parameter(key)
    setattr(layer, key, nn.Parameter(value.view(old.shape).to(old.dtype), requires_grad=old.requires_grad))


@contextmanager
def shifting(means: Mapping[nn.Module, Tensor], passes: Passes | None = None) -> Iterator[None]:
    """Shift what layers give to the `means` of its channels, batch by batch, and leave them with biases that do so.

    Args:
        means: For each linear or convolution layer with a bias the means wanted, shape (outputs,). Its bias is replaced
            by one that takes the average of the shifts, over positions and samples, into account.
        passes: What batches run through that are divided where they do not fit into memory.
    """
    passes = passes or Passes()
    shifts = {layer: torch.zeros_like(mean) for layer, mean in means.items()}
    seen = dict.fromkeys(means, 0)

    def shift(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        axis = output.ndim - layer.get_parameter("weight").ndim + 1
        others = [dim for dim in range(output.ndim) if dim != axis]
        count = output.numel() // output.shape[axis]
        if not count:
            return output
        whole, new = passes.moments(
            lambda: BatchMoments(len(output), count, output.double().mean(others) if others else output.double())
        )
        change = means[layer] - whole.mean
        if new:
            seen[layer] += whole.count
            shifts[layer].lerp_(change, whole.count / seen[layer])
        return output + change.to(output.dtype).view([-1 if dim == axis else 1 for dim in range(output.ndim)])

    hooks = [layer.register_forward_hook(shift) for layer in means]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for layer, change in shifts.items():
        _replace(layer, "bias", layer.get_parameter("bias").double() + change)


def least_squares(weight: Tensor, moments: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Weights on the inputs that stay that bring a layer's outputs nearest to those of all its inputs.

    The change D from the weights that stay minimises E|W x - (W_S + D) x_S|^2 + r |D|^2, r being `ridge` times the mean
    of E[x_S^2]. So the error never exceeds that of the inherited weights, whatever `ridge` is, and inputs that are
    always zero keep theirs; He et al. shrink the weights themselves, which promises neither.

    Args:
        weight: W, float64, shape (outputs, inputs).
        moments: E[x x^T], or the covariance for an error about the mean, float64, shape (inputs, inputs).
        kept: Indices S of the inputs that stay, int64, shape (k,).
        ridge: Positive.

    Returns:
        W_S + D, float64, shape (outputs, k).
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    matrix, inherited = moments[kept][:, kept], weight[:, kept]
    scale = matrix.diagonal().mean()
    if scale <= 0:
        return inherited
    cross = weight[:, gone] @ moments[gone][:, kept]
    matrix.diagonal().add_(ridge * scale)
    return inherited + torch.cholesky_solve(cross.T, torch.linalg.cholesky(matrix)).T
