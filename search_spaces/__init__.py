"""Search spaces: they give a candidate its meaning for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from autoprune.arguments import shown
from autoprune.criteria import Criterion
from autoprune.errors import FileFormatError
from autoprune.protocols import SearchSpace
from autoprune.search_spaces.channels import Channels, ChannelSpace
from autoprune.search_spaces.sparsity import Sparsity, SparsitySpace
from autoprune.structure.structure import Structure


class Settings(Protocol):
    """Settings of a space, as a user gives them before the model is known."""

    @property
    def criterion(self) -> str | Criterion | None:
        """Criterion that ranks the units of each group; None where no unit is removed."""
        ...

    def bind(self, structure: Structure, order: Mapping[str, Sequence[int]]) -> SearchSpace:
        """Lay the space out for a model; `order` holds the units of each group by falling importance."""
        ...


SPACES: dict[str, type[Channels | Sparsity]] = {"channels": Channels, "sparsity": Sparsity}
_KINDS: dict[str, type[ChannelSpace | SparsitySpace]] = {"channels": ChannelSpace, "sparsity": SparsitySpace}


def make_space(spec: str | Settings) -> Settings:
    """The settings meant by a name, or settings already made.

    Raises:
        ValueError: If the name is unknown, or these are no settings.
    """
    if isinstance(spec, str) and spec in SPACES:
        return SPACES[spec]()
    if isinstance(spec, str | type) or not hasattr(spec, "bind"):
        raise ValueError(
            f"space must be one of {sorted(SPACES)}, or settings such as Channels(...) or Sparsity(...), got "
            f"{shown(spec)}"
        )
    return spec


def why_no_less(settings: Settings) -> str:
    """Name the settings that keep the smallest network of a space from being smaller."""
    if not isinstance(settings, Channels):
        return "the options of the space"
    stops = {name: getattr(settings, name) for name in ("min_fraction", "min_width", "round_to", "ignore", "bounds")}
    loose = {"min_fraction": 0.0, "min_width": 1, "round_to": 1}
    named = [f"{name}={shown(value)}" for name, value in stops.items() if value and value != loose.get(name)]
    even = f"step={settings.step!r}" if settings.options is None else f"options={shown(settings.options)}"
    return f"{', '.join((*named, even))} of Channels(...)"


def space_from_json(data: Mapping[str, Any]) -> SearchSpace:
    """Restore a space of any kind.

    Raises:
        FileFormatError: If the kind is unknown here.
        ValueError: If it is damaged; names the first place that is.
    """
    named = data.get("type")
    kind = _KINDS.get(named) if isinstance(named, str) else None
    if kind is None:
        raise FileFormatError(
            f"space type must be one of {sorted(_KINDS)}, got {named!r:.60}; was it saved by a newer version?"
        )
    return kind.from_json(data)


__all__ = [
    "SPACES",
    "ChannelSpace",
    "Channels",
    "Settings",
    "Sparsity",
    "SparsitySpace",
    "make_space",
    "space_from_json",
    "why_no_less",
]
