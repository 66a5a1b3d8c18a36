"""Units and groups made from labels, and the frozen dimensions with the reasons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd, lcm
from typing import Any

import numpy as np

from autoprune.protocols import IntArray
from autoprune.structure.labels import Labels, Propagation

REMEMBERED = 4
"""Most results for one propagation that are cached."""

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True)
class Slot:
    """Slot: the indices of a group's units in one dimension of one parameter or buffer.

    Attributes:
        tensor: Qualified name.
        dim: Dimension of the tensor.
        indices: Indices along that dimension that each unit owns, shape (units, members).
    """

    tensor: str
    dim: int
    indices: IntArray


@dataclass(frozen=True)
class Group:
    """Group of interchangeable units: one dimension of a search.

    Attributes:
        name: Module that makes the units, for example ``"layer1.0.conv1"``.
        size: Number of units.
        slots: Every parameter and buffer dimension that the units touch.
        multiple: The number of units that stay must be a multiple of this.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    multiple: int = 1

    def __repr__(self) -> str:
        return f"Group({self.name!r}, {self.size} units, {len(self.slots)} slots)"


@dataclass(frozen=True)
class Frozen:
    """Frozen parameter dimension, or part of one, with the reason.

    Attributes:
        tensor: Qualified name of the parameter.
        dim: Its dimension.
        size: Number of its indices that stay.
        reason: The reason, in words.
    """

    tensor: str
    dim: int
    size: int
    reason: str


