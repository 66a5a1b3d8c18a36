"""Options of the sparsity of a weight: shares of its elements, N of M, and blocks, and the zeros that each sets."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from autoprune.arguments import is_number, shown
from autoprune.protocols import Dimension, FloatArray, IntArray
from autoprune.structure.elements import Extent, LeftElements
from autoprune.structure.slicing.zeros import UNSTRUCTURED, Pattern

Option = float | str
"""A share of single elements, N:M such as ``"2:4"``, or a block with a share such as ``"1x8 0.5"``."""


def options_for(shape: tuple[int, ...], levels: Sequence[float], patterns: Sequence[str]) -> list[Option]:
    """Options of a weight of this shape, by rising number of zeros, dense first.

    Of levels of one pattern that set equally many elements to zero the least is enough.
    """
    found: dict[tuple[int, int], Option] = {}
    for rank, name in enumerate(patterns):
        pattern = Pattern.parse(name)
        for level in (1.0,) if pattern.stay else reversed(levels):
            found[pattern.zeros(shape, level), rank] = named(pattern, level)
    places = sorted(place for place in found if place[0])
    return [0.0, *(found[place] for place in places)]


def named(pattern: Pattern, level: float) -> Option:
    """The option of a pattern and a level."""
    if pattern.stay:
        return pattern.name
    return level if pattern.name == UNSTRUCTURED else f"{pattern.name} {level}"


def parsed(option: Option) -> tuple[Pattern, float]:
    """Pattern and level of an option; the level of N:M is 1.

    Raises:
        ValueError: If it is none.
    """
    if is_number(option) and 0 <= float(option) < 1:
        return Pattern(), float(option)
    if isinstance(option, str):
        name, _, level = option.partition(" ")
        pattern = Pattern.parse(name)
        if pattern.stay and not level:
            return pattern, 1.0
        if pattern.each > 1 and not pattern.stay:
            share = float(level) if level else -1.0
            if 0 < share < 1:
                return pattern, share
    raise ValueError(f"an option must be a share from 0 to below 1, N:M, or a block with a share, got {shown(option)}")


@final
class ZeroCounts:
    """Counts the zeros of candidates.

    Args:
        dimensions: Of the weights.
        extents: Sizes of the dimensions of each weight.
        columns: Names of groups and presences, in the order of widths.
        dense: Widths of the dense model, shape (columns,).
    """

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        extents: Sequence[Sequence[Extent]],
        columns: Sequence[str],
        dense: Sequence[int],
    ) -> None:
        most = max(len(dimension.options) for dimension in dimensions)
        shares = np.zeros((2, len(dimensions), most), dtype=object)
        shares[1] = 1
        self._forms = np.ones((3, len(dimensions), most), dtype=np.int64)  # rows and columns of cells, zeros of each
        for j, dimension in enumerate(dimensions):
            for i, option in enumerate(dimension.options):
                pattern, level = parsed(option)
                exact = Fraction(str(level))
                shares[:, j, i] = exact.numerator, exact.denominator
                self._forms[:, j, i] = pattern.rows, pattern.columns, pattern.each
        self._left = LeftElements(extents, columns)
        widths = np.array([dense], dtype=np.float64)
        fits = shares.max() * int(self._left(widths).max()) < 2**63
        self._shares: NDArray[Any] = shares.astype(np.int64) if fits else shares
        self._rows = np.arange(len(dimensions))
        self._single = bool((self._forms == 1).all())
        ladder = np.minimum(np.arange(most)[:, None], [len(dimension.options) - 1 for dimension in dimensions])
        self.table: IntArray = self(ladder, np.repeat(widths, most, axis=0)).T
        """Zeros of each option in the dense model, shape (d, most options), the last one repeated."""

    def __call__(self, candidates: IntArray, widths: FloatArray) -> IntArray:
        """Zeros of each weight, shape (n, d), for candidates (n, d) at widths (n, groups + branches)."""
        numerator, denominator = self._shares[:, self._rows, candidates]
        if self._single:
            cells = self._left(widths)
            each: int | IntArray = 1
        else:
            rows, columns, each = self._forms[:, self._rows, candidates]
            first, second, left = self._left.planes(widths)
            rest = left // np.maximum(first * second, 1)
            cells = np.where(rows * columns == 1, left, (first // rows) * (second // columns) * rest)
        gone = cells.astype(self._shares.dtype) * numerator // denominator
        return np.asarray(gone, dtype=np.int64) * each


def is_ordered(options: Sequence[Option], shape: tuple[int, ...]) -> bool:
    """Return whether later options set more elements to zero."""
    zeros = [pattern.zeros(shape, level) for pattern, level in map(parsed, options)]
    return all(less < more for less, more in pairwise(zeros))
