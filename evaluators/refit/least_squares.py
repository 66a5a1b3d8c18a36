"""Least squares: fit the weights of the inputs that stay to the outputs of all inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.importance.moments import Moments

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges to choose from, as shares of the mean square of the inputs."""


@dataclass(frozen=True)
class Normal:
    """The normal equations of one layer, from its moments.

    Attributes:
        moments: Of its inputs.
        centred: Whether a bias, or batch norm, corrects the mean.
    """

    moments: Moments
    centred: bool

    def change(self, weight: Tensor, kept: Tensor, ridge: float) -> Tensor:
        """Change of the weights that stay, float of the moments, shape (outputs, k); see `changes`."""
        return next(self.changes(weight, kept, [ridge]))

    def changes(self, weight: Tensor, kept: Tensor, ridges: Sequence[float]) -> Iterator[Tensor]:
        """Changes of the weights W that stay, with each ridge, as `least_squares` gives them."""
        if self.moments.sketch_rows:
            gone = others(kept, weight.shape[1])
            yield from self._from_sketch(weight.index_select(1, gone), gone, kept, ridges)
        else:
            yield from least_squares(weight, self.moments.products(self.centred), kept, ridges)

    def _from_sketch(self, lost: Tensor, gone: Tensor, kept: Tensor, ridges: Sequence[float]) -> Iterator[Tensor]:
        """Changes from few rows R: D^T = R_S^T (R_S R_S^T + r)^-1 R_gone W_gone^T, where the inverse is small."""
        rows = self.moments.factor(self.centred)
        stay = rows.index_select(1, kept)
        wanted = rows.index_select(1, gone) @ lost.to(rows.dtype).T
        scale = len(rows) / max(len(kept), 1)  # `_factors` takes the ridge from the mean of the diagonal
        for factor in _factors(stay @ stay.T, [ridge * scale for ridge in ridges]):
            solved = torch.zeros_like(wanted) if factor is None else torch.cholesky_solve(wanted, factor)
            yield (stay.T @ solved).T


def least_squares(weight: Tensor, products: Tensor, kept: Tensor, ridges: Sequence[float]) -> Iterator[Tensor]:
    """Changes of the weights that stay that bring a layer's outputs nearest to those of all its inputs.

    The change D from the weights that stay minimises E|W x - (W_S + D) x_S|^2 + r |D|^2, r being a ridge times the mean
    of E[x_S^2]. So the error never exceeds that of the inherited weights, whatever the ridge is, and inputs that are
    always zero keep theirs; He et al. shrink the weights themselves, which promises neither. Where the equations cannot
    be solved in the precision that they are given in, nothing changes.

    Args:
        weight: W, shape (outputs, inputs).
        products: E[x x^T], or the covariance for an error about the mean, float, shape (inputs, inputs).
        kept: Indices S of the inputs that stay, int64, shape (k,).
        ridges: Positive.

    Returns:
        D for each ridge, of the type of `products`, shape (outputs, k).
    """
    gone = others(kept, weight.shape[1])
    lost = weight.index_select(1, gone).to(products.dtype)  # `index_select` takes a fifth of the time of brackets
    cross = products.index_select(0, gone).index_select(1, kept)
    few = len(cross) < len(lost)  # then each input that goes is fitted by those that stay, whatever reads it
    wanted = cross if few else lost @ cross
    for factor in _factors(products.index_select(0, kept).index_select(1, kept), ridges):
        fitted = torch.zeros_like(wanted) if factor is None else torch.cholesky_solve(wanted.T, factor).T
        yield lost @ fitted if few else fitted


def others(kept: Tensor, size: int) -> Tensor:
    """Indices below `size` that are not in `kept`, ascending, int64."""
    gone = torch.ones(size, dtype=torch.bool, device=kept.device)
    gone[kept] = False
    return gone.nonzero()[:, 0]


def _factors(matrix: Tensor, ridges: Sequence[float]) -> Iterator[Tensor | None]:
    """Cholesky factors with each ridge, relative to the mean of the diagonal; None where there is none."""
    diagonal = matrix.diagonal().clone()
    scale = float(diagonal.mean()) if len(diagonal) else 0.0
    for ridge in ridges:
        factor = None
        if scale > 0 and math.isfinite(scale):
            matrix.diagonal().copy_(diagonal + ridge * scale)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            # What is not finite in a row makes its last entry so, too.
            factor = None if int(failed) or not factor.diagonal().isfinite().all() else factor
        yield factor
