"""Structure of a model: the result of `analyse`, which everything downstream works with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from torch import nn

from autoprune.protocols import IntArray, Pruning
from autoprune.structure.branches.branch import Branch, Presence
from autoprune.structure.branches.numbers import Numbered, closed_up
from autoprune.structure.labels import Propagation
from autoprune.structure.rewriting.graph_module import Description
from autoprune.structure.rules.layers import kept_groups
from autoprune.structure.slicing.slicing import Edit, build
from autoprune.structure.slicing.zeros import Pattern
from autoprune.structure.terms import NO_TERMS, Terms, WeightUse, cost_terms, multiplied_parameters, uses_of
from autoprune.structure.tracing.record import Record
from autoprune.structure.units import AffineSize, BoolArray, Frozen, Group, Units, find_frozen


@dataclass(frozen=True)
class Attribute:
    """Size that a module keeps in Python, as an affine function of the widths.

    Attributes:
        fixed: Constant part.
        shares: For each group that the size depends on: its name, the share of each unit, and its dense width.
        module: Qualified name of the module.
        path: The attribute, or one of an object that the module refers to, such as ``"config.num_heads"``.
    """

    fixed: int
    shares: tuple[tuple[str, int, int], ...]
    module: str = ""
    path: str = ""

    @classmethod
    def of(cls, units: Units, size: AffineSize, module: str = "", path: str = "") -> Attribute:
        """Make an attribute from a size of `Units.affine`."""
        shares = ((units.groups[group], each) for group, each in size.shares)
        return cls(size.fixed, tuple((group.name, each, group.size) for group, each in shares), module, path)

    def value(self, widths: Mapping[str, int]) -> int:
        """Return the size at widths by group name; groups not named stay whole."""
        return self.fixed + sum(each * widths.get(name, dense) for name, each, dense in self.shares)


@dataclass(frozen=True)
class Structure:
    """Removable units of a model, with their effect on tensors and costs. Holds no tensor; pickles.

    Attributes:
        groups: Groups of removable units, in forward order.
        frozen: Parameter dimensions that stay, with reasons.
        untouched: Parameters that the traced pass did not read; they stay.
        units_of: Unit of each index of each dimension of every parameter and buffer that can shrink (-1 stays).
        attributes: Sizes that modules keep in Python and that must follow the widths.
        terms: Exact costs as functions of the widths.
        weights: Shapes of the parameters that convolutions and matrix products multiply with, in forward order.
        device: Device of the traced pass: ``"meta"``, or that of the model's real values.
        graphs: Modules that are delivered as graphs of their operations, because their code does not follow the widths.
        untrained: Reason why operations of training alone were not followed, in words; empty if they were.
        unread: Groups that no output depends on, and none in training.
        branches: Parts that may be dropped, in forward order.
        undropped: Residual branches that stay, by the module that adds them, each with the reason.
        numbered: Numbers by which layers find their places in a cache, which close up where layers are dropped.
        uses: Use of each of `weights` in one sample.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    untouched: tuple[str, ...]
    units_of: Mapping[str, tuple[IntArray | None, ...]] = field(repr=False)
    attributes: tuple[Attribute, ...] = field(repr=False)
    terms: Terms = field(repr=False)
    weights: Mapping[str, tuple[int, ...]] = field(repr=False)
    device: str
    graphs: Mapping[str, Description] = field(default_factory=dict, repr=False)
    untrained: str = ""
    unread: frozenset[str] = frozenset()
    branches: tuple[Branch, ...] = ()
    undropped: Mapping[str, str] = field(default_factory=dict, repr=False)
    numbered: tuple[Numbered, ...] = field(default=(), repr=False)
    uses: Mapping[str, WeightUse] = field(default_factory=dict, repr=False)

    @cached_property
    def sizes(self) -> IntArray:
        """Units in each group, shape (groups,)."""
        return np.array([group.size for group in self.groups], dtype=np.int64)

    @cached_property
    def presence(self) -> Presence:
        """Presence of branches and of the groups inside them."""
        return Presence(self.branches, tuple(group.name for group in self.groups))

    @cached_property
    def dense(self) -> IntArray:
        """Units in each group, then 1 for each branch, shape (groups + branches,): widths of the dense model."""
        return np.concatenate([self.sizes, np.ones(len(self.branches), dtype=np.int64)])

    @cached_property
    def macs(self) -> float:
        """Multiply-accumulates of one sample in the dense model."""
        table, products = self.terms.sizes, self.terms.macs
        dense = table[:, 0] + table[:, 1:] @ self.dense
        return float((products.coefficients * dense[products.factors].astype(float).prod(1)).sum()) / self.terms.batch

    @cached_property
    def _offsets(self) -> dict[str, tuple[int, int]]:
        starts = np.cumsum([0, *self.sizes]).tolist()
        return {group.name: (start, group.size) for start, group in zip(starts, self.groups, strict=False)}

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @cached_property
    def _tensors_of(self) -> dict[str, list[int]]:
        """Positions in `units_of` of the tensors that hold units of each group."""
        group_of = np.repeat(np.arange(len(self.groups)), self.sizes)
        found: dict[int, IntArray] = {}
        tensors: dict[str, list[int]] = {group.name: [] for group in self.groups}
        for i, dims in enumerate(self.units_of.values()):
            own = set()
            for units in dims:
                if units is not None:
                    if id(units) not in found:
                        found[id(units)] = np.unique(group_of[units[units >= 0]])
                    own.update(found[id(units)].tolist())
            for group in own:
                tensors[self.groups[group].name].append(i)
        return tensors

    @cached_property
    def _named_units(self) -> list[tuple[str, tuple[IntArray | None, ...]]]:
        return list(self.units_of.items())

    @cached_property
    def _modules_of(self) -> dict[str, set[str]]:
        """Modules that keep a size of each group."""
        modules: dict[str, set[str]] = {group.name: set() for group in self.groups}
        for attribute in self.attributes:
            for group, _, _ in attribute.shares:
                modules.setdefault(group, set()).add(attribute.module)
        return modules

    @cached_property
    def _sizes_in(self) -> dict[str, list[Attribute]]:
        """The sizes that each module keeps."""
        attributes: dict[str, list[Attribute]] = {}
        for attribute in self.attributes:
            attributes.setdefault(attribute.module, []).append(attribute)
        return attributes

    @cached_property
    def _dense_attributes(self) -> dict[str, dict[str, int]]:
        return {module: {each.path: each.value({}) for each in own} for module, own in self._sizes_in.items()}

    def keep(self, pruning: Pruning) -> BoolArray:
        """Mark the units that stay, bool, shape (units,).

        Raises:
            ValueError: If a group is unknown, a unit is out of range, or a group would keep no units or not a multiple
                of its `Group.multiple`.
        """
        keep = np.ones(int(self.sizes.sum()), dtype=bool)
        for name, kept in pruning.kept.items():
            if name not in self._offsets:
                raise ValueError(f"pruning.kept must name groups of the model, got {name!r}; see structure.groups")
            start, size = self._offsets[name]
            index = np.asarray(kept, dtype=np.int64)
            if not len(index) or index.min() < 0 or index.max() >= size:
                raise ValueError(f"pruning.kept[{name!r}] must be one or more units in [0, {size}), got {kept}")
            multiple = self._by_name[name].multiple
            if len(index) % multiple:
                raise ValueError(f"pruning.kept[{name!r}] must keep a multiple of {multiple} units, got {len(index)}")
            keep[start : start + size] = False
            keep[start + index] = True
        return keep

    def edit(self, pruning: Pruning) -> Edit:
        """Make the edit of a pruning: the changes of each tensor and of the grouped modules."""
        keep = np.append(self.keep(pruning), True)  # unit -1, which stays, reads the last entry
        found: dict[int, IntArray | None] = {}

        def kept(units: IntArray) -> IntArray | None:
            if id(units) not in found:
                alive = keep[units]
                found[id(units)] = None if alive.all() else np.flatnonzero(alive)
            return found[id(units)]

        gone = self.presence.outermost(pruning.dropped)
        vanished = {name for branch in gone for name in (*branch.parameters, *branch.buffers)}
        slices = {}
        touched = {i for group in pruning.kept for i in self._tensors_of[group]}
        for name, dims in (self._named_units[i] for i in sorted(touched)):
            own = {
                dim: index for dim, units in enumerate(dims) if units is not None if (index := kept(units)) is not None
            }
            if own and name not in vanished:
                slices[name] = own
        for name, count in pruning.zeroed.items():
            self._require_elements(name, count, slices.get(name, {}), pruning.patterns.get(name))
        zeroed = {name: count for name, count in pruning.zeroed.items() if count and name not in vanished}
        widths = {name: len(units) for name, units in pruning.kept.items()}
        attributes = dict(self._dense_attributes)
        for module in {module for group in pruning.kept for module in self._modules_of[group]}:
            attributes[module] = {each.path: each.value(widths) for each in self._sizes_in[module]}
        # The dense model keeps the user's own modules.
        patterns = {name: pattern for name, pattern in pruning.patterns.items() if name in zeroed}
        edit = Edit(slices, attributes, zeroed, self.graphs if slices or gone else {}, {}, patterns)
        return self._without(edit, gone) if gone else edit

    def _without(self, edit: Edit, gone: Sequence[Branch]) -> Edit:
        """Leave out the modules of branches, with the sizes that they keep, and close up the numbers of the others."""

        def stay(module: str) -> bool:
            return not any(branch.holds(module) for branch in gone)

        attributes = {module: dict(own) for module, own in edit.attributes.items() if stay(module)}
        for module, path, number in closed_up(self.numbered, stay):
            attributes.setdefault(module, {})[path] = number
        graphs = {module: made for module, made in edit.graphs.items() if stay(module)}
        dropped = {module: returns for branch in gone for module, returns in branch.modules.items()}
        return Edit(edit.slices, attributes, edit.zeroed, graphs, dropped, edit.patterns)

    def _require_elements(self, name: str, count: int, kept: Mapping[int, IntArray], pattern: str | None) -> None:
        if name not in self.weights:
            raise ValueError(f"pruning.zeroed must name weights of the model, got {name!r}; see structure.weights")
        shape = tuple(len(kept[dim]) if dim in kept else size for dim, size in enumerate(self.weights[name]))
        left = math.prod(shape)
        if not 0 <= count <= left:
            raise ValueError(f"pruning.zeroed[{name!r}] must be a number of its elements, 0 to {left}, got {count}")
        if pattern is not None:
            form = Pattern.parse(pattern)
            if (form.stay and count != form.zeros(shape)) or count % form.each or count > form.zeros(shape):
                raise ValueError(
                    f"pruning.zeroed[{name!r}] must be a number of zeros that {pattern} can have in a weight of shape "
                    f"{shape}: {form.zeros(shape)}{'' if form.stay else f', or fewer by multiples of {form.each}'}; "
                    f"got {count}"
                )

    def build(self, model: nn.Module, pruning: Pruning) -> nn.Module:
        """Build the pruned `model` as a plain module that shares no state with it."""
        return build(model, self.edit(pruning))


