"""Stages of a recovery: the pruned network alone, or nested networks from the dense one to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from autoprune.errors import UnsupportedModelError
from autoprune.evaluators.recovery.nested import Samples, cut_on, nested_edits, refit
from autoprune.evaluators.training.parameters import Masks, mask, masks_of
from autoprune.evaluators.training.weights import load_weights, weights_of
from autoprune.protocols import IntArray
from autoprune.structure.slicing.kept import kept_units
from autoprune.structure.slicing.slicing import Edit, build

if TYPE_CHECKING:
    from autoprune.evaluators.recovery.recovery import Recovery


@dataclass(frozen=True)
class Stage:
    """Training of one network.

    Attributes:
        make: Makes the network from the one before, which is None for the first.
        again: Makes one of the same shapes with any weights, for a training that is resumed.
        steps: Optimizer steps.
        before: Steps of the stages before.
        slices: Units of the dense model that it keeps.
        masks: Elements that stay zero.
        last: True for the network to deliver.
    """

    make: Callable[[nn.Module | None], nn.Module]
    again: Callable[[], nn.Module]
    steps: int
    before: int
    slices: Mapping[str, Mapping[int, IntArray]]
    masks: Masks
    last: bool


def stages_of(recipe: Recovery, small: nn.Module, dense: nn.Module | None, samples: Samples) -> list[Stage]:
    """Plan the stages of a recovery; the last one trains `small` itself.

    Args:
        recipe: The recipe.
        small: The pruned network.
        dense: The teacher; needed for more than one stage.
        samples: To trace models with, and to re-fit each of nested networks on.

    Raises:
        UnsupportedModelError: If nested networks cannot be found.
    """
    masks = masks_of(small) if recipe.keep_zeros else {}
    if recipe.steps_to == 1 or dense is None:
        return [Stage(lambda _: small, lambda: small, recipe.steps, 0, kept_units(small), masks, last=True)]
    edits = nested_edits(small, dense, samples, recipe.steps_to)
    each = recipe.steps // recipe.steps_to
    stages = []
    for i, edit in enumerate(edits):
        before = edits[i - 1] if i else Edit({}, {})
        last = i == len(edits) - 1
        make = partial(_next, dense, before, edit, samples)
        stages.append(
            Stage(
                make=partial(_into, small, make, masks) if last else make,
                again=(lambda: small) if last else partial(build, dense, edit),
                steps=recipe.steps - i * each if last else each,
                before=i * each,
                slices=edit.slices,
                masks=masks if last else {},
                last=last,
            )
        )
    return stages


def _next(dense: nn.Module, before: Edit, after: Edit, samples: Samples, trained: nn.Module | None) -> nn.Module:
    module = cut_on(dense, trained, before, after)
    refit(module, dense if trained is None else trained, before, after, samples)
    return module


def _into(
    small: nn.Module, make: Callable[[nn.Module | None], nn.Module], masks: Masks, trained: nn.Module | None
) -> nn.Module:
    """Give the pruned network the weights of the nested one before it.

    Raises:
        UnsupportedModelError: If it has other tensors.
    """
    found, own = weights_of(make(trained)), weights_of(small)
    differing = [name for name in own if name not in found or found[name].shape != own[name].shape]
    if differing or found.keys() != own.keys():
        raise UnsupportedModelError(
            f"steps_to above 1 needs a model as it was cut, but {type(small).__name__} has other tensors, such as "
            f"{(differing or sorted(found.keys() - own.keys()))[0]}; pass steps_to=1"
        )
    load_weights(small, found)
    mask(masks)
    return small
