"""Solve weights with zeros from what they read, in whole networks and in networks without some units."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.importance.database.parts import refitted
from autoprune.importance.masks.layer import DAMPING, Layer, kernel_last, matrix_of_weight, weight_of_matrix
from autoprune.importance.masks.methods import Method, solve
from autoprune.importance.masks.observe import Observed
from autoprune.importance.masks.support import fit_on_support
from autoprune.importance.reading import matrix_of
from autoprune.protocols import FloatArray, IntArray
from autoprune.structure.slicing.zeros import Pattern

FACTORED_BYTES = 2**28
"""Most memory for matrices that are factored and may be needed again."""


class Solver:
    """Sets elements of weights to zero by a method.

    Args:
        model: The dense model; its weights are read when they are needed.
        observed: What each weight reads; others cannot be solved.
        method: The method, see `autoprune.importance.masks.methods.solve`.
        damping: Share of the mean diagonal that is added to moments before they are inverted.
        bn: The statistics of batch norms are corrected, so that means of what they read do not matter.
        bias: Biases are corrected, likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        observed: Mapping[str, Sequence[Observed]],
        method: Method,
        damping: float = DAMPING,
        bn: bool = False,
        bias: bool = False,
    ) -> None:
        self._model = model
        self.observed = observed
        self._method = method
        self.damping = damping
        self._bn = bn
        self._bias = bias
        self._layers: OrderedDict[str, list[Layer]] = OrderedDict()

    def of(self, model: nn.Module, observed: Mapping[str, Sequence[Observed]]) -> Solver:
        """The same settings for another network, and what its weights read."""
        return Solver(model, observed, self._method, self.damping, self._bn, self._bias)

    def centred(self, observed: Observed) -> bool:
        """Return whether a bias or batch norm takes care of the mean of what a matrix gives."""
        return (self._bn and observed.normalised) or (self._bias and observed.bias is not None)

    def shifts(self, observed: Observed) -> bool:
        """Return whether the bias of a matrix is corrected; batch norm takes care of it where it can."""
        return self._bias and observed.bias is not None and not (self._bn and observed.normalised)

    def __contains__(self, name: str) -> bool:
        """Return whether a weight can be solved."""
        return name in self.observed

    def layers(self, name: str, slices: Mapping[int, IntArray] | None = None) -> list[Layer]:
        """Equations of each matrix of a weight, without the units that `slices` leave out."""
        if slices:
            return [self._layer(each, slices) for each in self.observed[name]]
        if name not in self._layers:
            self._layers[name] = [self._layer(each, {}) for each in self.observed[name]]
            size = sum(4 * each.products.nbytes for own in self._layers.values() for each in own)
            while size > FACTORED_BYTES and len(self._layers) > 1:
                size -= sum(4 * each.products.nbytes for each in self._layers.popitem(last=False)[1])
        self._layers.move_to_end(name)
        return self._layers[name]

    def solve(self, name: str, pattern: Pattern, zeros: int, slices: Mapping[int, IntArray] | None = None) -> Tensor:
        """The weight with `zeros` of the elements that stay set to zero, in the type of the dense one.

        Args:
            name: Of the weight.
            pattern: Form of the zeros.
            zeros: Number of elements.
            slices: Indices that stay along each dimension; the columns that stay are then re-fitted first.
        """
        dense = self._model.get_parameter(name).detach()
        each = self.observed[name]
        layers = self.layers(name, slices)
        shape = tuple(len((slices or {}).get(dim, range(size))) for dim, size in enumerate(dense.shape))
        if each[0].reader.dim == 0:
            return self._transposed(layers, pattern, zeros, shape).to(dense)
        cells = [layer.weight.numel() for layer in layers]
        counts = _shared(zeros // pattern.each, cells)
        if pattern.rows > 1 and len(layers) > 1:  # blocks may reach across matrices: they go by magnitude
            return _by_mask(layers, pattern, zeros, shape).to(dense)
        solved = [
            solve(layer, self._method, pattern, count * pattern.each)
            for layer, count in zip(layers, counts, strict=True)
        ]
        return weight_of_matrix(torch.cat(solved), shape).to(dense)

    def errors(self, name: str, weight: Tensor) -> tuple[float, float]:
        """Error of a weight relative to the energy of its outputs, and the rise of the model's loss; NaN if unknown."""
        error = energy = loss = 0.0
        for each, layer in zip(self.observed[name], self.layers(name), strict=True):
            rows = weight.T if each.reader.dim == 0 else matrix_of_weight(weight)
            other = rows[each.reader.start : each.reader.start + each.reader.outputs].to(layer.weight)
            own = layer.row_errors(other).cpu()
            error += float(own.sum())
            energy += float(layer.row_errors(torch.zeros_like(layer.weight)).sum())
            curvature = each.curvature
            loss += float("nan") if curvature is None else float((own * curvature).sum())
        return error / max(energy, 1e-30), loss

    def _transposed(self, layers: Sequence[Layer], pattern: Pattern, zeros: int, shape: tuple[int, ...]) -> Tensor:
        """Weights that are stored (inputs, outputs), where patterns other than single elements lie across inputs."""
        (layer,) = layers
        if pattern.rows * pattern.columns == 1:
            return solve(layer, self._method, pattern, zeros).T.contiguous()
        scores = (layer.weight.square() * layer.energies).T
        gone = pattern.mask(scores.reshape(shape), zeros).T
        masked = layer.weight.masked_fill(gone, 0.0)
        fitted = fit_on_support(layer, gone) if self._method in ("sparsegpt", "admm") else masked
        return fitted.T.contiguous()

    def _layer(self, observed: Observed, slices: Mapping[int, IntArray]) -> Layer:
        reader = observed.reader
        parameter = self._model.get_parameter(reader.name).detach()
        weight = matrix_of(parameter, reader)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        products = observed.moments.products(self.centred(observed))
        run = parameter.shape[1] if reader.dim else reader.columns
        if parameter.ndim > 2 and reader.dim:
            places = kernel_last(reader.columns, run).to(weight.device)
            weight = weight[:, places]
            products = products[places][:, places]
        if reader.dim in slices:
            kept = torch.from_numpy(slices[reader.dim]).to(weight.device)
            columns = (torch.arange(reader.columns // run, device=kept.device)[:, None] * run + kept).flatten()
            weight = refitted(weight, products, columns).to(weight.dtype)
            products = products[columns][:, columns]
            run = len(kept)
        if 1 - reader.dim in slices:
            left = slices[1 - reader.dim]
            mine = left[(left >= reader.start) & (left < reader.start + reader.outputs)] - reader.start
            weight = weight[torch.from_numpy(mine).to(weight.device)]
        return Layer(weight.contiguous(), products.to(weight.dtype), run, self.damping)


def _by_mask(layers: Sequence[Layer], pattern: Pattern, zeros: int, shape: tuple[int, ...]) -> Tensor:
    whole = weight_of_matrix(torch.cat([layer.weight for layer in layers]), shape)
    return whole.masked_fill(pattern.mask(whole.square(), zeros), 0.0)


def _shared(count: int, sizes: Sequence[int]) -> list[int]:
    """Divide a number in proportion to sizes, the parts add up."""
    ends: FloatArray = np.cumsum([0, *sizes]) / max(sum(sizes), 1)
    shares: list[int] = np.diff(np.floor(ends * count + 1e-9).astype(int)).tolist()
    return shares
