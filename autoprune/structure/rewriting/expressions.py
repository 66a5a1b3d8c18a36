"""Expressions of numbers in a recorded forward by the sizes of tensors, from several runs at different sizes.

A number and every size are rows of values, one for each run. An expression that gives the number in all runs counts as
the computation of the code; the simplest comes first. Runs with other inputs show dependence on the inputs; a run with
distinct large numbers as widths, which no model has, shows dependence on the widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = tuple[int, ...]
"""Values of one number, one for each run."""

Source = tuple[Any, ...]
"""Name of a size, as given to `sources_of`."""

Expression = int | tuple[Any, ...]
"""Expression: a constant, ``("source", source)``, or ``(operator, a, b)`` with an operator of Python by name."""


def express(row: Row, sources: Mapping[Row, Source]) -> Expression | None:
    """Find the simplest expression that gives `row` in every run, or None.

    Args:
        row: Values to express.
        sources: Known sizes, preferred ones first.
    """
    if len(set(row)) == 1:
        return row[0]
    if row in sources:
        return ("source", sources[row])
    named: list[tuple[Row, Expression]] = [(known, ("source", source)) for known, source in sources.items()]
    moving = [(known, source) for known, source in named if len(set(known)) > 1 and 0 not in known]
    for known, source in moving:
        if (found := _scaled(row, known, source)) is not None:
            return found
    for i, (a, first) in enumerate(moving):
        for b, second in moving[i:]:
            product = tuple(x * y for x, y in zip(a, b, strict=True))
            if (found := _scaled(row, product, ("mul", first, second), shifted=False)) is not None:
                return found
    for a, first in moving:
        for b, second in moving:
            if all(x % y == 0 for x, y in zip(a, b, strict=True)):
                quotient = tuple(x // y for x, y in zip(a, b, strict=True))
                if (found := _scaled(row, quotient, ("floordiv", first, second), shifted=False)) is not None:
                    return found
    for known, source in moving:
        if (found := _rounded(row, known, source)) is not None:
            return found
    return None


def _scaled(row: Row, known: Row, source: Expression, *, shifted: bool = True) -> Expression | None:
    """Try ``source * c``, ``source // c`` and ``source + c``."""
    if row == known:
        return source
    if all(k and r % k == 0 and r // k == row[0] // known[0] for r, k in zip(row, known, strict=True)):
        return ("mul", source, row[0] // known[0])
    if row[0] > 0:
        for least in {known[0] // row[0], known[0] // row[0] - 1}:
            if least > 1 and all(k // least == r for r, k in zip(row, known, strict=True)):
                return ("floordiv", source, least)
    if shifted and len({r - k for r, k in zip(row, known, strict=True)}) == 1:
        return ("add", source, row[0] - known[0])
    return None


def _rounded(row: Row, known: Row, source: Expression) -> Expression | None:
    """Try ``-source % c``, the distance to the next multiple of `c`, and ``source + -source % c``."""
    for divisor in range(2, 65):
        missing = tuple(-k % divisor for k in known)
        if row == missing:
            return ("mod", ("neg", source), divisor)
        if row == tuple(k + m for k, m in zip(known, missing, strict=True)):
            return ("add", source, ("mod", ("neg", source), divisor))
    return None


def sources_of(named: Sequence[tuple[Source, Row]]) -> dict[Row, Source]:
    """Map each row of values to its first source."""
    found: dict[Row, Source] = {}
    for source, row in named:
        found.setdefault(row, source)
    return found
