"""Candidates that a search is asked to begin from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from autoprune.arguments import is_number, is_whole, shown
from autoprune.protocols import SearchSpace
from autoprune.result import SearchResult
from autoprune.result.trials import Trial

Start = SearchResult | Trial | Mapping[str, Any] | Sequence[int]
"""Candidate to begin from: option indices, ``{dimension: option}``, a trial, or the front of a result."""

_STARTS = "results, trials, dictionaries of {dimension: option}, or lists of option indices"


def starts_of(start: Start | Sequence[Start]) -> list[Start]:
    """Make a list of the candidates to begin from."""
    if isinstance(start, SearchResult | Trial | Mapping):
        return [start]
    if isinstance(start, str | bytes) or not isinstance(start, Iterable):
        raise ValueError(f"start must be a list of {_STARTS}, got {shown(start)}")
    return list[Any](start)


def candidates_of(start: Start, space: SearchSpace) -> list[list[int]]:
    """Option indices of the candidates that a search begins from.

    Raises:
        ValueError: If it names a dimension or an option that the space does not have.
    """
    if isinstance(start, SearchResult):
        return [candidate for trial in start.front for candidate in candidates_of(trial.decoded, space)]
    if isinstance(start, Trial):
        return candidates_of(start.decoded, space)
    if not isinstance(start, Mapping):
        return [_indices(start, space.sizes.tolist())]
    unknown = set(start) - {dimension.name for dimension in space.dimensions}
    if unknown:
        known = ", ".join(dimension.name for dimension in space.dimensions[:20])
        more = ", ..." * (len(space.dimensions) > 20)
        raise ValueError(f"start must name dimensions of the space ({known}{more}), got {shown(list(unknown))}")
    candidate = []
    for dimension in space.dimensions:
        option = start.get(dimension.name, dimension.options[0])
        if not (isinstance(option, str) or is_number(option)) or option not in dimension.options:
            raise ValueError(
                f"start[{dimension.name!r}] must be one of {dimension.options!s:.200}, got {shown(option)}"
            )
        candidate.append(dimension.options.index(option))
    return [candidate]


def _indices(start: Any, sizes: list[int]) -> list[int]:
    """Check one candidate given by option indices; neither floats nor bools are indices."""
    rule = f"start must hold {_STARTS} below {shown(sizes)}"
    if isinstance(start, str | bytes) or not isinstance(start, Iterable):
        raise ValueError(f"{rule}, got {shown(start)}; a single candidate is a list in a list: start=[[...]]")
    given = start.tolist() if isinstance(start, np.ndarray | Tensor) else list(start)
    if len(given) != len(sizes):
        raise ValueError(f"{rule}, got {shown(start)} of length {len(given)} for {len(sizes)} dimensions")
    whole = all(map(is_whole, given))
    if not whole or not all(0 <= index < size for index, size in zip(given, sizes, strict=True)):
        raise ValueError(f"{rule}, got {shown(start)}")
    return [int(index) for index in given]
