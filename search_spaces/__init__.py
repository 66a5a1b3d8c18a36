"""Search spaces: they give a candidate its meaning for the model."""

from __future__ import annotations

from autoprune.search_spaces.blocks import Blocks
from autoprune.search_spaces.channels import Channels, ChannelSpace
from autoprune.search_spaces.choices import Choice, Choices
from autoprune.search_spaces.depth import Depth, DepthSpace
from autoprune.search_spaces.product import Product, ProductSpace
from autoprune.search_spaces.protocol import (
    FollowsWidths,
    Restricts,
    Settings,
    needs_latency,
    why_no_less,
    with_latency,
)
from autoprune.search_spaces.registry import (
    SPACES,
    Kind,
    make_space,
    register_space,
    require_registered,
    settings_by_name,
    space_from_json,
)
from autoprune.search_spaces.restricted import Restricted, refine
from autoprune.search_spaces.sparsity import Sparsity, SparsitySpace
from autoprune.search_spaces.suited import Suited

register_space("channels", Channels, ChannelSpace)
register_space("sparsity", Sparsity, SparsitySpace)
register_space("blocks", Blocks, Choices)
register_space("depth", Depth, DepthSpace)
register_space("auto", Suited, ProductSpace)
SPACES["choices"] = Kind(None, Choices)
SPACES["product"] = Kind(None, ProductSpace)

__all__ = [
    "SPACES",
    "Blocks",
    "ChannelSpace",
    "Channels",
    "Choice",
    "Choices",
    "Depth",
    "DepthSpace",
    "FollowsWidths",
    "Product",
    "ProductSpace",
    "Restricted",
    "Restricts",
    "Settings",
    "Sparsity",
    "SparsitySpace",
    "Suited",
    "make_space",
    "needs_latency",
    "refine",
    "register_space",
    "require_registered",
    "settings_by_name",
    "space_from_json",
    "why_no_less",
    "with_latency",
]
