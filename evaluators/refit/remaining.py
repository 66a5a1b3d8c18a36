"""Errors that a re-fit leaves in the layers that read removed units, for every option of a space at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.evaluators.refit.layers import Layer, columns_kept
from autoprune.importance.dropped import drops_of
from autoprune.importance.reading import matrix_of
from autoprune.protocols import FloatArray, SearchSpace
from autoprune.structure.structure import Structure


def remaining_errors(
    layers: Mapping[str, Sequence[Layer]],
    model: nn.Module,
    structure: Structure,
    space: SearchSpace,
    centred: Callable[[Layer], bool],
) -> tuple[FloatArray | None, ...] | None:
    """Compute the squared error of the layers that read a dimension's units, relative to their energy, after a re-fit.

    The options of a dimension remove ever more columns of a layer. With the columns in the order in which they stay,
    and C + r = L L^T the products of the inputs with the ridge, what the first k columns cannot fit of the output W x
    is the sum over all later columns of |W L|^2, less r |W|^2: one factorisation gives the errors of all options
    (Schur complements; Golub and Van Loan, "Matrix Computations", 4.2.9).

    Args:
        layers: By the name of the weight; with products of all columns, which a sketch does not have.
        model: The dense one.
        structure: Of the model.
        space: Its options alone are priced.
        centred: Whether a bias or batch norm corrects the mean of a layer's output.

    Returns:
        Error of each option alone, summed over the layers, d arrays of shape (sizes[j],), 0 for dense and never
        falling, None for a dimension that drops branches. None where another one does not only remove units, or removes
        none that a known layer reads.
    """
    found: list[FloatArray | None] = []
    for j, size in enumerate(space.sizes):
        row = np.zeros(size)
        if drops_of(space, j):
            found.append(None)
            continue
        kept = _kept(layers, model, structure, space, j)
        if kept is None or (size > 1 and not kept):
            return None
        for layer, options in kept:
            moments = layer.moments
            errors = None
            if moments.sketch_rows == 0 and moments.finite:
                weight = matrix_of(model.get_parameter(layer.reader.name).detach(), layer.reader).double()
                errors = _errors(weight, moments.products(centred(layer)).double(), layer.ridge, options)
            if errors is None:
                return None
            row[list(options)] += errors
        found.append(row)
    return tuple(found)


def _kept(
    layers: Mapping[str, Sequence[Layer]], model: nn.Module, structure: Structure, space: SearchSpace, dimension: int
) -> list[tuple[Layer, dict[int, Tensor]]] | None:
    """Layers that read units of a dimension, each with the columns that every option keeps; None if it does more."""
    found: dict[tuple[str, int], tuple[Layer, dict[int, Tensor]]] = {}
    for option in range(1, int(space.sizes[dimension])):
        edit = structure.edit(space.pruning([option if j == dimension else 0 for j in range(len(space.sizes))]))
        if edit.dropped or edit.zeroed:
            return None
        for name in edit.slices.keys() & layers.keys():
            for layer in layers[name]:
                columns = columns_kept(layer.reader, model, edit)
                if columns is not None:
                    found.setdefault((name, layer.reader.start), (layer, {}))[1][option] = columns
    return [found[key] for key in sorted(found)]


def _errors(weight: Tensor, products: Tensor, ridge: float, kept: Mapping[int, Tensor]) -> FloatArray | None:
    """Relative errors of a layer whose columns `kept` stay, shape (options,); None where options are not nested."""
    columns = weight.shape[1]
    stays = torch.zeros(columns, dtype=torch.int64, device=weight.device)
    for each in kept.values():
        stays[each] += 1
    order = torch.argsort(stays, descending=True, stable=True)
    if any(set(order[: len(each)].tolist()) != set(each.tolist()) for each in kept.values()):
        return None
    weight, products = weight[:, order], products[order][:, order]
    shared = weight.T @ weight * products
    energy = float(shared.sum())
    if not energy > 0:
        return np.zeros(len(kept))
    if not np.isfinite(ridge):  # no fit: what the removed columns add
        lost = shared.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    else:
        held = ridge * products.diagonal().mean()
        factor, failed = torch.linalg.cholesky_ex(products + torch.diag_embed(held.expand(columns)))
        if int(failed):
            return None
        alone = (weight @ factor).square().sum(0) - held * weight.square().sum(0)
        lost = alone.flip(0).cumsum(0).flip(0)
    lost = torch.cat([lost, lost.new_zeros(1)])[[len(each) for each in kept.values()]]
    errors: FloatArray = np.maximum(lost.cpu().numpy() / energy, 0.0)
    return errors
