"""Downdates: remove the units of a group one after the other, each time the one that costs least after a re-fit.

Reference:
    Structured optimal brain surgeon: Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models",
    NeurIPS 2023, arXiv:2302.04089. Blocks of columns: Ling et al., "SlimGPT: Layer-wise Structured Pruning for Large
    Language Models", NeurIPS 2024, arXiv:2412.18110. Here errors are weighted by the curvature of the loss, all layers
    that read a unit count together, and updates wait until a panel of columns is full, as in a blocked factorisation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from autoprune.importance.database.parts import RIDGE, Part
from autoprune.protocols import FloatArray, IntArray

PANEL = 64
"""Columns removed between two updates of whole matrices."""


def remove_greedily(parts: Sequence[Part], ridge: float = RIDGE) -> tuple[IntArray, FloatArray]:
    """Order the units of a group by removal, with the least error of every number removed.

    The error of a removal is that of all layers, tr(G E H E^T), after the best change D of the weights that stay, plus
    the ridge times tr(G D D^T), by which the change is held to the inherited weights. So it is never above that of the
    same units without a change.

    Args:
        parts: At least one, all with the same number of units.
        ridge: Share of the mean diagonal of H.

    Returns:
        Units in the order of removal, the last one stays longest, int64, shape (units,); and the error with the first
        0, 1, ... and at last all units of it removed, float64, shape (units + 1,).
    """
    units = len(parts[0].owned)
    alike: dict[tuple[int, int], list[Part]] = defaultdict(list)
    inherited = _Inherited([part for part in parts if not part.refitted], units)
    for part in parts:
        if part.refitted and part.ridge(ridge) > 0:  # inputs that are always zero cost nothing
            alike[len(part.products), part.owned.shape[1]].append(part)
    stacks = [_Stack(each, ridge) for each in alike.values()]
    left = np.ones(units, dtype=bool)
    removal: list[int] = []
    errors = [0.0]
    for _ in range(units):
        scores = inherited.scores()
        for stack in stacks:
            scores += stack.scores()
        scores[~left] = np.inf
        unit = int(scores.argmin())
        left[unit] = False
        removal.append(unit)
        errors.append(errors[-1] + max(0.0, float(scores[unit])))
        inherited.remove(unit)
        for stack in stacks if left.any() else ():
            stack.remove(unit)
    return np.array(removal, dtype=np.int64), np.array(errors)


class _Inherited:
    """Layers that keep their weights: the loss of a set of units is the sum over all pairs of them."""

    def __init__(self, parts: Sequence[Part], units: int) -> None:
        self._pairs = np.zeros((units, units))
        for part in parts:
            order = part.owned.reshape(-1)
            products = (part.products * part.slopes)[order][:, order]
            members = part.owned.shape[1]
            self._pairs += products.reshape(units, members, units, members).sum((1, 3)).cpu().numpy()
        self._scores: FloatArray = self._pairs.diagonal().copy()

    def scores(self) -> FloatArray:
        return self._scores.copy()

    def remove(self, unit: int) -> None:
        self._scores += 2 * self._pairs[unit]


class _Stack:
    """Layers with equally many columns, all at once: inverse products and slopes after the removals so far.

    Whole matrices are those before the panel; blocks of columns that single units own are up to date.
    """

    def __init__(self, parts: Sequence[Part], ridge: float) -> None:
        units = len(parts[0].owned)
        self._owned = torch.stack([part.owned for part in parts])  # parts, units, members
        self._at = np.arange(units)  # place of each unit among those in the matrices; -1 when it is gone
        self._inverse = torch.stack([_inverse(part.products, part.ridge(ridge)) for part in parts])
        self._slopes = torch.stack([part.slopes for part in parts])
        self._inverses = self._blocks(self._inverse)
        self._weights = self._blocks(self._slopes)
        # The ridge holds changes only: what it adds for columns that go is known from the start.
        shares = self._weights.diagonal(dim1=-2, dim2=-1).sum(-1)
        ridges = torch.tensor([part.ridge(ridge) for part in parts], dtype=shares.dtype, device=shares.device)
        self._owed: FloatArray = (ridges @ shares).cpu().numpy()
        self._clear()

    def scores(self) -> FloatArray:
        """Loss of removing each unit next, shape (units,); of no meaning for units that are gone."""
        if self._inverses.shape[-1] == 1:
            each = (self._weights / self._inverses).flatten(2).sum(2)
        else:
            factors = torch.linalg.cholesky(self._inverses)
            each = torch.cholesky_solve(self._weights, factors).diagonal(dim1=-2, dim2=-1).sum(-1)
        found = np.zeros(len(self._at))
        here = self._at >= 0
        found[here] = each.sum(0).cpu().numpy()[self._at[here]]
        return found - self._owed

    def remove(self, unit: int) -> None:
        place = int(self._at[unit])
        self._at[unit] = -1
        columns = self._owned[:, place]  # parts, members
        root, fall, change = self._downdate(columns)
        for panel, new in zip(self._panel, (root, fall, change), strict=True):
            panel[:, :, self._filled : self._filled + new.shape[2]] = new
        self._filled += columns.shape[1]
        if self._filled >= PANEL:
            self._flush()
        else:
            own = [self._own(each) for each in (root, fall, change)]
            self._inverses = self._inverses - own[0] @ own[0].mT
            mixed = own[1] @ own[2].mT
            self._weights = self._weights - mixed - mixed.mT
            # A unit that is gone has no block: the identity stands in, so that factors exist.
            self._inverses[:, place] = torch.eye(columns.shape[1], dtype=root.dtype, device=root.device)

    def _downdate(self, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors (L, B, V), each (parts, columns, members), of a removal: H^-1 - L L^T, and slopes - B V^T - V B^T.

        With R = H^-1[:, S] and A = H^-1[S, S] = C C^T: L = R C^-T; the change of the weights is -W_S A^-1 R^T, so that
        B = R A^-1, and V = K_S - B K_SS / 2 from the slopes K.
        """
        right = _rows(self._inverse, columns).mT  # rows of symmetric matrices lie together in memory, columns do not
        slopes = _rows(self._slopes, columns).mT
        if self._filled:
            root, fall, change = (panel[:, :, : self._filled] for panel in self._panel)
            right = right - root @ _rows(root, columns).mT
            slopes = slopes - fall @ _rows(change, columns).mT - change @ _rows(fall, columns).mT
        factor = torch.linalg.cholesky(_rows(right, columns))
        root = torch.linalg.solve_triangular(factor, right.mT, upper=False).mT
        fall = torch.linalg.solve_triangular(factor.mT, root.mT, upper=True).mT
        return root, fall, slopes - 0.5 * fall @ _rows(slopes, columns)

    def _flush(self) -> None:
        """Update the whole matrices."""
        root, fall, change = (panel[:, :, : self._filled] for panel in self._panel)
        self._inverse.baddbmm_(root, root.mT, alpha=-1)
        self._slopes.baddbmm_(fall, change.mT, alpha=-1).baddbmm_(change, fall.mT, alpha=-1)
        self._drop()
        self._clear()
        self._inverses = self._blocks(self._inverse)
        self._weights = self._blocks(self._slopes)

    def _clear(self) -> None:
        """Begin a panel."""
        room = (*self._inverse.shape[:2], PANEL + self._owned.shape[2])
        self._panel = [self._inverse.new_zeros(room) for _ in range(3)]
        self._filled = 0

    def _drop(self) -> None:
        """Leave out the columns of units that are gone."""
        count = self._owned.shape[1]
        stays = np.zeros(count, dtype=bool)
        stays[self._at[self._at >= 0]] = True
        device = self._owned.device
        parts, width = self._inverse.shape[:2]
        kept = torch.ones(parts, width, dtype=torch.bool, device=device)
        kept.scatter_(1, self._owned[:, torch.from_numpy(~stays).to(device)].flatten(1), False)
        index = kept.nonzero()[:, 1].reshape(parts, -1)
        place = (kept.cumsum(1) - 1).gather(1, self._owned[:, torch.from_numpy(stays).to(device)].flatten(1))
        self._owned = place.reshape(parts, int(stays.sum()), -1)
        self._inverse, self._slopes = (_square(each, index) for each in (self._inverse, self._slopes))
        moved = np.cumsum(stays) - 1
        self._at = np.where(self._at >= 0, moved[self._at], -1)

    def _blocks(self, matrices: Tensor) -> Tensor:
        """Blocks of the columns of each unit, shape (parts, units, members, members)."""
        parts = torch.arange(len(matrices), device=matrices.device)[:, None, None, None]
        return matrices[parts, self._owned[..., :, None], self._owned[..., None, :]]

    def _own(self, columns: Tensor) -> Tensor:
        """Rows of (parts, columns, k) that each unit owns, shape (parts, units, members, k)."""
        rows = _rows(columns, self._owned.flatten(1))
        return rows.reshape(*self._owned.shape, columns.shape[2])


def _rows(matrices: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (parts, k) of matrices (parts, columns, n), shape (parts, k, n)."""
    return matrices[torch.arange(len(matrices), device=matrices.device)[:, None], index]


def _square(matrices: Tensor, index: Tensor) -> Tensor:
    """Rows and columns `index` (parts, k) of matrices."""
    chosen = _rows(matrices, index)
    return chosen.gather(2, index[:, None, :].expand(-1, chosen.shape[1], -1))


def _inverse(products: Tensor, ridge: float) -> Tensor:
    matrix = products.clone()
    matrix.diagonal().add_(ridge)
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
