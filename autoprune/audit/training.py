"""Trainings by a user's recipe: of a module in place, from a seed, its zeros kept."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import nn

from autoprune.arguments import why_no_function
from autoprune.data.sampling import seeded
from autoprune.errors import FileFormatError
from autoprune.evaluators.recovery.recovery import Distill, Recovery
from autoprune.result import SearchResult
from autoprune.result.builders import FromEvaluator

Training = Callable[..., object]
"""``training(module, seed)`` or ``training(module, seed, steps)`` trains a module in place."""


def builder_of(result: SearchResult, who: str) -> FromEvaluator:
    """Return what builds the modules of a result that still has its model and samples.

    Raises:
        FileFormatError: If it was loaded.
    """
    if not isinstance(result._builder, FromEvaluator):
        raise FileFormatError(
            f"{who} needs a result with its model and samples, got one that was loaded; pass what autoprune.search "
            "returns, which with run_dir= and resume=True repeats no trial"
        )
    return result._builder


def training_by(train_fn: Callable[..., object], steps: bool, inner: bool = False) -> Training:
    """Make the training with a seed, which a `Recovery` has as a setting, and other functions in global state.

    Args:
        train_fn: ``train_fn(model)``, or ``train_fn(model, steps)``.
        steps: Whether it is given a number of steps.
        inner: Whether a `Recovery` may learn inner features, which the modules of a result share with the dense model.

    Raises:
        TypeError: If it cannot be called like that.
        ValueError: If it is a `Recovery` with a checkpoint, which is of one module.
    """
    if why := why_no_function(train_fn, 1 + steps):
        raise TypeError(f"train_fn must be a function train_fn(model{', steps' * steps}), {why}")
    if isinstance(train_fn, Recovery):
        recipe = train_fn
        if recipe.checkpoint is not None:
            raise ValueError("train_fn must be a Recovery without checkpoint=, which is for one model; use run_dir=")
        distill: Distill = "logits" if recipe.inner and not inner else recipe.distill
        return lambda module, seed, *given: replace(recipe, seed=seed, distill=distill)(module, *given)

    def train(module: nn.Module, seed: int, *given: int) -> None:
        with seeded(seed), torch.enable_grad():
            train_fn(module, *given)

    return train


def trained(module: nn.Module, zeroed: Collection[str], train: Callable[[nn.Module], object]) -> nn.Module:
    """Train a module in place and return it; elements of the weights `zeroed` that are zero stay zero."""
    masks = {name: module.get_parameter(name).detach() != 0 for name in zeroed}
    train(module)
    module.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).mul_(mask)
    return module
