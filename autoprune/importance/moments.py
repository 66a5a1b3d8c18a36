"""Moments of the inputs of layers: means and covariances of unfolded rows, whole or sketched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

PRECISE = 512
"""Columns up to which products are taken in float64, which costs little there; float32 is enough to solve with."""

BLOCKED = 256
"""Columns from which on only one half of the products is computed, in blocks: they are symmetric."""

_BLOCKS = 8
_MIX = 2654435761  # Knuth's multiplicative hash: scatters row numbers, so that no stride meets the width of an image


def scattered(numbers: Tensor, every: float) -> Tensor:
    """Select about one of `every` rows by their numbers; bool, shape (n,)."""
    return (numbers * _MIX) % 2**32 < 2**32 / every


@dataclass
class Sample:
    """Sample of about one of `every` rows, the same for any division into chunks."""

    every: float
    _seen: int = 0
    _parts: list[Tensor] = field(default_factory=list, repr=False)

    def add(self, rows: Tensor) -> None:
        """Take from rows, shape (n, columns)."""
        numbers = self._seen + torch.arange(len(rows), dtype=torch.int64, device=rows.device)
        self._seen += len(rows)
        taken = rows[scattered(numbers, self.every)]
        if len(taken):
            self._parts.append(taken.to(torch.promote_types(taken.dtype, torch.float32)))

    @property
    def rows(self) -> Tensor:
        """Rows of the sample, at least in float32, shape (n, columns)."""
        return torch.cat(self._parts) if self._parts else torch.zeros(0, 0)


@dataclass
class Moments:
    """Moments of rows that a weight multiplies, added up chunk by chunk; they do not depend on how rows are divided.

    Attributes:
        columns: Length of a row.
        sketch_rows: 0 for the products of any two columns; else the number of sums that rows are hashed to, with random
            signs; their products have the same mean. Exact as long as there are no more rows than that. None for
            means alone.
        every: About one of this number of rows is taken.
        rows: Number of rows taken.

    Reference:
        Sketch: Clarkson and Woodruff, "Low Rank Approximation and Regression in Input Sparsity Time", STOC 2013,
        arXiv:1207.6365.
    """

    columns: int
    sketch_rows: int | None
    every: float = 1.0
    rows: int = 0
    _seen: int = 0
    _origin: Tensor | None = field(default=None, repr=False)  # about the mean, so that float32 loses nothing to it
    _total: Tensor | None = field(default=None, repr=False)
    _matrix: Tensor | None = field(default=None, repr=False)
    _weights: Tensor | None = field(default=None, repr=False)  # signs added up in each row of the sketch
    _halved: bool = field(default=False, repr=False)  # the products lack the half above the diagonal

    def add(self, rows: Tensor) -> None:
        """Take rows, shape (n, columns), into the moments."""
        numbers = self._seen + torch.arange(len(rows), dtype=torch.int64, device=rows.device)
        self._seen += len(rows)
        if self.every > 1:
            chosen = scattered(numbers, self.every)
            rows, numbers = rows[chosen], numbers[chosen]
        if not len(rows):
            return
        dtype = torch.float64 if self.columns <= PRECISE else torch.float32
        if self._origin is None:
            self._origin = rows[:64].double().mean(0)
            self._total = torch.zeros_like(self._origin)
            height = self.columns if self.sketch_rows == 0 else self.sketch_rows or 0
            self._matrix = torch.zeros(height, self.columns, dtype=dtype, device=rows.device)
            self._weights = torch.zeros(height, dtype=torch.float64, device=rows.device)
        assert self._total is not None
        assert self._matrix is not None
        assert self._weights is not None
        first = self.rows
        self.rows = self.rows + len(rows)
        rows = rows.to(dtype) - self._origin.to(dtype)
        self._total += rows.sum(0, dtype=torch.float64)
        if self.sketch_rows is None:
            return
        if self.sketch_rows == 0:
            self._multiply(rows)
            return
        places = first + torch.arange(len(rows), dtype=torch.int64, device=rows.device)
        signs = torch.ones(len(rows), dtype=dtype, device=rows.device)
        if self.rows > self.sketch_rows:
            late = places >= self.sketch_rows
            mixed = (places * _MIX) % 2**32
            places = torch.where(late, mixed % self.sketch_rows, places)
            signs = torch.where(late & ((mixed >> 20) % 2 == 1), -signs, signs)
        self._matrix.index_add_(0, places, rows * signs[:, None])
        self._weights.index_add_(0, places, signs.double())

    def _multiply(self, rows: Tensor) -> None:
        """Add the products of rows, below the diagonal alone where that is cheaper."""
        assert self._matrix is not None
        self._halved = self.columns >= BLOCKED
        for first, last in self._blocks():
            self._matrix[first:last, :last].addmm_(rows[:, first:last].T, rows[:, :last])

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """First row of each block of the products, and the one after its last."""
        blocks = _BLOCKS if self.columns >= BLOCKED else 1
        return pairwise(self.columns * i // blocks for i in range(blocks + 1))

    def part(self, first: int, last: int) -> Moments:
        """Moments of the columns from `first` to before `last` alone; not of a sketch."""
        assert self._matrix is not None
        assert self._origin is not None
        assert self._total is not None
        assert self._weights is not None
        self._complete()
        own = slice(first, last)
        return replace(
            self,
            columns=last - first,
            _origin=self._origin[own],
            _total=self._total[own],
            _matrix=self._matrix[own, own],
            _weights=self._weights[own],
        )

    @property
    def seen(self) -> int:
        """Number of rows that were offered."""
        return self._seen

    def large(self) -> list[Tensor]:
        """Tensors that take memory in proportion to the products."""
        self._complete()
        return [] if self._matrix is None else [self._matrix]

    def _complete(self) -> None:
        """Copy the products below the blocks of the diagonal to the other half."""
        if self._halved and self._matrix is not None:
            for first, last in self._blocks():
                self._matrix[:first, first:last] = self._matrix[first:last, :first].T
            self._halved = False

    @property
    def mean(self) -> Tensor:
        """Mean of each column, float64, shape (columns,)."""
        assert self._origin is not None
        assert self._total is not None
        return self._origin + self._total / self.rows

    @property
    def finite(self) -> bool:
        """True if there are rows, and all of their sums are finite."""
        if self._matrix is None or self._total is None:
            return False
        return bool(self._total.isfinite().all() and self._matrix.isfinite().all())

    def factor(self, centred: bool) -> Tensor:
        """Rows R with R^T R the mean products, or the covariance, shape (sketch_rows, columns); of a sketch only."""
        assert self.sketch_rows is not None
        assert self._matrix is not None
        assert self._weights is not None
        shift = -self._offset if centred else self._origin
        assert shift is not None
        rows = self._matrix + torch.outer(self._weights, shift).to(self._matrix.dtype)
        return rows[: min(self.rows, self.sketch_rows)].div(self.rows**0.5)

    def products(self, centred: bool) -> Tensor:
        """Mean products of any two columns, or the covariance, shape (columns, columns); not of a sketch."""
        assert self._matrix is not None
        self._complete()
        offset, mean = self._offset.to(self._matrix.dtype), self.mean.to(self._matrix.dtype)
        left, right = ([-offset], [offset]) if centred else ([-offset, mean], [offset, mean])
        return torch.addmm(self._matrix, torch.stack(left, 1), torch.stack(right), beta=1 / self.rows)

    @property
    def _offset(self) -> Tensor:
        """Mean relative to the origin."""
        assert self._total is not None
        return self._total / self.rows
