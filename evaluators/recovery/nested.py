"""Nested networks between the dense one and a pruned one: each loses a share of the units that go in the end."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.data.batch import Batch, Forward, fresh, pieces
from autoprune.data.sampling import seeded
from autoprune.errors import UnsupportedModelError
from autoprune.evaluators.compensated import Compensated
from autoprune.evaluators.training.weights import weights_of
from autoprune.importance.calibration import Calibration
from autoprune.importance.criteria import rank_units
from autoprune.protocols import IntArray, Pruning
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.kept import kept_units, recipe_of
from autoprune.structure.slicing.slicing import Edit, Slices, build
from autoprune.structure.structure import Structure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """Samples to fit networks on.

    Attributes:
        batches: On the device of the networks.
        forward: Runs a network on a batch.
    """

    batches: Sequence[Batch]
    forward: Forward

    def example(self, model: nn.Module) -> Example:
        """Make a call of a model on two of them."""
        return Example.of_batch(model, fresh(pieces(self.batches[0], 2)[0]), self.forward)


def nested_edits(small: nn.Module, dense: nn.Module, samples: Samples, count: int) -> list[Edit]:
    """Plan edits of the dense model whose last one is that of the pruned model.

    Units go in the order of their l2 norm in the dense model, the smallest first, and branches from the last on.

    Args:
        small: Pruned, with its recipe.
        dense: The model that it was built from.
        samples: To trace the dense model with.
        count: Number of networks.

    Raises:
        UnsupportedModelError: If `small` carries no recipe, or one that does not follow from the structure of `dense`.
    """
    if recipe_of(small) is None:
        raise UnsupportedModelError(
            f"steps_to={count} needs a model from result.build(), which knows the units it keeps, but "
            f"{type(small).__name__} carries no recipe; pass steps_to=1"
        )
    structure = analyse(samples.example(dense))
    left_out = (recipe_of(small) or {}).get("dropped", {})
    target = _target(structure, kept_units(small), left_out)
    last = structure.edit(target)
    differing = _differing(last, kept_units(small), left_out)
    if differing:
        raise UnsupportedModelError(
            "steps_to above 1 needs the dense model that the pruned one was built from, traced in the same way, but "
            f"they differ in {differing}; pass that model as teacher=, with the forward= of the search, or steps_to=1"
        )
    order = rank_units(Calibration(dense, structure, samples.batches[:1], samples.forward), "l2")
    edits = [structure.edit(_between(structure, target, order, i / count)) for i in range(1, count)]
    return [*edits, last]


def _target(structure: Structure, slices: Slices, left_out: Collection[str]) -> Pruning:
    """The pruning that slices of tensors, and modules that are left out, follow from."""
    kept = {}
    for group in structure.groups:
        for slot in group.slots:
            stays = slices.get(slot.tensor, {}).get(slot.dim)
            if stays is not None:
                alive = np.isin(slot.indices, stays).all(axis=1)
                kept[group.name] = tuple(np.flatnonzero(alive).tolist())
                break
    dropped = tuple(b.name for b in structure.branches if b.modules and set(left_out).issuperset(b.modules))
    return Pruning({name: units for name, units in kept.items() if units}, dropped=dropped)


def _differing(edit: Edit, slices: Slices, left_out: Collection[str]) -> str:
    """Name what an edit does otherwise; empty if it does the same."""
    own, ours = (
        {name: {dim: index.tolist() for dim, index in dims.items()} for name, dims in each.items()}
        for each in (slices, edit.slices)
    )
    differing = sorted(name for name in own.keys() | ours.keys() if own.get(name) != ours.get(name))
    if not differing and set(left_out) == edit.dropped.keys():
        return ""
    return ", ".join(differing[:3]) or "its dropped branches"


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


def refit(module: nn.Module, wide: nn.Module, before: Edit, after: Edit, samples: Samples) -> bool:
    """Re-fit a network that was just cut to the one that it was cut from, see `Compensated`.

    Args:
        module: The network, changed in place.
        wide: The one before, which stays as it is.
        before: Its edit of the dense model.
        after: That of `module`.
        samples: Few batches, and how to run a model on them.

    Returns:
        False, with nothing changed, if the edit between the two does not follow from the structure of `wide`.
    """
    structure = analyse(samples.example(wide))
    slices = _between_edits(before.slices, after.slices)
    left_out = after.dropped.keys() - before.dropped.keys()
    target = _target(structure, slices, left_out)
    edit = structure.edit(target)
    if differing := _differing(edit, slices, left_out):
        log.info("a nested network starts without a re-fit, because its units are others in %s", differing)
        return False
    fitted = Compensated()
    fitted.collect_for(Calibration(wide, structure, samples.batches, samples.forward), target, bool(left_out))
    with seeded(0):
        fitted.adapt(module, edit, partial(samples.forward, module))
    return True


def _between_edits(before: Slices, after: Slices) -> dict[str, dict[int, IntArray]]:
    """Indices that stay from one edit of a model to a later one, in what the first has left."""
    found: dict[str, dict[int, IntArray]] = {}
    for name, dims in after.items():
        for dim, index in dims.items():
            there = before.get(name, {}).get(dim)
            if there is None or len(there) > len(index):
                found.setdefault(name, {})[dim] = index if there is None else np.searchsorted(there, index)
    return found


def _places(tensor: Tensor, kept: Mapping[int, Any]) -> tuple[Tensor, ...] | Any:
    """Index of the entries that stay along each dimension."""
    if not tensor.ndim:
        return ...
    found = []
    for dim, size in enumerate(tensor.shape):
        index = torch.as_tensor(kept[dim]) if dim in kept else torch.arange(size)
        found.append(index.to(tensor.device).view(*[-1 if i == dim else 1 for i in range(tensor.ndim)]))
    return tuple(found)
