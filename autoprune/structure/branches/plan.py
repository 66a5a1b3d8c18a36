"""Plans to leave out branches: the modules that go, and what stands for their results."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from torch import nn

from autoprune.protocols import IntArray
from autoprune.structure.branches.additions import Addition
from autoprune.structure.branches.cut import Cut
from autoprune.structure.branches.dataflow import Dataflow
from autoprune.structure.macs import products_of
from autoprune.structure.tracing.record import ModuleCall, Ref
from autoprune.structure.units import AffineSize

ATOMS = (bool, int, float, str, type(None))


class NotLeftOutError(Exception):
    """Raised if a branch cannot be left out; gives the reason in words."""


@dataclass(frozen=True)
class Plan:
    """Way to leave out one branch.

    Attributes:
        modules: Modules that go, each with what it returns instead, see `autoprune.structure.slicing.dropped`.
        cuts: The same in the record.
        gone: Operations inside these modules.
        additions: Additions that it leaves out, by their operation and the value added.
        whole: Whether one module goes as a whole with its addition, and hands its input on.
        zeros: Values in place of which there are zeros.
    """

    modules: Mapping[str, Any]
    cuts: tuple[Cut, ...]
    gone: frozenset[int]
    additions: frozenset[tuple[int, int]] = frozenset()
    whole: bool = False
    zeros: frozenset[int] = frozenset()

    @property
    def ops(self) -> frozenset[int]:
        """Operations that do not run, or run on zeros."""
        return frozenset[int]().union(self.gone, *(cut.ops for cut in self.cuts))


@dataclass
class Calls:
    """Calls of the modules of a model that ran operations.

    Args:
        flow: Dependences of the pass.
        model: The model.
        sizes: ``sizes(value, dim)``: a size as a function of the widths.
    """

    flow: Dataflow
    model: nn.Module
    sizes: Callable[[int, int], AffineSize]
    all: list[ModuleCall] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.all = [call for call in self.flow.record.calls if call.first < call.last and call.name]
        self.firsts: IntArray = np.array([call.first for call in self.all], dtype=np.int64)
        self.lasts: IntArray = np.array([call.last for call in self.all], dtype=np.int64)
        self.times = Counter(call.name for call in self.all)
        self.modules = dict(self.model.named_modules())
        live = np.zeros(self.flow.end, dtype=np.int64)
        live[sorted(self.flow.live)] = 1
        self._live: IntArray = live

    def inside(self, region: Iterable[int]) -> list[ModuleCall]:
        """Find the calls that run operations of a region and no other that matters, the outermost alone."""
        others = self._live.copy()
        own = np.zeros_like(others)
        own[list(region)] = 1
        others[own == 1] = 0
        without = np.concatenate([[0], np.cumsum(others)])
        within = np.concatenate([[0], np.cumsum(own)])
        fits = (without[self.lasts] == without[self.firsts]) & (within[self.lasts] > within[self.firsts])
        whole = sorted((self.all[i] for i in np.flatnonzero(fits)), key=lambda call: (call.first, -call.last))
        found: list[ModuleCall] = []
        for call in whole:
            same = bool(found) and (call.first, call.last) == (found[-1].first, found[-1].last)
            if same:  # of modules around the same operations, the calls end with the outermost
                found[-1] = min(call, found[-1], key=lambda one: one.name.count("."))
            elif not found or call.first >= found[-1].last:
                found.append(call)
        return found

    def around(self, first: int, last: int) -> list[ModuleCall]:
        """Find the calls around a range of operations, the innermost first."""
        near = np.flatnonzero((self.firsts <= first) & (self.lasts > last))
        return sorted((self.all[i] for i in near), key=lambda call: (call.last - call.first, -call.name.count(".")))

    def lives_in(self, call: ModuleCall, ops: frozenset[int]) -> bool:
        """Return whether a call runs nothing that matters but these operations."""
        return all(index in ops or not self._live[index] for index in range(call.first, call.last))

    def place(self, call: ModuleCall, value: int) -> list[Any] | None:
        """Return name and position of the argument that is a value, JSON-ready; None if there is none."""
        for leaf, place in zip(call.inputs, call.places, strict=True):
            if leaf == Ref(value) and call.places.count(place) == 1:
                return self._argument(call, place)
        return None

    def zeros(self, call: ModuleCall, value: int) -> Any | None:
        """Describe zeros in place of a result: like an argument of its sizes, or else of its number of dimensions.

        Of an argument with other sizes, those that depend on the same widths, or on none, differ as they do here: by
        padding, for example, or twice as many channels that a gate halves. Others are taken as they are, because it may
        be what stands for the result of another module that goes.
        """
        values = self.flow.record.values
        shape = values[value].shape
        tensors = [leaf.id for leaf in call.inputs if isinstance(leaf, Ref) and values[leaf.id].dtype.is_floating_point]
        alike = [i for i in tensors if len(values[i].shape) == len(shape)]
        for given in sorted(alike, key=lambda i: [self.sizes(i, d) != self.sizes(value, d) for d in range(len(shape))]):
            place = self.place(call, given)
            if place is not None:
                sizes = [(self.sizes(value, d), self.sizes(given, d)) for d in range(len(shape))]
                return {"zeros": [*place, [_relation(own, other) for own, other in sizes]]}
        return None

    def _argument(self, call: ModuleCall, place: int | str) -> list[Any]:
        try:
            parameters = list(inspect.signature(self.modules[call.name].forward).parameters.values())
        except (TypeError, ValueError):  # a forward made in C has none
            parameters = []
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)]
        if isinstance(place, int):
            return [named[place] if place < len(named) else "", place]
        return [place, named.index(place) if place in named else -1]

    def returns(self, call: ModuleCall, instead: Mapping[int, Any]) -> Any:
        """Describe what stands for the return value of a call, JSON-ready; values not in `instead` become None."""
        if call.form is None:
            raise NotLeftOutError(f"{call.name} returns other containers than tuples, lists and dictionaries")
        given = {leaf.id for leaf in call.inputs if isinstance(leaf, Ref)}

        def filled(form: Mapping[str, Any]) -> Any:
            ((kind, inner),) = form.items()
            if kind == "dict":
                return {"dict": {key: filled(entry) for key, entry in inner.items()}}
            if kind != "leaf":
                return {kind: [filled(entry) for entry in inner]}
            leaf = call.outputs[inner]
            if isinstance(leaf, Ref):
                place = self.place(call, leaf.id) if leaf.id in given else None
                return instead.get(leaf.id, {"value": None} if place is None else {"same": place})
            if type(leaf) not in ATOMS:
                raise NotLeftOutError(f"{call.name} returns a {type(leaf).__name__}")
            return {"value": leaf}

        return filled(call.form)

    def busy_elsewhere(self, plan: Plan) -> list[str]:
        """Return the modules of a plan that run elsewhere, too."""
        covered = Counter(call.name for call in self.all if call.name in plan.modules and self._in(call, plan.gone))
        return [name for name in plan.modules if covered[name] != self.times[name]]

    def learns(self, name: str) -> bool:
        """Return whether a module has parameters."""
        return next(self.modules[name].parameters(), None) is not None

    def _in(self, call: ModuleCall, ops: frozenset[int]) -> bool:
        return call.first in ops and call.last - 1 in ops


def plan_of(calls: Calls, addition: Addition, stay: Collection[str] = ()) -> Plan:
    """Plan to leave out the branch of one addition.

    Args:
        calls: Calls of the modules.
        addition: The addition.
        stay: Modules that run elsewhere, too, and so go on to run on zeros here.

    Raises:
        NotLeftOutError: If no modules hold it alone.
    """
    own = frozenset((*addition.region, addition.op))
    key = frozenset([addition.key])
    cut = Cut(addition.op, addition.result, addition.stream, own)
    adding = _adding(calls, addition, own) if addition.inside is None else None
    modules: dict[str, Any] = {}
    gone = set[int]()
    if adding is not None:
        place = calls.place(adding, addition.stream)
        modules[adding.name] = calls.returns(adding, {addition.result: {"same": place}})
        gone.update(range(adding.first, adding.last))
    zeros: set[int] = set()
    for call in calls.inside(addition.region - gone):
        instead = None if call.name in stay else _zeros(calls, call)
        if instead is not None:
            modules[call.name] = calls.returns(call, instead)
            gone.update(range(call.first, call.last))
            zeros.update(instead)
    record = calls.flow.record
    for index in sorted(addition.region - gone):
        if products_of(record, record.ops[index]):
            raise NotLeftOutError(f"{record.ops[index].where()} is computed outside of modules that could go")
    if not any(map(calls.learns, modules)):
        raise NotLeftOutError("no module with parameters serves it alone")
    whole = adding is not None and len(modules) == 1
    return Plan(modules, (cut,), frozenset(gone), key, whole, frozenset(zeros))


def _relation(own: AffineSize, other: AffineSize) -> int | list[int]:
    """Relation of a size to another one, see `Dropped`: a number more, or factor, divisor, and a number more.

    Sizes of other widths are unrelated: 0 more.
    """
    groups = [[group for group, _ in size.shares] for size in (own, other)]
    ratios = {Fraction(mine, its) for (_, mine), (_, its) in zip(own.shares, other.shares, strict=False)} or {
        Fraction(1)
    }
    if groups[0] != groups[1] or len(ratios) > 1:
        return 0
    (ratio,) = ratios
    more = own.fixed - ratio * other.fixed
    if more.denominator > 1:
        return 0
    return int(more) if ratio == 1 else [ratio.numerator, ratio.denominator, int(more)]


def _adding(calls: Calls, addition: Addition, own: frozenset[int]) -> ModuleCall | None:
    """Find the largest call that returns the sum and runs nothing but the branch and its addition."""
    found = None
    for call in calls.around(addition.op, addition.op):
        if not calls.lives_in(call, own):
            break
        if calls.place(call, addition.stream) is not None and Ref(addition.result) in call.outputs:
            found = call
    return found


def _zeros(calls: Calls, call: ModuleCall) -> dict[int, Any] | None:
    """Describe zeros for each result of a call that is read elsewhere; None if no argument has their form."""
    flow = calls.flow
    instead: dict[int, Any] = {}
    given = {leaf.id for leaf in call.inputs if isinstance(leaf, Ref)}
    for value in {leaf.id for leaf in call.outputs if isinstance(leaf, Ref)} - given:
        read = {use for source in flow.sources(value, call.last) for use in flow.uses[source]}
        if read.isdisjoint(range(call.last, flow.end + 1)):
            continue
        zeros = calls.zeros(call, value)
        if zeros is None:
            return None
        instead[value] = zeros
    return instead


def joined(plans: Iterable[Plan]) -> Plan:
    """Join the plans of one branch in several calls of the same modules.

    Raises:
        NotLeftOutError: If its modules would return different things.
    """
    first, *others = plans
    for other in others:
        if other.modules != first.modules or other.whole != first.whole:
            raise NotLeftOutError("its modules are called in different ways")
    every = (first, *others)
    return Plan(
        first.modules,
        tuple(cut for plan in every for cut in plan.cuts),
        frozenset[int]().union(*(plan.gone for plan in every)),
        frozenset[tuple[int, int]]().union(*(plan.additions for plan in every)),
        first.whole,
        frozenset[int]().union(*(plan.zeros for plan in every)),
    )
