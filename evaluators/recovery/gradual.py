"""Stages of a recovery: the pruned network alone, or nested networks from the dense one to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from autoprune.data.batch import Batch
from autoprune.evaluators.training.parameters import Masks, masks_of
from autoprune.protocols import IntArray
from autoprune.structure.slicing.kept import kept_units

if TYPE_CHECKING:
    from autoprune.evaluators.recovery.recovery import Recovery


@dataclass(frozen=True)
class Stage:
    """Training of one network.

    Attributes:
        make: Makes the network, from the one before where there is one.
        again: Makes one of the same shapes with any weights, for a training that is resumed.
        steps: Optimizer steps.
        before: Steps of the stages before.
        slices: Units of the dense model that it keeps.
        masks: Elements that stay zero.
        last: True for the network to deliver.
    """

    make: Callable[[], nn.Module]
    again: Callable[[], nn.Module]
    steps: int
    before: int
    slices: Mapping[str, Mapping[int, IntArray]]
    masks: Masks
    last: bool


def stages_of(
    recipe: Recovery, small: nn.Module, dense: nn.Module | None, batch: Batch, forward: Callable[..., Any]
) -> list[Stage]:
    """Plan the stages of a recovery; the last one trains `small` itself."""
    masks = masks_of(small) if recipe.keep_zeros else {}
    return [Stage(lambda: small, lambda: small, recipe.steps, 0, kept_units(small), masks, last=True)]
