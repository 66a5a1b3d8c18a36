"""Search spaces: what a candidate means for the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoprune.errors import RecipeError
from autoprune.protocols import SearchSpace
from autoprune.search_spaces.channels import Channels, ChannelSpace

SPACES = {"channels": Channels}


def make_space(spec: str | Channels) -> Channels:
    """The settings meant by a name, or settings already made.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(spec, str):
        if spec not in SPACES:
            raise ValueError(f"space must be one of {sorted(SPACES)} or a Channels(...), got {spec!r}")
        return SPACES[spec]()
    if not hasattr(spec, "bind"):
        raise ValueError(f"space must be one of {sorted(SPACES)} or a Channels(...), got {type(spec).__name__}")
    return spec


def space_from_json(data: Mapping[str, Any]) -> SearchSpace:
    """Restore a space of any kind.

    Raises:
        RecipeError: If the kind is unknown here.
    """
    if data.get("type") != "channels":
        raise RecipeError(f"space type must be 'channels', got {data.get('type')!r}; was it saved by a newer version?")
    return ChannelSpace.from_json(data)


__all__ = ["SPACES", "ChannelSpace", "Channels", "make_space", "space_from_json"]
