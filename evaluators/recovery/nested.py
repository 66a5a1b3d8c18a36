"""Nested networks between the dense one and a pruned one: each loses a share of the units that go in the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.data.batch import Batch, Forward, fresh, pieces
from autoprune.errors import UnsupportedModelError
from autoprune.evaluators.training.weights import weights_of
from autoprune.importance.calibration import Calibration
from autoprune.importance.criteria import rank_units
from autoprune.protocols import Pruning
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.kept import kept_units, recipe_of
from autoprune.structure.slicing.slicing import Edit, build
from autoprune.structure.structure import Structure


def nested_edits(small: nn.Module, dense: nn.Module, batch: Batch, forward: Forward, count: int) -> list[Edit]:
    """Plan edits of the dense model whose last one is that of the pruned model.

    Units go in the order of their l2 norm in the dense model, the smallest first, and branches from the last on.

    Args:
        small: Pruned, with its recipe.
        dense: The model that it was built from.
        batch: Samples to trace the dense model with.
        forward: Runs a model on a batch.
        count: Number of networks.

    Raises:
        UnsupportedModelError: If `small` carries no recipe, or one that does not follow from the structure of `dense`.
    """
    if recipe_of(small) is None:
        raise UnsupportedModelError(
            f"steps_to={count} needs a model from result.build(), which knows the units it keeps, but "
            f"{type(small).__name__} carries no recipe; pass steps_to=1"
        )
    few = fresh(pieces(batch, 2)[0])
    structure = analyse(Example.of_batch(dense, few, forward))
    target = _target(structure, small)
    last = structure.edit(target)
    _require_same(last, small)
    order = rank_units(Calibration(dense, structure, [few], forward), "l2")
    edits = [structure.edit(_between(structure, target, order, i / count)) for i in range(1, count)]
    return [*edits, last]


def _target(structure: Structure, small: nn.Module) -> Pruning:
    """The pruning that the recipe of a model follows from."""
    slices = kept_units(small)
    left_out = set((recipe_of(small) or {}).get("dropped", {}))
    kept = {}
    for group in structure.groups:
        for slot in group.slots:
            stays = slices.get(slot.tensor, {}).get(slot.dim)
            if stays is not None:
                alive = np.isin(slot.indices, stays).all(axis=1)
                kept[group.name] = tuple(np.flatnonzero(alive).tolist())
                break
    dropped = tuple(b.name for b in structure.branches if b.modules and left_out.issuperset(b.modules))
    return Pruning({name: units for name, units in kept.items() if units}, dropped=dropped)


def _require_same(edit: Edit, small: nn.Module) -> None:
    own = {name: {dim: index.tolist() for dim, index in dims.items()} for name, dims in kept_units(small).items()}
    ours = {name: {dim: index.tolist() for dim, index in dims.items()} for name, dims in edit.slices.items()}
    differing = sorted(name for name in own.keys() | ours.keys() if own.get(name) != ours.get(name))
    left_out = (recipe_of(small) or {}).get("dropped", {})
    if differing or left_out.keys() != edit.dropped.keys():
        named = ", ".join(differing[:3]) or "its dropped branches"
        raise UnsupportedModelError(
            "steps_to above 1 needs the dense model that the pruned one was built from, traced in the same way, but "
            f"they differ in {named}; pass that model as teacher=, with the forward= of the search, or steps_to=1"
        )


def _between(structure: Structure, target: Pruning, order: Mapping[str, tuple[int, ...]], share: float) -> Pruning:
    """The pruning that has done a share of the target."""
    kept = {}
    for group in structure.groups:
        stays = target.kept.get(group.name)
        if stays is None:
            continue
        count = group.size - share * (group.size - len(stays))
        count = max(len(stays), group.multiple * round(count / group.multiple))
        needed = set(stays)
        others = [unit for unit in order[group.name] if unit not in needed]
        kept[group.name] = tuple(sorted((*stays, *others[: count - len(stays)])))
    gone = len(target.dropped) - round(share * len(target.dropped))
    return Pruning(kept, dropped=target.dropped[gone:])


def cut_on(dense: nn.Module, trained: nn.Module | None, before: Edit, after: Edit) -> nn.Module:
    """Build the next of nested networks with the weights of the one before.

    Args:
        dense: The dense model.
        trained: The network before; None for the dense one itself.
        before: Its edit.
        after: The edit of the next.
    """
    if trained is None:
        return build(dense, after)
    whole = build(dense, Edit({}, {}))
    tensors: dict[str, Tensor] = dict((*whole.named_parameters(), *whole.named_buffers()))
    with torch.no_grad():
        for name, value in weights_of(trained).items():
            place = tensors[name]
            place[_places(place, before.slices.get(name, {}))] = value.to(place.device)
    return build(whole, after)


def _places(tensor: Tensor, kept: Mapping[int, Any]) -> tuple[Tensor, ...] | Any:
    """Index of the entries that stay along each dimension."""
    if not tensor.ndim:
        return ...
    found = []
    for dim, size in enumerate(tensor.shape):
        index = torch.as_tensor(kept[dim]) if dim in kept else torch.arange(size)
        found.append(index.to(tensor.device).view(*[-1 if i == dim else 1 for i in range(tensor.ndim)]))
    return tuple(found)
