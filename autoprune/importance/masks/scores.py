"""Scores of single weights: what each element of a matrix is worth. Lower scores are set to zero first."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """Squares of the elements: the order of magnitudes, and sums over blocks are energies; shape of `weight`."""
    return weight.square()


def wanda(weight: Tensor, energies: Tensor) -> Tensor:
    """Squares of |w_ij| ||x_j||, to be compared within each output; shape (outputs, columns).

    Args:
        weight: Matrix W, shape (outputs, columns).
        energies: Mean square of each input, shape (columns,).

    Reference:
        Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, arXiv:2306.11695;
        squared here, so that sums over blocks are energies, which changes no order.
    """
    return weight.square() * energies


def ria(weight: Tensor, energies: Tensor, power: float = 0.5) -> Tensor:
    """Relative importance times activations: (|w_ij| / sum of its row + |w_ij| / sum of its column) ||x_j||^power.

    Squared, as `wanda`; shape (outputs, columns).

    Reference:
        Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024.
    """
    sizes = weight.abs()
    tiny = torch.finfo(sizes.dtype).tiny
    relative = sizes / sizes.sum(1, keepdim=True).clamp(min=tiny) + sizes / sizes.sum(0, keepdim=True).clamp(min=tiny)
    return relative.square() * energies**power


def lamp(weight: Tensor) -> Tensor:
    """Square of each element over the sum of all squares at least as large, comparable between weights.

    Float64, shape of `weight`. Of equal elements the later one has the larger score.

    Reference:
        Lee et al., "Layer-adaptive sparsity for the Magnitude-based Pruning", ICLR 2021, arXiv:2010.07611.
    """
    squares = weight.detach().double().flatten().square()
    order = squares.argsort(stable=True)
    rising = squares[order]
    left = rising.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = rising / left.clamp(min=torch.finfo(torch.float64).tiny)
    return scores.view(weight.shape)
