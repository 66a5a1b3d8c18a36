"""Search spaces: they give a candidate its meaning for the model."""

from __future__ import annotations

from autoprune.search_spaces.channels import Channels, ChannelSpace
from autoprune.search_spaces.choices import Choice, Choices
from autoprune.search_spaces.protocol import Settings, needs_latency, why_no_less, with_latency
from autoprune.search_spaces.registry import (
    SPACES,
    Kind,
    make_space,
    register_space,
    require_registered,
    settings_by_name,
    space_from_json,
)
from autoprune.search_spaces.sparsity import Sparsity, SparsitySpace

register_space("channels", Channels, ChannelSpace)
register_space("sparsity", Sparsity, SparsitySpace)
SPACES["choices"] = Kind(None, Choices)

__all__ = [
    "SPACES",
    "ChannelSpace",
    "Channels",
    "Choice",
    "Choices",
    "Settings",
    "Sparsity",
    "SparsitySpace",
    "make_space",
    "needs_latency",
    "register_space",
    "require_registered",
    "settings_by_name",
    "space_from_json",
    "why_no_less",
    "with_latency",
]