def delivered_as_graphs(structure: Structure) -> str:
    """Name the modules that are rewritten, the first of each class."""
    first: dict[str, str] = {}
    for name, description in structure.graphs.items():
        first.setdefault(str(description["name"]), name or "the model")
    named = ", ".join(f"{kind} ({name!r})" for kind, name in list(first.items())[:3])
    return f"{len(structure.graphs)} modules whose code ties sizes are delivered as graphs: {named}"


def assemble(
    flow: Propagation, units: Units, untouched: tuple[str, ...] = (), attributes: tuple[Attribute, ...] = ()
) -> Structure:
    """Assemble the structure from a propagation and its units; `attributes` are those found by trying."""
    if "terms" not in units.derived:
        units.derived["terms"] = cost_terms(flow, units)
    return replace(
        without_costs(flow, units, attributes),
        frozen=find_frozen(flow, units),
        untouched=untouched,
        terms=units.derived["terms"],
        weights=multiplied_parameters(flow.record),
        uses=uses_of(flow.record),
        unread=_unread(flow.record, units.groups),
    )


def without_costs(flow: Propagation, units: Units, attributes: tuple[Attribute, ...] = ()) -> Structure:
    """Assemble only what a smaller module is cut by, which many trials need; arguments as in `assemble`."""
    units_of: dict[str, tuple[IntArray | None, ...]] = {}
    arrays: dict[bytes, IntArray] = {}
    for name, value in flow.record.named().items():
        dims = [units.of(labels) for labels in flow.of(value)]
        if any(dim is not None for dim in dims):
            units_of[name] = tuple(None if dim is None else arrays.setdefault(dim.tobytes(), dim) for dim in dims)
    return Structure(
        groups=units.groups,
        frozen=(),
        untouched=(),
        units_of=units_of,
        attributes=(*_group_counts(flow, units), *attributes),
        terms=NO_TERMS,
        weights={},
        device=flow.record.device,
    )


