"""Control networks for an audit: the found network with one property removed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from autoprune.data.sampling import seeded
from autoprune.optimizers import Problem, uniform_seeds
from autoprune.protocols import IntArray, Pruning, SearchSpace
from autoprune.result.builders import FromEvaluator

Initialise = Callable[[nn.Module], None]


def uniform_widths(builder: FromEvaluator, limits: Mapping[str, float]) -> IntArray:
    """Make the candidate that prunes every dimension uniformly and costs what the limits allow or little less, (d,)."""
    space = builder.context.space

    def costs(candidates: IntArray) -> Any:
        return np.column_stack([builder.costs[name](candidates) for name in limits])

    problem = Problem(
        sizes=space.sizes,
        cost_names=tuple(limits),
        limits=np.array(list(limits.values())),
        cost_function=costs,
        ordered=np.array([dimension.ordered for dimension in space.dimensions]),
        canonical=space.canonical,
    )
    found: IntArray = uniform_seeds(problem)[-1]
    return found


def with_new_weights(
    module: nn.Module, zeroed: Mapping[str, int], initialise: Initialise | None, seed: int
) -> nn.Module:
    """Give a module new weights, in place; elements that were set to zero stay zero.

    Raises:
        ValueError: If there is no `initialise`, and a module has no ``reset_parameters``.
    """
    masks = {name: module.get_parameter(name).detach() != 0 for name in zeroed}
    with seeded(seed):
        (initialise or reset_parameters)(module)
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).mul_(mask)
    return module


def reset_parameters(module: nn.Module) -> None:
    """Call ``reset_parameters`` of every module with parameters, those inside others first.

    Raises:
        ValueError: If a module with parameters of its own has no such method.
    """
    resets = []
    for name, part in module.named_modules():
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if reset is not None:
            resets.append(reset)
        elif any(True for _ in part.parameters(recurse=False)):
            raise ValueError(f"{name or 'the model'} ({type(part).__name__}) has parameters and no reset_parameters")
    for reset in reversed(resets):
        reset()


def with_random_units(builder: FromEvaluator, candidate: IntArray, seed: int) -> nn.Module:
    """Build a candidate by the evaluator of a search with randomly drawn units; zeros are drawn likewise."""
    context = builder.context
    evaluator = copy.deepcopy(builder.fresh)
    generator = np.random.default_rng(seed)
    orders = {group.name: generator.permutation(group.size) for group in context.structure.groups}
    evaluator.prepare(replace(context, space=cast(SearchSpace, _RandomUnits(context.space, orders))))
    module = evaluator.build(candidate)
    with torch.no_grad():
        for name, count in context.space.pruning(candidate.tolist()).zeroed.items():
            parameter = module.get_parameter(name)
            mask = torch.ones(parameter.numel())
            mask[torch.from_numpy(generator.choice(len(mask), count, replace=False))] = 0
            parameter.mul_(mask.view_as(parameter).to(parameter))
    return module


class _RandomUnits:
    """Space whose groups keep as many units as before, but others, and whose weights are not zeroed."""

    def __init__(self, space: SearchSpace, orders: Mapping[str, IntArray]) -> None:
        self._space = space
        self._orders = orders

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a copy in the making has no space yet
            raise AttributeError(name)
        return getattr(self._space, name)

    def pruning(self, candidate: Sequence[int]) -> Pruning:
        given = self._space.pruning(candidate)
        drawn = {n: tuple(sorted(self._orders[n][: len(units)].tolist())) for n, units in given.kept.items()}
        return Pruning(drawn, dropped=given.dropped)
