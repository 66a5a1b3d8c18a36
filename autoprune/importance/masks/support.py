"""Update on a support: the weights that stay, so that the outputs of a layer change least for a given mask."""

from __future__ import annotations

import torch
from torch import Tensor

from autoprune.importance.masks.layer import Layer

STEPS = 10
"""Steps of an update: on Gaussian inputs ten take 0.996 of what forty do."""


def fit_on_support(layer: Layer, gone: Tensor, start: Tensor | None = None, steps: int = STEPS) -> Tensor:
    """Minimise the error of a layer over the weights that stay, by the alternating direction method of multipliers.

    It converges to constrained least squares with the damping of the layer. Inputs are scaled to equal energy, as the
    paper does, where a penalty of 1 serves all layers; one factorisation serves all masks.

    Args:
        layer: Matrix and moments.
        gone: Elements that are zero, bool, shape (outputs, columns).
        start: Weights to begin with, zero on the mask; those of the layer by default.
        steps: Number of steps; the error falls quickly at first.

    Returns:
        Weights that are zero on the mask, shape (outputs, columns): no row has a larger error than at the beginning.

    Reference:
        Boza, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024, arXiv:2401.02938.
    """
    begun = (layer.weight if start is None else start).masked_fill(gone, 0.0)
    scale, inverse = layer.penalised
    target = (layer.weight @ layer.damped) / scale  # W H in scaled inputs
    found = begun * scale
    dual = torch.zeros_like(found)
    for _ in range(steps):
        free = (target + (found - dual)) @ inverse
        found = (free + dual).masked_fill_(gone, 0.0)
        dual += free - found
    return layer.better(found / scale, begun)
