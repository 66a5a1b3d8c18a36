"""Compensation: change what reads the removed units so that it gives nearly what it gave before, without training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.evaluators.adaptive_bn import recalibrate
from autoprune.evaluators.measuring import Adapted, bound_forward
from autoprune.evaluators.moments import Moments, layer_moments
from autoprune.evaluators.protocol import Context
from autoprune.protocols import Failure, IntArray, Measurement
from autoprune.sources import seeded
from autoprune.structure.slicing import Edit


class Compensated:
    """Scores a candidate after re-fitting its layers to the dense model: weights, then biases, then statistics.

    The layers that are re-fitted are those that read removed units: linear layers and ungrouped convolutions with a
    weight of their own, transposed convolutions left out. Their inputs are looked at once, in the dense model on the
    calibration samples, so a candidate costs one linear system for each of them. The dense candidate stays as it is.
    `build` delivers what was scored; parameters keep their names and shapes.

    Args:
        bn: Re-estimate batch-norm statistics, as `AdaptiveBN` does.
        bias: Add to the bias what the removed inputs, and elements set to zero, contribute on average. A layer without
            a bias is left alone: adding one would change the keys of its state dict, and behind batch norm, where most
            such layers are, it would have no effect.
        least_squares: Fit the weights on the inputs that stay to the outputs of the dense layer, see `least_squares`;
            about the mean where a bias or batch norm takes care of that. Weights with elements set to zero keep them.
        ridge: How strongly the fit is held to the inherited weights, see `least_squares`.
        memory_bytes: Most memory for the covariances of inputs, columns squared times 8 for each layer; the largest
            layers keep their weights when it is not enough, which the log says.

    Reference:
        Bias: An et al., "Fluctuation-based Adaptive Structured Pruning", AAAI 2024, arXiv:2312.11983. Least squares:
        He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, arXiv:1707.06168, here from
        the activations of the dense model for every layer at once, not layer after layer.
    """

    def __init__(
        self,
        bn: bool = True,
        bias: bool = True,
        least_squares: bool = True,
        ridge: float = 1e-3,
        memory_bytes: int = 2**30,
    ) -> None:
        if not 0 < ridge < np.inf:
            raise ValueError(f"ridge must be positive, a share of the mean variance of inputs, got {ridge}")
        if memory_bytes < 0:
            raise ValueError(f"memory_bytes must be at least 0, got {memory_bytes}")
        self._bn, self._bias, self._least_squares = bn, bias, least_squares
        self._ridge, self._memory_bytes = ridge, memory_bytes

    def prepare(self, context: Context) -> None:
        """Take the moments of what layers read, and make the skeleton that every candidate is cut from."""
        self._context = context
        self._moments: Mapping[str, Moments] = {}
        if self._bias or self._least_squares:
            memory = self._memory_bytes if self._least_squares else 0
            calibration = context.subsets.calibration
            with seeded(0):
                self._moments = layer_moments(context.model, context.structure, calibration, context.forward, memory)
        for name, moments in self._moments.items():
            constant = self._bias and context.model.get_submodule(name).bias is not None
            if moments.products is not None and (constant or (self._bn and moments.normalised)):
                moments.products -= torch.outer(moments.mean, moments.mean)
        self._adapted = Adapted(context, self._adapt)

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        """Score candidates on validation batches."""
        return self._adapted.evaluate(candidates, chunk)

    def test(self, candidate: IntArray) -> Measurement | Failure:
        """Score a candidate on the held-out samples."""
        return self._adapted.test(candidate)

    def build(self, candidate: IntArray) -> nn.Module:
        """A plain module with the weights, biases and statistics that were scored."""
        return self._adapted.build(candidate)

    @torch.no_grad()
    def _adapt(self, module: nn.Module, edit: Edit) -> None:
        context = self._context
        for name, moments in self._moments.items():
            weight = f"{name}.weight"
            slices = edit.slices.get(weight, {})
            if 1 in slices or weight in edit.zeroed:
                self._refit(name, module.get_submodule(name), moments, slices, weight in edit.zeroed)
        if self._bn:
            recalibrate(module, context.subsets.calibration, bound_forward(context, module))

    def _refit(
        self, name: str, layer: nn.Module, moments: Moments, slices: Mapping[int, IntArray], zeroed: bool
    ) -> None:
        """Give a sliced layer new parameters, never new values: it may share those that it has."""
        dense = self._context.model.get_submodule(name).get_parameter("weight").detach()
        old, bias = layer.get_parameter("weight"), layer.bias
        columns = torch.arange(dense[0].numel(), device=dense.device).view(dense.shape[1], -1)
        if 1 in slices:
            columns = columns[torch.from_numpy(slices[1]).to(dense.device)]
        if 0 in slices:
            dense = dense[torch.from_numpy(slices[0]).to(dense.device)]
        kept, target = columns.flatten(), dense.double().flatten(1)
        if moments.products is not None and not zeroed:
            fitted = least_squares(target, moments.products, kept, self._ridge).view(old.shape).to(old.dtype)
            layer.weight = nn.Parameter(fitted, requires_grad=old.requires_grad)
        if self._bias and isinstance(bias, Tensor):
            now = layer.get_parameter("weight").double().flatten(1)
            lost = target @ moments.mean - now @ moments.mean[kept]
            layer.bias = nn.Parameter((bias.double() + lost).to(bias.dtype), requires_grad=bias.requires_grad)


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