@dataclass(frozen=True)
class AffineSize:
    """Size that depends on the widths of some groups.

    Attributes:
        fixed: Constant part.
        shares: Number of each group, and the share of each of its units; ascending.
    """

    fixed: int
    shares: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Units:
    """Units of a propagation.

    Attributes:
        groups: In forward order.
        unit_of: Unit of each label, shape (labels,); -1 where it stays. Units are numbered group by group.
        group_of: Group of each unit, shape (units,).
        component: Component of joined labels of each label, shape (labels,).
        reasons: For each component that stays, the reason in words.
        derived: Cached values computed from them alone, by name.
    """

    groups: tuple[Group, ...]
    unit_of: IntArray
    group_of: IntArray
    component: IntArray = field(repr=False)
    reasons: Mapping[int, str] = field(repr=False)
    _sizes: dict[int, tuple[IntArray, AffineSize]] = field(default_factory=dict, repr=False, compare=False)
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def of(self, labels: Labels) -> IntArray | None:
        """Return the unit of each index of a dimension, or None when all of it stays."""
        if labels is None:
            return None
        units = self.unit_of[labels]
        return units if (units >= 0).any() else None

    def affine(self, labels: Labels, size: int) -> AffineSize:
        """Return a dimension's size as a function of the widths."""
        if labels is None:
            return AffineSize(size, ())
        if id(labels) not in self._sizes:  # most values share the arrays of others; kept, so that the id stays theirs
            self._sizes[id(labels)] = (labels, self._affine(labels, size))
        return self._sizes[id(labels)][1]

    def _affine(self, labels: IntArray, size: int) -> AffineSize:
        units = self.of(labels)
        if units is None:
            return AffineSize(size, ())
        groups, counts = np.unique(self.group_of[units[units >= 0]], return_counts=True)
        pairs = zip(groups.tolist(), counts.tolist(), strict=True)
        return AffineSize(int((units < 0).sum()), tuple((g, count // self.groups[g].size) for g, count in pairs))

    def alive(self, labels: Labels, size: int, keep: BoolArray) -> IntArray:
        """Return the indices of a dimension that stay without the units where `keep` (units,) is False, ascending."""
        units = self.of(labels)
        if units is None:
            return np.arange(size, dtype=np.int64)
        return np.flatnonzero((units < 0) | keep[units]).astype(np.int64)


def find_units(flow: Propagation, exclude: Mapping[str, str] | None = None) -> Units:
    """Join labels into units, and units into groups; the last results are cached.

    Two units are interchangeable when they touch the same dimensions of all tensors, results included, with the same
    number of indices each; so the size of every tensor depends only on the number of units of a group that stay.

    Args:
        flow: A propagation.
        exclude: Names of groups to freeze, each with the reason.
    """
    edges = list(flow.edges)  # kept, so that no other edge gets the address of one
    key = (*map(id, edges), len(flow.freezes), len(flow.multiples), tuple(sorted((exclude or {}).items())))
    if key not in flow.found:
        while len(flow.found) >= REMEMBERED:
            flow.found.pop(next(iter(flow.found)))
        flow.found[key] = edges, _units_of(flow, exclude)
    found: Units = flow.found[key][1]
    return found


def _units_of(flow: Propagation, exclude: Mapping[str, str] | None) -> Units:
    joins = _Joins.of(flow)
    component = _components(flow, joins)
    reasons = _reasons(flow, joins, component)
    members = _members(flow, component, reasons)
    groups: list[tuple[str, IntArray]] = []
    names: dict[str, int] = defaultdict(int)
    firsts, owners = _producers(flow)
    for units in sorted(members, key=lambda units: int(units[0])):
        base = owners[int(np.searchsorted(firsts, units[0], side="right")) - 1]
        names[base] += 1
        name = base if names[base] == 1 else f"{base}~{names[base]}"
        reason = "it is the only unit of its group" if len(units) == 1 else (exclude or {}).get(name)
        if reason is None:
            groups.append((name, units))
        else:
            reasons.update(dict.fromkeys(units.tolist(), reason))
    unit_of_component = np.full(len(component), -1, dtype=np.int64)
    offset = 0
    for _, units in groups:
        unit_of_component[units] = np.arange(offset, offset + len(units))
        offset += len(units)
    group_of = np.repeat(np.arange(len(groups), dtype=np.int64), [len(units) for _, units in groups])
    unit_of = unit_of_component[component]
    slots = _slots(flow, unit_of, group_of, [len(units) for _, units in groups])
    multiples = _multiples(flow, unit_of, group_of, [len(units) for _, units in groups])
    made = tuple(
        Group(name, len(units), tuple(own), multiple)
        for (name, units), own, multiple in zip(groups, slots, multiples, strict=True)
    )
    coarse = [group.name for group in made if group.size < 2 * group.multiple]
    if coarse:
        return _units_of(flow, {**(exclude or {}), **dict.fromkeys(coarse, "its size must stay a multiple of itself")})
    return Units(made, unit_of, group_of, component, reasons)


def _multiples(flow: Propagation, unit_of: IntArray, group_of: IntArray, sizes: list[int]) -> list[int]:
    """Number that each group's size must be a multiple of; if groups share a dimension, each alone meets it."""
    multiples = [1] * len(sizes)
    for labels, number in flow.multiples:
        units = unit_of[labels]
        for group, count in zip(*np.unique(group_of[units[units >= 0]], return_counts=True), strict=True):
            each = int(count) // sizes[group]
            multiples[group] = lcm(multiples[group], number // gcd(number, each))
    return multiples


@dataclass(frozen=True)
class _Joins:
    """Joined pairs of labels of all edges in a row: many graphs are made of some thousand small edges.

    Attributes:
        a: Labels, shape (pairs,).
        b: The labels that they are joined with, shape (pairs,).
        edge: Position of the edge of each pair, ascending, shape (pairs,).
    """

    a: IntArray
    b: IntArray
    edge: IntArray

    @classmethod
    def of(cls, flow: Propagation) -> _Joins:
        """Concatenate the edges of a propagation."""
        a, edge = _in_a_row([edge.a for edge in flow.edges])
        b, _ = _in_a_row([edge.b for edge in flow.edges])
        return cls(a, b, edge)


def _in_a_row(arrays: Sequence[IntArray]) -> tuple[IntArray, IntArray]:
    """Concatenate arrays; also returns the position of the array of each element."""
    if not arrays:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    return np.concatenate(arrays), np.repeat(np.arange(len(arrays)), [len(each) for each in arrays])


def _components(flow: Propagation, joins: _Joins) -> IntArray:
    """Smallest label of the connected component of each label, shape (labels,)."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    moving = (joins.a > 0) & (joins.b > 0)  # label 0 stays; it must not connect everything that touches it
    pairs = joins.a[moving], joins.b[moving]
    graph = coo_matrix((np.ones(len(pairs[0]), dtype=np.int8), pairs), shape=(flow.count,) * 2)
    _, number = connected_components(graph, directed=False)
    first = np.empty(number.max() + 1, dtype=np.int64)
    first[number[::-1]] = np.arange(flow.count)[::-1]  # the last assignment, of the smallest label, counts
    smallest: IntArray = first[number]
    return smallest


def _reasons(flow: Propagation, joins: _Joins, component: IntArray) -> dict[int, str]:
    """Map each frozen component to the first reason why it stays."""
    reasons: dict[int, str] = {0: "it has a constant size"}
    frozen, freeze = _in_a_row([each.labels for each in flow.freezes])
    for label, i in _firsts(component, frozen, freeze):
        reasons.setdefault(label, flow.freezes[i].reason)
    stays = (joins.a == 0) != (joins.b == 0)
    touched = np.where(joins.a == 0, joins.b, joins.a)[stays]
    for label, i in _firsts(component, touched, joins.edge[stays]):
        if label not in reasons:
            reasons[label] = f"tied to a part of constant size by {flow.record.op(flow.edges[i].op).where()}"
    return reasons


def _firsts(component: IntArray, labels: IntArray, source: IntArray) -> Iterator[tuple[int, int]]:
    """Components of `labels`, each with the first entry of `source`, which goes with the labels."""
    first = np.full(len(component), -1, dtype=np.int64)
    first[component[labels[::-1]]] = source[::-1]  # the last assignment counts
    found = np.flatnonzero(first >= 0)
    return zip(found.tolist(), first[found].tolist(), strict=True)


def _members(flow: Propagation, component: IntArray, reasons: dict[int, str]) -> list[IntArray]:
    """Removable components by equal signature, each an ascending array of components."""
    movable = np.ones(flow.count, dtype=bool)
    movable[list(reasons)] = False
    owned = np.zeros(flow.count, dtype=bool)
    # A signature is the sum, modulo 2**64, of a random mark of each dimension times the component's indices there:
    # equal where these are equal, and of 100,000 others two agree once in 10**9 times.
    signature = np.zeros(flow.count, dtype=np.uint64)
    labels, dimension = _in_a_row(list({id(labels): labels for _, labels in _dimensions(flow)}.values()))
    marks = np.random.default_rng(0).integers(2**64, size=len(labels) and dimension[-1] + 1, dtype=np.uint64)
    np.add.at(signature, component[labels], marks[dimension])
    for value, labels in _dimensions(flow):
        if flow.record.values[value].kind == "parameter":
            owned[component[labels]] = True
    units = np.flatnonzero(owned & movable).astype(np.int64)
    order = units[np.argsort(signature[units], kind="stable")]
    return np.split(order, np.flatnonzero(np.diff(signature[order])) + 1) if len(order) else []


def _dimensions(flow: Propagation) -> Iterable[tuple[int, IntArray]]:
    for value, dims in flow.labels.items():
        for labels in dims:
            if labels is not None:
                yield value, labels


def _named_dimensions(flow: Propagation) -> Iterable[tuple[str, int, IntArray]]:
    for value, dims in flow.labels.items():
        if flow.record.values[value].name:
            for dim, labels in enumerate(dims):
                if labels is not None:
                    yield flow.record.values[value].name, dim, labels


def _producers(flow: Propagation) -> tuple[IntArray, list[str]]:
    """First label of each parameter dimension, ascending, and the module that owns it."""
    found = sorted((int(labels[0]), name.rpartition(".")[0] or name) for name, _, labels in _named_dimensions(flow))
    return np.array([first for first, _ in found], dtype=np.int64), [owner for _, owner in found]


def _slots(flow: Propagation, unit_of: IntArray, group_of: IntArray, sizes: list[int]) -> list[list[Slot]]:
    """Slots of each group, from one pass over the parameters."""
    slots: list[list[Slot]] = [[] for _ in sizes]
    for tensor, dim, labels in _named_dimensions(flow):
        units = unit_of[labels]
        moving = np.flatnonzero(units >= 0)
        order = moving[np.argsort(units[moving], kind="stable")]
        groups = group_of[units[order]]
        for part in np.split(order, np.flatnonzero(np.diff(groups)) + 1) if len(order) else ():
            group = int(group_of[units[part[0]]])
            slots[group].append(Slot(tensor, dim, part.reshape(sizes[group], -1).astype(np.int64)))
    return slots


def find_frozen(flow: Propagation, units: Units) -> tuple[Frozen, ...]:
    """Find the parameter dimensions that stay, kernel sizes left out; not part of `find_units`, which many trials call.

    Args:
        flow: A propagation.
        units: Its units.
    """
    if "frozen" not in units.derived:
        units.derived["frozen"] = tuple(_frozen(flow, units))
    found: tuple[Frozen, ...] = units.derived["frozen"]
    return found


def _frozen(flow: Propagation, units: Units) -> Iterable[Frozen]:
    kinds = {value.name: value.kind for value in flow.record.values}
    for tensor, dim, labels in _named_dimensions(flow):
        if kinds[tensor] != "parameter":
            continue
        stuck = units.component[labels[units.unit_of[labels] < 0]]
        by_reason: dict[str, int] = defaultdict(int)
        for label, count in zip(*np.unique(stuck, return_counts=True), strict=True):
            by_reason[units.reasons.get(int(label), "no operation read it")] += int(count)
        for reason, count in by_reason.items():
            if reason != "kernel size":
                yield Frozen(tensor, dim, count, reason)


def first_labels(flow: Propagation, group: Group) -> IntArray:
    """Return a label of each unit of a group, shape (units,)."""
    slot = group.slots[0]
    labels = flow.of(flow.record.named()[slot.tensor])[slot.dim]
    assert labels is not None
    first: IntArray = labels[slot.indices[:, 0]]
    return first
