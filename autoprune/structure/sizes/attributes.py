"""Sizes that modules keep in Python, found by following a smaller module operation by operation.

A module whose forward calls ``view(b, t, self.num_heads, self.head_dim)`` breaks once heads are removed. The record has
the shape that each operation should give; at the first one with another shape, a nearby size in Python whose dense
value is one of the sizes that changed is the suspect. The change that gets the forward furthest is kept, until the
forward ends or no change helps; then the groups that stop it are returned, to be tied or frozen. A size found in one
module is tried at once in all later ones of its class, so that the work grows with the kinds of modules, not with the
depth of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoprune.structure.checks.replay import Replay
from autoprune.structure.labels import Propagation
from autoprune.structure.repeats import Place, Repeats
from autoprune.structure.rules.registry import operation_named, operation_of
from autoprune.structure.slicing.adapters import adapter_of
from autoprune.structure.structure import Attribute
from autoprune.structure.time_limit import look
from autoprune.structure.tracing.reads import Reads
from autoprune.structure.tracing.record import Op
from autoprune.structure.units import AffineSize, Group, Units

MOST_SUSPECTS = 40
"""Most suspects tried at one operation."""

MOST_MEANINGS = 3
"""Most sizes, the nearest first, that an attribute is tried as."""

MOST_PAIRED = 6
"""Most suspects, the nearest first, that are tried in pairs if none alone helps."""

Where = tuple[str, str]
"""A module and a path of attributes from it."""

Known = dict[Where, Place]
"""Meanings of sizes in Python: each is the size at a place of the record."""

Reach = tuple[int, int]
"""Operation reached, and the number that ran after it, which tells more when a view fails."""


@dataclass(frozen=True)
class Found:
    """Result of following a smaller module.

    Attributes:
        attributes: Sizes to rewrite.
        reached: Operation up to which the forward ran as recorded; the number of operations if it ran to its end.
        since: Operations that ran after it.
        stuck: Groups that must be tied or frozen for the forward to get further, each with the reason.
    """

    attributes: tuple[Attribute, ...]
    reached: int
    since: int
    stuck: Mapping[str, str]

    @property
    def reach(self) -> Reach:
        """Progress of the forward: `reached` and `since`."""
        return self.reached, self.since


class _DivergedError(Exception):
    pass


class Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, without types
    """Counts the operations that run as recorded, with the shapes that the replay expects.

    Views and copies are skipped: whether a reshape needs a copy depends on the sizes. So are operations whose sizes do
    not change and that do not run, because modules may cache their results.
    """

    def __init__(self, replay: Replay) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.replay = replay
        self.steps = [op for op in replay.record.ops if not operation_of(op).rearranges]
        self.done = 0
        self.since = 0
        self.last = -1
        self._waited = [len(self.steps) - 1] * (len(self.steps) + 1)  # the next step, from each on, that must run
        for i in range(len(self.steps) - 1, -1, -1):
            step = self.steps[i]
            smaller = any(replay.shrinks(value) for value in (*step.inputs(), *step.results()))
            self._waited[i] = i if smaller else self._waited[i + 1]
            self.last = max(self.last, i) if smaller else self.last

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        look()
        out = func(*args, **(kwargs or {}))
        self.since += 1
        if operation_named(func).rearranges:
            return out
        leaves = [out] if isinstance(out, Tensor) else tree_leaves(out)
        shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        waited = self._waited[self.done]
        for i in range(self.done, waited + 1):
            if self.steps[i].func == func and self._expected(self.steps[i], shapes):
                self.done = i + 1
                self.since = 0
                return out
        if self.done <= self.last and self.steps[waited].func == func:
            raise _DivergedError
        return out

    def _expected(self, op: Op, shapes: list[tuple[int, ...]]) -> bool:
        # Unread results may differ between devices, such as the statistics that batch norm saves.
        read = self.replay.flow.read
        pairs = zip(op.results(), shapes, strict=True)
        return all(value not in read or self.replay.shape(value) == shape for value, shape in pairs)

    def reached(self) -> int:
        """First recorded operation after the last one that ran as expected; past the last if all did."""
        if self.done > self.last:
            return len(self.replay.record.ops)
        return self.steps[self.done - 1].index + 1 if self.done else 0


class Search:
    """Finds the sizes of one smaller module.

    Args:
        repeats: The record, its modules and its repeated parts.
        units: The units of the labels.
        replay: Gives the expected shapes, for the units that were removed.
        cut: Makes the smaller module with the given attributes rewritten.
        run: Its forward under a dispatch mode, on the meta device where possible.
    """

    def __init__(
        self,
        repeats: Repeats,
        units: Units,
        replay: Replay,
        cut: Callable[[tuple[Attribute, ...]], nn.Module],
        run: Callable[[nn.Module, AbstractContextManager[Any]], None],
    ) -> None:
        self.repeats = repeats
        self.flow = replay.flow
        self.units = units
        self.replay = replay
        self.cut = cut
        self.run = run
        self.end = len(self.flow.record.ops)
        self.hints: set[tuple[type[nn.Module], str]] = set()

    def attributes(self, known: Known) -> tuple[Attribute, ...]:
        """Return sizes in Python as functions of the widths; those that do not change are left out."""
        found = []
        for (module, path), place in known.items():
            size = size_at(self.flow, self.units, place)
            if size.shares:
                found.append(Attribute.of(self.units, size, module, path))
        return tuple(found)

    def reach(self, known: Known) -> Reach:
        """Run the forward with these sizes rewritten, and return its progress."""
        look()
        try:
            module = self.cut(self.attributes(known))
        except Exception:  # a user's class may refuse a size, or to be copied
            return 0, 0
        return self._reach(module)

    def _reach(self, module: nn.Module) -> Reach:
        follow = Follow(self.replay)
        try:
            self.run(module, follow)
        except Exception:  # the user's forward may raise anything at a wrong size: it gets no further
            return min(follow.reached(), self.end - 1), follow.since
        return follow.reached(), 0

    def find(self, known: Known) -> Found:
        """Follow the module to its end, and add the sizes found to `known`."""
        done = self.reach(known)
        while done[0] < self.end:
            further = self._further(known, done)
            if further is None:
                return Found(self.attributes(known), *done, culprits(self.flow, self.units, done[0]))
            added, done = further
            known |= added
            self.hints |= {(type(self.repeats.modules[module]), path) for module, path in added}
        return Found(self.attributes(known), *done, {})

    def _further(self, known: Known, done: Reach) -> tuple[Known, Reach] | None:
        """Find the sizes that get the forward furthest, if any do: one alone, or several at once."""
        suspects = self._suspects(done, known)
        _, last = self.repeats.around(done[0])
        for proposals in ([{where: place} for where, place in suspects], self._together(suspects)):
            best: Known | None = None
            best_done = done
            for proposal in proposals:
                added = self._repeated(proposal, done[0])
                further = self.reach({**known, **added})
                if further > best_done:
                    best, best_done = added, further
                    if further[0] >= last or any(self._hinted(where) for where in proposal):
                        break
            if best is not None:
                return best, best_done
        return None

    def _repeated(self, proposal: Known, at: int) -> Known:
        """Add the same sizes in all later modules of the class."""
        found = dict(proposal)
        for twin in self.repeats.twins(at):
            for (module, path), place in proposal.items():
                other, there = twin.name(module), twin.place(place)
                if other is None or there is None or (other, path) in found:
                    continue
                value = self.repeats.held(other).get(path)
                size = size_at(self.flow, self.units, there)
                if size.shares and Attribute.of(self.units, size).value({}) == value:
                    found[other, path] = there
        return found

    def _reads(self, known: Known, done: Reach) -> Reads | None:
        """Attributes that the forward reads until it fails; None if watching changes its progress."""
        module = self.cut(self.attributes(known))
        with Reads(module) as reads:
            again = self._reach(module)
        return reads if again == done else None

    def _hinted(self, where: Where) -> bool:
        return (type(self.repeats.modules[where[0]]), where[1]) in self.hints

    def _suspects(self, done: Reach, known: Known) -> list[tuple[Where, Place]]:
        """Sizes in Python that were read and whose dense value shrinks: nearest first, hints before others."""
        suspects = []
        at = done[0]
        reads = self._reads(known, done)
        sizes = [(Attribute.of(self.units, s).value({}), place) for s, place in self._shrinking(at).items()]
        for distance, name in enumerate(self._modules_around(at)):
            for path, value in self.repeats.held(name).items():
                if (name, path) in known:
                    continue
                matching = [place for size, place in sizes if size == value]
                if matching and reads is not None and not reads.read(name, path):
                    continue
                for i, place in enumerate(matching[:MOST_MEANINGS]):
                    suspects.append((not self._hinted((name, path)), distance, i, ((name, path), place)))
        return [suspect for *_, suspect in sorted(suspects, key=lambda s: s[:3])][:MOST_SUSPECTS]

    def _together(self, suspects: list[tuple[Where, Place]]) -> Iterator[Known]:
        """Combinations of sizes: all of one module, then the nearest in pairs."""
        nearest: Known = {}
        for where, place in suspects:
            nearest.setdefault(where, place)
        for module in dict.fromkeys(module for module, _ in nearest):
            own = {where: place for where, place in nearest.items() if where[0] == module}
            if len(own) > 1:
                yield own
        for (one, first), (other, second) in combinations(suspects[:MOST_PAIRED], 2):
            if one != other:
                yield {one: first, other: second}

    def _modules_around(self, at: int) -> list[str]:
        """Modules around an operation: the innermost and its children, then those around it, up to the model."""
        modules = self.repeats.modules
        path = self.flow.record.ops[at].module
        parts = path.split(".") if path else []
        found: dict[str, None] = {}
        for i, name in enumerate(".".join(parts[:n]) for n in range(len(parts), -1, -1)):
            found[name] = None
            if i < 2:  # a module registered twice goes by its first name
                found |= {self.repeats.names[id(child)]: None for child in modules[name].children()}
        return [name for name in found if adapter_of(modules[name]) is None]  # an adapter knows its sizes

    def _shrinking(self, at: int) -> dict[AffineSize, Place]:
        """Sizes that shrink, each with its nearest place, the nearest first."""
        found: dict[AffineSize, Place] = {}
        for op in sorted(self.flow.record.ops, key=lambda op: abs(op.index - at)):
            for size, place in shrinking(self.flow, self.units, op):
                found.setdefault(size, place)
        return found


def size_at(flow: Propagation, units: Units, place: Place) -> AffineSize:
    """Size at a place as a function of the widths."""
    op = flow.record.ops[place.op]
    value = [*op.results(), *op.inputs()][place.operand]
    return units.affine(flow.of(value)[place.dim], flow.record.values[value].shape[place.dim])


def shrinking(flow: Propagation, units: Units, op: Op) -> Iterable[tuple[AffineSize, Place]]:
    """Sizes in an operation that shrink."""
    for operand, value in enumerate([*op.results(), *op.inputs()]):
        for dim, (labels, size) in enumerate(zip(flow.of(value), flow.record.values[value].shape, strict=True)):
            if labels is not None and (affine := units.affine(labels, size)).shares:
                yield affine, Place(op.index, operand, dim)


def groups_in(flow: Propagation, units: Units, ops: Iterable[Op]) -> dict[str, tuple[Group, Place]]:
    """Groups in the sizes of some operations by name, each with the first place where it occurs."""
    found: dict[str, tuple[Group, Place]] = {}
    for op in ops:
        for size, place in shrinking(flow, units, op):
            for number, _ in size.shares:
                group = units.groups[number]
                found.setdefault(group.name, (group, place))
    return found


def culprits(flow: Propagation, units: Units, at: int) -> dict[str, str]:
    """Groups in the sizes of the operation that failed; those of a later one if it has none."""
    for op in flow.record.ops[at:]:
        if found := groups_in(flow, units, [op]):
            return dict.fromkeys(found, f"{op.where()} has a size in Python that follows no attribute")
    return {}


def groups_near(flow: Propagation, units: Units, at: int, distance: int = 12) -> dict[str, tuple[Group, Place]]:
    """Groups in the sizes of the operations around one, the nearest first."""
    window = flow.record.ops[max(at - distance, 0) : at + distance]
    return groups_in(flow, units, sorted(window, key=lambda op: abs(op.index - at)))
