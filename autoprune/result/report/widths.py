"""Widths of all candidates from what each option does to each group, so that a page needs no space of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune.protocols import FloatArray, IntArray, SearchSpace

if TYPE_CHECKING:
    from autoprune.result.outline import Outline

_ROWS = 2048  # candidates whose widths are held at once


def options_of(space: SearchSpace) -> dict[str, Any]:
    """Names of the dimensions, the distinct lists of options, and the list of each dimension."""
    lists: dict[str, int] = {}
    options: list[list[Any]] = []
    kinds = []
    for dimension in space.dimensions:
        own = [_plain(option) for option in dimension.options]
        if repr(own) not in lists:
            lists[repr(own)] = len(options)
            options.append(own)
        kinds.append(lists[repr(own)])
    return {"names": [dimension.name for dimension in space.dimensions], "options": options, "kinds": kinds}


def _plain(option: Any) -> Any:
    if isinstance(option, np.generic):
        option = option.item()
    return option if isinstance(option, bool | int | float | str) else str(option)


def width_effects(space: SearchSpace, outline: Outline, candidates: Any) -> list[Any] | None:
    """Find the columns of an outline that each option changes, and their widths then.

    A width of a candidate is the least that one of its options gives. Where that is not so for one of the candidates,
    as in a space whose dimensions act together, there is no such table.

    Args:
        space: Gives the widths.
        outline: Of the same model.
        candidates: Those of the trials, shape (n, d).

    Returns:
        For each dimension, for each option but the first, pairs of column and width; None where there is no such table.
    """
    sizes = space.sizes
    dense = np.array([size for _, size in outline.columns], dtype=np.float64)
    effects: list[list[list[tuple[int, int]]]] = []
    table: list[list[tuple[IntArray, FloatArray]]] = []
    for j, size in enumerate(sizes.tolist()):
        rows = np.zeros((size, len(sizes)), dtype=np.int64)
        rows[:, j] = np.arange(size)
        widths = _widths(space, rows, len(dense))
        own = [(np.flatnonzero(row != dense), row) for row in widths]
        if len(own[0][0]):
            return None
        table.append([(columns, row[columns]) for columns, row in own])
        effects.append([[(int(c), int(w)) for c, w in zip(*each, strict=True)] for each in table[-1][1:]])
    for start in range(0, len(candidates), _ROWS):
        block = np.asarray(candidates[start : start + _ROWS], dtype=np.int64)
        if not np.array_equal(_least(table, block, dense), _widths(space, block, len(dense))):
            return None
    return effects


def _least(table: list[list[tuple[IntArray, FloatArray]]], candidates: IntArray, dense: FloatArray) -> FloatArray:
    """Least width that an option of each candidate gives, shape (n, columns)."""
    found = np.tile(dense, (len(candidates), 1))
    for j, options in enumerate(table):
        for option in np.unique(candidates[:, j]):
            columns, widths = options[option]
            if len(columns):
                rows = np.flatnonzero(candidates[:, j] == option)
                cells = np.ix_(rows, columns)
                found[cells] = np.minimum(found[cells], widths)
    return found


def _widths(space: SearchSpace, candidates: IntArray, columns: int) -> FloatArray:
    """Widths of groups, then presence of branches, of which a space without choices there gives none."""
    given = space.widths(candidates)
    return np.pad(given, ((0, 0), (0, columns - given.shape[1])), constant_values=1.0)
