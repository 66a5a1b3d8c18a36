"""Recipe that a built module carries, and the units of the dense model that it keeps by it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from autoprune.protocols import IntArray

ATTRIBUTE = "_autoprune_recipe"
"""Attribute of a built module with its recipe, JSON-ready, which survives copying, pickling and fine-tuning."""


def recipe_of(module: nn.Module) -> dict[str, Any] | None:
    """Return the recipe of a built module; None if it was not built by autoprune."""
    found: dict[str, Any] | None = getattr(module, ATTRIBUTE, None)
    return found


def kept_units(module: nn.Module) -> dict[str, dict[int, IntArray]]:
    """Indices of the dense model that stay, of each tensor that shrank along each dimension; empty without a recipe."""
    recipe = recipe_of(module) or {"slices": {}}
    return {
        name: {int(dim): np.asarray(index, dtype=np.int64) for dim, index in dims.items()}
        for name, dims in recipe["slices"].items()
    }
