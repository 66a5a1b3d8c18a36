"""Equations of one layer: the matrix, the second moments of its inputs, and one factorisation for all levels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DAMPING = 1e-2
"""Share of the mean diagonal of the moments that is added to them before they are inverted."""


@dataclass(frozen=True, eq=False)
class Layer:
    """Matrix W that multiplies inputs x, with the error of any other matrix: E |(V - W) x|^2.

    Columns of a convolution are ordered by position of the kernel, then by channel, so that neighbouring inputs are
    neighbouring columns; see `matrix_of_weight`.

    Attributes:
        weight: W, float32 or float64, shape (outputs, columns).
        products: H = E[x x^T], or the covariance where a bias takes care of means, same dtype, (columns, columns).
        run: Columns of one position of a kernel; patterns do not reach across.
        damping: Share of the mean diagonal of H that is added to it where it is inverted.
    """

    weight: Tensor
    products: Tensor
    run: int
    damping: float = DAMPING

    @cached_property
    def damped(self) -> Tensor:
        """H with the damping on its diagonal, shape (columns, columns)."""
        matrix = self.products.clone()
        mean = float(matrix.diagonal().mean())
        matrix.diagonal().add_(self.damping * mean if mean > 0 else 1.0)
        return matrix

    @cached_property
    def factor(self) -> Tensor:
        """Upper triangle U with U^T U the inverse of damped H, shape (columns, columns); found in float64.

        Row i holds the i-th row of the inverse after the columns before it are gone, over the root of its diagonal.
        """
        root = torch.linalg.cholesky(self.damped.double())
        upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
        return upper.to(self.weight.dtype)

    @cached_property
    def penalised(self) -> tuple[Tensor, Tensor]:
        """Root of the energy of each damped input, shape (columns,), and the inverse of the scaled moments plus one."""
        scale = self.damped.diagonal().sqrt()
        matrix = (self.damped / scale / scale[:, None]).double()
        matrix.diagonal().add_(1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        return scale, inverse.to(self.weight.dtype)

    @property
    def energies(self) -> Tensor:
        """Mean square of each input, shape (columns,)."""
        return self.products.diagonal()

    def row_errors(self, other: Tensor) -> Tensor:
        """Mean squared error of each output with another matrix, float64, shape (outputs,)."""
        change = (other - self.weight).to(self.products.dtype)
        return ((change @ self.products) * change).sum(1, dtype=torch.float64).clamp(min=0)

    def better(self, made: Tensor, plain: Tensor) -> Tensor:
        """Rows of `made` where their error is no larger than with `plain`, else rows of `plain`."""
        worse = self.row_errors(made) > self.row_errors(plain)
        return torch.where(worse[:, None], plain, made)


def matrix_of_weight(weight: Tensor) -> Tensor:
    """Matrix of a weight (outputs, inputs, ...), columns by position of the kernel, then by input."""
    return weight if weight.ndim == 2 else weight.movedim(1, -1).flatten(1)


def weight_of_matrix(matrix: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Weight of this shape from its matrix; undoes `matrix_of_weight`."""
    if len(shape) == 2:
        return matrix
    return matrix.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def kernel_last(columns: int, run: int) -> Tensor:
    """Places of the columns of `matrix_of_weight` in the flattened weight, int64, shape (columns,)."""
    return torch.arange(columns).view(run, columns // run).T.flatten()
