"""Influence: how far what a layer reads of a unit changes the loss, position by position, in a sketch of some rows.

Moments of inputs and of gradients apart misprice a layer where large inputs meet small gradients, as at the first token
of many language models, and where positions act together, as under a mean over them. The products of both do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from autoprune.importance.database.parts import RIDGE, Part
from autoprune.protocols import FloatArray, IntArray

BUCKETS = 64
"""Rows of a sketch; a sum of squares over more is estimated to about 18 %."""
_MIX = 2654435761  # Knuth's multiplicative hash


@dataclass(eq=False)
class Influence:
    """Sketch of products of inputs x and what comes back through the weights, W^T g, element by element.

    Products of one call of a layer are added to those of the others that read the same input, and over the positions of
    a sample if the loss is one for all of them; positions with a loss of their own count as independent.
    """

    columns: int
    _products: Tensor | None = field(default=None, repr=False)
    _returned: Tensor | None = field(default=None, repr=False)
    _inputs: list[Tensor] = field(default_factory=list, repr=False)
    _slopes: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _calls: dict[object, int] = field(default_factory=dict, repr=False)

    def read(self, rows: Tensor) -> None:
        """Take what a call multiplies, shape (n, columns)."""
        self._inputs.append(rows)

    def receive(self, reader: object, rows: Tensor) -> None:
        """Take what comes back to the latest call of a reader that is not answered yet, shape (n, columns)."""
        call = self._calls.get(reader, len(self._inputs)) - 1
        self._calls[reader] = call
        if call >= 0 and self._inputs[call].shape == rows.shape:
            self._slopes[call] = self._slopes[call] + rows if call in self._slopes else rows

    def end(self, first: int, samples: int, mask: Tensor | None, apart: bool) -> None:
        """End a backward pass.

        Args:
            first: Number of its first sample or position among all.
            samples: Number of samples in it.
            mask: True at real positions, bool, shape (samples, positions); None without padding.
            apart: Whether positions have losses of their own.
        """
        for call, rows in self._slopes.items():
            if self._products is None or self._returned is None:
                self._products, self._returned = rows.new_zeros(2, BUCKETS, self.columns, dtype=torch.float64)
            numbers = torch.arange(len(rows)) if apart else _samples(len(rows), samples, mask)
            numbers = (first + numbers).to(rows.device)
            signs = torch.where((numbers * _MIX % 2**32 >> 20) % 2 == 1, -1.0, 1.0).double()[:, None]
            self._products.index_add_(0, numbers % BUCKETS, (self._inputs[call] * rows).double() * signs)
            self._returned.index_add_(0, numbers % BUCKETS, rows.double() * signs)
        self._inputs.clear()
        self._slopes.clear()
        self._calls.clear()

    def sums(self, mean: Tensor | None) -> Tensor | None:
        """The sketch of inputs less their mean, shape (BUCKETS, columns); None where nothing came back."""
        if self._products is None or self._returned is None or mean is None:
            return self._products
        return self._products - mean * self._returned


def losses_of(parts: Sequence[Part], removal: IntArray, errors: FloatArray, ridge: float = RIDGE) -> FloatArray:
    """Losses of every number of units removed, in the order of removal.

    Each is the loss without a re-fit, from the products of inputs and gradients of all layers together, times the share
    of the error that the re-fit leaves on new rows: more than on those that it is fitted to, by (1 + f) / (1 - f) for f
    degrees of freedom a row, and never more than all of it.

    Args:
        parts: Equations of the group.
        removal: Units in the order of removal, shape (units,).
        errors: Errors after a re-fit, shape (units + 1,), see `remove_greedily`.
        ridge: Of the re-fit.

    Returns:
        Losses, never falling, shape (units + 1,); the errors themselves where a product is not known.

    Reference:
        New rows: Akaike, "Fitting autoregressive models for prediction", Ann. Inst. Stat. Math. 21, 1969,
        doi:10.1007/BF02532251; degrees of freedom in proportion to the units that stay.
    """
    influences = [part.influence for part in parts]
    order = torch.from_numpy(removal)
    plain = np.zeros(len(removal))
    single = torch.zeros(len(removal), BUCKETS, dtype=torch.float64)
    for part, influence in zip(parts, influences, strict=True):
        if influence is None:
            return errors
        columns = part.owned[order.to(part.owned.device)]
        single += influence.double()[:, columns].sum(2).T.cpu()
        index = columns.flatten()
        pairs = (part.products * part.slopes)[index][:, index]
        members = columns.shape[1]
        between = pairs.reshape(len(order), members, len(order), members).sum((1, 3))
        # The sum over the first k rows and columns grows by twice the new row's part before the diagonal, and that.
        plain += (2 * between.tril(-1).sum(1) + between.diagonal()).cumsum(0).cpu().numpy()
    loss = single.cumsum(0).square().sum(1).numpy()
    left = np.divide(errors[1:], plain, out=np.ones_like(plain), where=plain > 0)
    freedom = max(part.freedom(ridge) for part in parts) * (1 - np.arange(1, len(plain) + 1) / len(plain))
    left = np.clip(left * (1 + freedom) / np.maximum(1 - freedom, 1e-3), 0.0, 1.0)
    found: FloatArray = np.maximum.accumulate(np.append(0.0, loss * left))
    return found


def _samples(rows: int, samples: int, mask: Tensor | None) -> Tensor:
    """Sample of each row, int64, shape (rows,): rows of a sample follow each other."""
    if mask is not None and int(mask.sum()) == rows:
        return mask.cpu().nonzero()[:, 0]
    if samples and rows % samples == 0:
        return torch.arange(samples).repeat_interleave(rows // samples)
    return torch.zeros(rows, dtype=torch.int64)
