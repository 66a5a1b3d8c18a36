"""Parts: the equations of all layers that read a group, in columns of the units of that group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoprune.importance.reading import Reader

RIDGE = 1e-3
"""Default strength by which a re-fit is held to the inherited weights, as a share of the mean square of the inputs.

Reference:
    GRAIL, arXiv:2602.23795.
"""


@dataclass(frozen=True, eq=False)
class Part:
    """Layers that multiply the same inputs x, as far as a group is concerned.

    With the weights W of the layers and an error E of them, the loss rises by tr(G E H E^T). Removing columns changes
    the others in the same way whatever G is, so that W^T G W stands for both G and W.

    Attributes:
        products: H = E[x x^T], or the covariance, float64, shape (columns, columns).
        slopes: W^T G W in units of the loss, float64, shape (columns, columns).
        owned: Columns of each unit, int64, shape (units, members).
        refitted: Whether the weights of the other columns make up for those that go.
        readers: The weights.
        influence: Sketch of the products of inputs and gradients, in square roots of the loss, shape (buckets,
            columns); None where it is not known.
        rows: Number of rows that H is an average over; 0 if unknown.
    """

    products: Tensor
    slopes: Tensor
    owned: Tensor
    refitted: bool = True
    readers: tuple[Reader, ...] = ()
    influence: Tensor | None = None
    rows: int = 0

    def ridge(self, share: float) -> float:
        """The ridge in the unit of `products`: a share of their mean diagonal."""
        return share * float(self.products.diagonal().mean())

    def freedom(self, share: float) -> float:
        """Degrees of freedom of a re-fit on all columns with this ridge, as a share of the rows, at most 1."""
        ridge = self.ridge(share)
        if not (self.refitted and self.rows and ridge > 0):
            return 0.0
        matrix = self.products.clone()
        matrix.diagonal().add_(ridge)
        root = torch.linalg.cholesky(matrix)
        inverse = torch.linalg.solve_triangular(root, torch.eye(len(root)).to(root), upper=False)
        # tr(H (H + r)^-1), and a square of the inverse root sums up to the trace of the inverse.
        return min(1.0, (len(root) - ridge * float(inverse.square().sum())) / self.rows)


def refitted(weight: Tensor, products: Tensor, kept: Tensor, ridge: float = RIDGE) -> Tensor:
    """Weights on the columns that stay, nearest to the outputs of all columns.

    The change D minimises E|W x - (W_S + D) x_S|^2 + r |D|^2, with r the ridge times the mean diagonal of H; these are
    the weights whose errors a database holds.

    Args:
        weight: W, shape (outputs, columns).
        products: H, shape (columns, columns).
        kept: Columns S that stay, int64, shape (k,).
        ridge: Share of the mean diagonal of H.

    Returns:
        W_S + D, float64, shape (outputs, k).
    """
    gone = torch.ones(len(products), dtype=torch.bool, device=products.device)
    gone[kept] = False
    whole, exact = products.double(), weight.double()
    matrix = whole[kept][:, kept]
    matrix.diagonal().add_(ridge * whole.diagonal().mean())
    lost = exact[:, gone] @ whole[gone][:, kept]
    change: Tensor = torch.linalg.solve(matrix, lost.T).T
    return exact[:, kept] + change
