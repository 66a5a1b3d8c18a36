"""Patterns of zeros in a weight: single elements, N of M neighbours, or blocks."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

UNSTRUCTURED = "unstructured"
_FORMS = "'unstructured', N of M inputs that stay such as '2:4', or a block of outputs x inputs such as '4x4'"


@dataclass(frozen=True)
class Pattern:
    """Form in which elements of a weight are set to zero.

    A weight of shape (outputs, inputs, ...) is cut into cells of `rows` outputs times `columns` neighbouring inputs, at
    each position of a kernel apart. What is left over at the edges belongs to no cell and stays.

    Attributes:
        rows: Outputs in a cell.
        columns: Inputs in a cell.
        stay: Elements of each cell that stay, in every cell; 0 where some cells go as a whole, as many as a level says.
    """

    rows: int = 1
    columns: int = 1
    stay: int = 0

    @classmethod
    def parse(cls, name: str) -> Pattern:
        """Make the pattern of a name: ``"unstructured"``, N:M such as ``"2:4"``, or a block such as ``"1x8"``.

        Raises:
            ValueError: If it is none of these.
        """
        if name == UNSTRUCTURED:
            return cls()
        if isinstance(name, str) and (found := re.fullmatch(r"([1-9]\d{0,3})(:|x)([1-9]\d{0,3})", name)):
            first, second = int(found[1]), int(found[3])
            if found[2] == "x" and first * second > 1:
                return cls(first, second)
            if found[2] == ":" and first < second:
                return cls(1, second, first)
        raise ValueError(f"pattern must be {_FORMS}, got {name!r:.60}")

    @property
    def name(self) -> str:
        """Name that `parse` takes."""
        if self.stay:
            return f"{self.stay}:{self.columns}"
        return f"{self.rows}x{self.columns}" if self.rows * self.columns > 1 else UNSTRUCTURED

    @property
    def each(self) -> int:
        """Zeros in a cell that has some."""
        return self.rows * self.columns - self.stay

    def cells(self, shape: tuple[int, ...]) -> int:
        """Number of cells in a weight of this shape."""
        if self.rows * self.columns == 1:
            return math.prod(shape)
        if len(shape) < 2:
            return 0
        return (shape[0] // self.rows) * (shape[1] // self.columns) * math.prod(shape[2:])

    def zeros(self, shape: tuple[int, ...], level: float = 1.0) -> int:
        """Elements set to zero in a weight of this shape; `level` is the share of cells, as its decimal notation."""
        share = Fraction(1) if self.stay else Fraction(str(level))
        return math.floor(share * self.cells(shape)) * self.each

    def mask(self, scores: Tensor, zeros: int) -> Tensor:
        """Mark the elements that are set to zero: those of least score, or the blocks of least sum.

        Args:
            scores: What each element is worth, not negative, shape (outputs, inputs, ...).
            zeros: Number of elements; those of this pattern are multiples of `each`.

        Returns:
            True where an element goes, bool, shape of `scores`.
        """
        if self.rows * self.columns == 1:
            return _least(scores.flatten(), zeros).view(scores.shape)
        cells = self._cells_of(scores)
        if self.stay:
            gone = cells.argsort(dim=-1, stable=True).argsort(dim=-1) < self.each
        else:
            gone = _least(cells.sum(-1).flatten(), zeros // self.each).view(cells.shape[:-1])[..., None]
            gone = gone.expand(cells.shape)
        return self._restored(gone, scores.shape)

    def holds(self, weight: Tensor) -> bool:
        """Return whether every cell has zeros as the pattern says: enough of them, or everywhere or nowhere."""
        if self.rows * self.columns == 1:
            return True
        zeros = (self._cells_of(weight) == 0).sum(-1)
        if self.stay:
            return bool((zeros >= self.each).all())
        return bool(((zeros == 0) | (zeros == self.each)).all())

    def _cells_of(self, weight: Tensor) -> Tensor:
        """Elements of each cell, shape (*kernel, outputs // rows, inputs // columns, rows * columns)."""
        a, b = weight.shape[0] // self.rows, weight.shape[1] // self.columns
        whole = weight[: a * self.rows, : b * self.columns].movedim((0, 1), (-2, -1))
        parts = whole.reshape(*whole.shape[:-2], a, self.rows, b, self.columns)
        return parts.movedim(-3, -2).flatten(-2)

    def _restored(self, cells: Tensor, shape: torch.Size) -> Tensor:
        """Marks of elements from those of the cells; False at the edges."""
        a, b = shape[0] // self.rows, shape[1] // self.columns
        parts = cells.reshape(*cells.shape[:-1], self.rows, self.columns).movedim(-2, -3)
        whole = parts.flatten(-2).flatten(-3, -2).movedim((-2, -1), (0, 1))
        out = torch.zeros(shape, dtype=torch.bool, device=cells.device)
        out[: a * self.rows, : b * self.columns] = whole
        return out


def zero_masks(module: nn.Module) -> dict[str, Tensor]:
    """Elements of weights that are zero, by name: those that a training must keep at zero.

    Every parameter of two or more dimensions with at least one zero counts, whatever set it: masks need no record of
    how a module was made, and are found in one that was loaded. Call it before the training.

    Returns:
        True where an element stays zero, bool, in the shape of each parameter.
    """
    found = {}
    for name, parameter in module.named_parameters():
        zero = parameter.detach() == 0
        if parameter.ndim > 1 and bool(zero.any()):
            found[name] = zero
    return found


def _least(values: Tensor, count: int) -> Tensor:
    """Mark the least values, the earlier of equal ones first; bool, shape (n,)."""
    mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    mask[values.argsort(stable=True)[:count]] = True
    return mask
