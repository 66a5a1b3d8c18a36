"""The structure of a model: what `analyse` finds out once and everything downstream works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from autoprune.protocols import IntArray, Pruning
from autoprune.structure.propagate import Propagation
from autoprune.structure.replay import kept_groups
from autoprune.structure.slicing import Edit, build
from autoprune.structure.terms import Terms, cost_terms
from autoprune.structure.units import BoolArray, Frozen, Group, Units


@dataclass(frozen=True)
class GroupedSite:
    """A grouped convolution or group norm that may lose whole groups.

    Attributes:
        module: Its qualified name.
        tensor: A tensor of it whose first dimension shrinks with the groups.
        per_group: Indices of that dimension that each group owns.
        size: Dense size of that dimension.
    """

    module: str
    tensor: str
    per_group: int
    size: int


@dataclass(frozen=True)
class Structure:
    """What can be removed from a model, and what that does to its tensors and costs. Holds no tensor; pickles.

    Attributes:
        groups: What can be removed, in forward order.
        frozen: Parameter dimensions that stay, with reasons.
        untouched: Parameters that the traced pass did not read; they stay.
        units_of: Unit of each index of each dimension of every parameter and buffer that can shrink (-1 stays).
        sites: Grouped convolutions and group norms that may lose whole groups.
        terms: Exact costs as functions of the widths.
        device: Where the pass was traced: ``"meta"``, or the device of the model's real values.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    untouched: tuple[str, ...]
    units_of: Mapping[str, tuple[IntArray | None, ...]]
    sites: tuple[GroupedSite, ...]
    terms: Terms
    device: str

    @cached_property
    def sizes(self) -> IntArray:
        """Units in each group, shape (groups,)."""
        return np.array([group.size for group in self.groups], dtype=np.int64)

    @cached_property
    def _offsets(self) -> dict[str, tuple[int, int]]:
        starts = np.cumsum([0, *self.sizes]).tolist()
        return {group.name: (start, group.size) for start, group in zip(starts, self.groups, strict=False)}

    def keep(self, pruning: Pruning) -> BoolArray:
        """Which units stay, bool, shape (units,).

        Raises:
            ValueError: If a group is unknown, a unit is out of range, or a group would lose all its units.
        """
        keep = np.ones(int(self.sizes.sum()), dtype=bool)
        for name, kept in pruning.kept.items():
            if name not in self._offsets:
                raise ValueError(f"pruning.kept must name groups of the model, got {name!r}; see structure.groups")
            start, size = self._offsets[name]
            index = np.asarray(kept, dtype=np.int64)
            if not len(index) or index.min() < 0 or index.max() >= size:
                raise ValueError(f"pruning.kept[{name!r}] must be one or more units in [0, {size}), got {kept}")
            keep[start : start + size] = False
            keep[start + index] = True
        return keep

    def edit(self, pruning: Pruning) -> Edit:
        """What a pruning does to each tensor and to the grouped modules."""
        keep = np.append(self.keep(pruning), True)  # unit -1, what stays, reads the last entry
        found: dict[int, IntArray | None] = {}

        def kept(units: IntArray) -> IntArray | None:
            if id(units) not in found:
                alive = keep[units]
                found[id(units)] = None if alive.all() else np.flatnonzero(alive)
            return found[id(units)]

        slices = {}
        for name, dims in self.units_of.items():
            own = {
                dim: index for dim, units in enumerate(dims) if units is not None if (index := kept(units)) is not None
            }
            if own:
                slices[name] = own
        groups = {}
        for site in self.sites:
            index = slices.get(site.tensor, {}).get(0)
            groups[site.module] = (site.size if index is None else len(index)) // site.per_group
        return Edit(slices, groups)

    def build(self, model: nn.Module, pruning: Pruning) -> nn.Module:
        """Build a plain module, the pruned `model`; shares no state with it."""
        return build(model, self.edit(pruning))


def assemble(flow: Propagation, units: Units, untouched: tuple[str, ...]) -> Structure:
    """Put together what a propagation and its units say."""
    units_of: dict[str, tuple[IntArray | None, ...]] = {}
    arrays: dict[bytes, IntArray] = {}
    for name, value in flow.record.named().items():
        dims = [units.of(labels) for labels in flow.of(value)]
        if any(dim is not None for dim in dims):
            units_of[name] = tuple(None if dim is None else arrays.setdefault(dim.tobytes(), dim) for dim in dims)
    return Structure(
        groups=units.groups,
        frozen=units.frozen,
        untouched=untouched,
        units_of=units_of,
        sites=tuple(_sites(flow, units_of)),
        terms=cost_terms(flow, units),
        device=flow.record.device,
    )


def _sites(flow: Propagation, units_of: Mapping[str, tuple[IntArray | None, ...]]) -> list[GroupedSite]:
    sites = {}
    for op in flow.record.ops:
        groups = op.args.get("groups", op.args.get("group"))
        weight = op.args.get("weight")
        if not groups or groups == 1 or weight is None or kept_groups(op, flow, 0) == groups:
            continue
        value = flow.record.values[weight.id]
        if value.name in units_of:
            module = value.name.rpartition(".")[0]
            sites[module] = GroupedSite(module, value.name, value.shape[0] // groups, value.shape[0])
    return list(sites.values())
