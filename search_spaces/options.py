"""Options of dimensions: how many there are, those of a candidate, and those that stay in a restricted space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from autoprune.arguments import shown
from autoprune.protocols import Dimension, IntArray


def sizes_of(dimensions: Sequence[Dimension]) -> IntArray:
    """Number of options of each dimension, shape (d,)."""
    return np.array([len(dimension.options) for dimension in dimensions], dtype=np.int64)


def decoded(dimensions: Sequence[Dimension], candidate: Sequence[int]) -> dict[str, Any]:
    """Turn option indices, shape (d,), into ``{dimension: option}``."""
    return {d.name: d.options[int(i)] for d, i in zip(dimensions, candidate, strict=True)}


def require_options(dimensions: Sequence[Dimension], options: Sequence[Sequence[int]]) -> None:
    """Check the options that stay, as indices.

    Raises:
        ValueError: If they are not those of each dimension, ascending, with 0 among them; names the dimension.
    """
    if len(options) != len(dimensions):
        raise ValueError(f"options must be given for {len(dimensions)} dimensions, got {len(options)}")
    for dimension, kept in zip(dimensions, options, strict=True):
        ascending = list(kept) == sorted(set(kept))
        if not (len(kept) and ascending and kept[0] == 0 and kept[-1] < len(dimension.options)):
            raise ValueError(
                f"options of {dimension.name!r} must be indices below {len(dimension.options)} that rise from 0, which "
                f"is dense, got {shown(list(kept))}"
            )


def with_options(dimensions: Sequence[Dimension], options: Sequence[Sequence[int]]) -> tuple[Dimension, ...]:
    """Return the dimensions with these of their options alone; raises what `require_options` does."""
    require_options(dimensions, options)
    return tuple(
        replace(dimension, options=tuple(dimension.options[i] for i in kept))
        for dimension, kept in zip(dimensions, options, strict=True)
    )
