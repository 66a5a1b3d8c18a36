"""Candidates that a search is asked to begin from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from autoprune.arguments import is_number, is_whole, one_of, shown
from autoprune.importance.expected_loss import PRIORS, Prior
from autoprune.protocols import SearchSpace
from autoprune.result import SearchResult
from autoprune.result.trials import Trial

Beginning = SearchResult | Trial | Mapping[str, Any] | Sequence[int]
"""Candidate to begin from: option indices, ``{dimension: option}``, a trial, or the front of a result."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """Beginning of a search: ``search(..., start=autoprune.Start(candidates=[earlier], prior="sensitivity"))``.

    Attributes:
        candidates: Candidates to begin with: option indices, ``{dimension: option}``, trials, or earlier results.
        prior: Expected loss of each option before any evaluation, for optimizers that plan: ``"reconstruction"``, the
            error of the next layers' outputs, in a few forward passes over 32 samples; ``"sensitivity"``, the change of
            the outputs of the whole model, with a backward pass too; ``"database"``, that after a re-fit, from a layer
            database (docs/layer-database.md); or ``"criterion"``, sums of the scores of units, without any pass.
            ``"auto"``: reconstruction for models with batch norm, where the evaluator re-fits weights that which the
            re-fit leaves; else sensitivity, which is compared with the same corrected by measured losses of whole
            branches, where that is affordable (docs/depth.md).

    Raises:
        ValueError: If `prior` is unknown, or `candidates` is no list of such.
    """

    candidates: Beginning | Sequence[Beginning] = ()
    prior: Prior = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", starts_of(self.candidates))
        one_of("prior", self.prior, PRIORS)


def start_of(given: Start | Beginning | Sequence[Beginning]) -> Start:
    """Make the start that ``start=`` stands for."""
    return given if isinstance(given, Start) else Start(candidates=given)


_STARTS = "results, trials, dictionaries of {dimension: option}, or lists of option indices"


def starts_of(start: Beginning | Sequence[Beginning]) -> list[Beginning]:
    """Make a list of the candidates to begin from."""
    if isinstance(start, SearchResult | Trial | Mapping):
        return [start]
    if isinstance(start, str | bytes) or not isinstance(start, Iterable):
        raise ValueError(f"start must be a list of {_STARTS}, got {shown(start)}")
    return list[Any](start)


def candidates_of(start: Beginning, space: SearchSpace) -> list[list[int]]:
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
