"""Methods that set elements of a layer to zero, by name: which go, and how the others make up for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from autoprune.importance.masks.layer import Layer
from autoprune.importance.masks.scores import magnitude, ria, wanda
from autoprune.importance.masks.support import fit_on_support
from autoprune.importance.masks.surgeon import sparse_gpt
from autoprune.structure.slicing.zeros import Pattern

Method = Literal["magnitude", "wanda", "ria", "sparsegpt", "admm"]
METHODS = get_args(Method)


def solve(layer: Layer, method: Method, pattern: Pattern, zeros: int) -> Tensor:
    """Set `zeros` elements of a layer to zero.

    Args:
        layer: Matrix and moments.
        method: ``"magnitude"``, ``"wanda"`` and ``"ria"`` leave other elements as they are; ``"sparsegpt"`` corrects
            them; ``"admm"`` takes the mask of SparseGPT, and then fits all that stay at once.
        pattern: Form of the zeros.
        zeros: Number of elements.

    Returns:
        Weights, shape (outputs, columns).
    """
    if method == "sparsegpt":
        return sparse_gpt(layer, pattern, zeros)
    if method == "admm":
        made = sparse_gpt(layer, pattern, zeros)
        # A weight may come out as zero by chance, and then stays zero: the mask is at least as large as asked for.
        return fit_on_support(layer, made == 0, made)
    return layer.weight.masked_fill(SCORED[method](layer, pattern, zeros), 0.0)


def _by_magnitude(layer: Layer, pattern: Pattern, zeros: int) -> Tensor:
    return mask_of(magnitude(layer.weight), layer.run, pattern, zeros)


def _by_wanda(layer: Layer, pattern: Pattern, zeros: int) -> Tensor:
    """Compare single elements within each output, which all lose the same share; cells as they come."""
    scores = wanda(layer.weight, layer.energies)
    if pattern.rows * pattern.columns > 1:
        return mask_of(scores, layer.run, pattern, zeros)
    each, rest = divmod(zeros, len(scores))
    counts = torch.full((len(scores), 1), each, device=scores.device)
    counts[:rest] += 1
    return scores.argsort(dim=1, stable=True).argsort(dim=1) < counts


def _by_ria(layer: Layer, pattern: Pattern, zeros: int) -> Tensor:
    return mask_of(ria(layer.weight, layer.energies), layer.run, pattern, zeros)


def mask_of(scores: Tensor, run: int, pattern: Pattern, zeros: int) -> Tensor:
    """Mark the elements of a matrix that go, by scores (outputs, columns) of columns in runs of neighbours."""
    if run == scores.shape[1]:
        return pattern.mask(scores, zeros)
    by_channel = scores.view(len(scores), -1, run).movedim(-1, 1)
    return pattern.mask(by_channel, zeros).movedim(1, -1).flatten(1)


SCORED: dict[str, Callable[[Layer, Pattern, int], Tensor]] = {
    "magnitude": _by_magnitude,
    "wanda": _by_wanda,
    "ria": _by_ria,
}
"""Methods that leave the other elements as they are: the mask, bool, shape (outputs, columns)."""