def _unread(record: Record, groups: Sequence[Group]) -> frozenset[str]:
    """Names of the groups none of whose parameters reaches an output, followed by the storage of values."""
    values = record.values
    wanted = {values[value].base for value in (*record.outputs, *record.trained)}
    for op in reversed((*record.ops, *record.training)):
        written = op.results() if not op.writes else [*op.results(), *op.inputs()]
        if any(values[value].base in wanted for value in written):
            wanted.update(values[value].base for value in op.inputs())
    read = {values[base].name for base in wanted}
    return frozenset(group.name for group in groups if read.isdisjoint(slot.tensor for slot in group.slots))


def _group_counts(flow: Propagation, units: Units) -> list[Attribute]:
    """Find ``groups`` of grouped convolutions and ``num_groups`` of group norms that may lose whole groups."""
    found = {}
    for op in (*flow.record.ops, *flow.record.training):
        if op.index in flow.record.twins:
            continue
        name = "groups" if "groups" in op.args else "group"
        groups = op.args.get(name)
        weight = op.args.get("weight")
        if not groups or groups == 1 or weight is None or kept_groups(op, flow, 0) == groups:
            continue
        value = flow.record.values[weight.id]
        size = units.affine(flow.of(weight.id)[0], value.shape[0])
        if value.name and size.shares:
            module = value.name.rpartition(".")[0]
            path = "groups" if name == "groups" else "num_groups"
            each = value.shape[0] // groups
            count = AffineSize(size.fixed // each, tuple((group, share // each) for group, share in size.shares))
            found[module] = Attribute.of(units, count, module, path)
    return list(found.values())
