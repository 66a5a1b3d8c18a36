"""Spaces with fewer options: only some of each dimension, or those around candidates that were good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from autoprune.arguments import is_number, shown, whole_number
from autoprune.costs.latency.model import Latency
from autoprune.importance.criteria import Criterion
from autoprune.protocols import Dimension, SearchSpace
from autoprune.search_spaces.protocol import Restricts, Settings, finer, needs_latency, why_no_less, with_latency
from autoprune.search_spaces.registry import make_space
from autoprune.structure.structure import Structure


@dataclass(frozen=True)
class Restricted:
    """Settings of a space of which only some options are searched; the dense one always stays.

    Attributes:
        space: Settings or the name of the whole space.
        options: Options that stay, for dimensions by name; other dimensions keep all.
        around: Candidates as ``{dimension: option}``: each dimension with an order keeps the options that they choose
            and `reach` options on either side. Without candidates all stay.
        reach: Number of neighbours on either side.

    Raises:
        ValueError: If a setting is of another kind; in `bind`, if a dimension or an option is unknown.
    """

    space: Settings
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    around: Sequence[Mapping[str, Any]] = ()
    reach: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", make_space(self.space))
        object.__setattr__(self, "reach", whole_number("reach", self.reach, 0))
        for name, given in (("options", [self.options]), ("around", self.around)):
            if not all(isinstance(each, Mapping) for each in given):
                raise ValueError(f"{name} must name options by dimension, got {shown(getattr(self, name))}")
        object.__setattr__(self, "around", tuple(dict(candidate) for candidate in self.around))

    @property
    def criterion(self) -> str | Criterion | None:
        """Criterion that ranks the units of each group."""
        return self.space.criterion

    @property
    def needs_latency(self) -> bool:
        """Return whether the whole space follows the measured latency."""
        return needs_latency(self.space)

    def with_latency(self, latency: Latency, structure: Structure) -> Restricted:
        """Give a measured latency to the whole space."""
        return replace(self, space=with_latency(self.space, latency, structure))

    def why_no_less(self) -> str:
        """Name what keeps the smallest network from being smaller."""
        return f"the options that Restricted(...) leaves of a space with {why_no_less(self.space)}"

    def bind(self, structure: Structure, order: Mapping[str, Sequence[int]]) -> SearchSpace:
        """Lay the whole space out for a model, and leave the other options out.

        Raises:
            ValueError: If a dimension or an option is unknown, or the space cannot be restricted.
        """
        space = self.space.bind(structure, order)
        if not isinstance(space, Restricts):
            raise ValueError(f"space must have a method restricted, but {type(space).__name__} has none")
        known = {dimension.name for dimension in space.dimensions}
        for argument, given in (("options", [self.options]), ("around", self.around)):
            for name in (name for each in given for name in each):
                if name not in known:
                    raise ValueError(
                        f"{argument} must name dimensions of the space, {shown(sorted(known))}, got {name!r}"
                    )
        return space.restricted([self._kept(dimension) for dimension in space.dimensions])

    def _kept(self, dimension: Dimension) -> list[int]:
        """Indices of the options that stay."""
        kept = set(range(len(dimension.options)))
        if dimension.name in self.options:
            kept = {_place(dimension, option) for option in self.options[dimension.name]}
        if self.around and dimension.ordered:
            chosen = {_place(dimension, each.get(dimension.name, dimension.options[0])) for each in self.around}
            kept &= {i for at in chosen for i in range(at - self.reach, at + self.reach + 1)}
        return sorted(kept | {0})


@runtime_checkable
class Decoded(Protocol):
    """A trial, or anything else that knows the meaning of its candidate."""

    @property
    def decoded(self) -> Mapping[str, Any]:
        """``{dimension: option}``."""
        ...


def refine(space: str | Settings, front: Sequence[Decoded | Mapping[str, Any]], reach: int = 1) -> Restricted:
    """Halve the steps of a space, around a front only: the space of the next round of a search from coarse to fine.

    Pass the front as ``start=`` of that round, too: its options are among those that stay.

    Args:
        space: Settings of the round before, such as ``Channels(step=0.25)``; those without steps keep their options.
        front: Trials of that round, such as ``result.front``, or ``{dimension: option}``.
        reach: Number of finer options that stay on either side of one that the front chose.

    Example:
        >>> from autoprune.search_spaces import Channels, refine
        >>> refine(Channels(step=0.25), [{"conv1": 48}]).space.step
        0.125
    """
    made = make_space(space)
    whole = made.space if isinstance(made, Restricted) else made
    chosen = [each.decoded if isinstance(each, Decoded) else each for each in front]
    return Restricted(finer(whole), {}, chosen, reach)


def _place(dimension: Dimension, option: Any) -> int:
    """Index of an option, or of the nearest number."""
    if option in dimension.options:
        return dimension.options.index(option)
    if is_number(option) and all(map(is_number, dimension.options)):
        return int(np.abs(np.array(dimension.options, dtype=np.float64) - float(option)).argmin())
    raise ValueError(f"options of {dimension.name!r} must be among {dimension.options!s:.200}, got {shown(option)}")
