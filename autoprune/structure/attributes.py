"""Find the sizes that modules keep in Python, by following a smaller module operation by operation.

A module whose forward says ``view(b, t, self.num_heads, self.head_dim)`` breaks once heads are gone. The record says
which operation should have given which shape; at the first one that does not, an integer attribute nearby whose dense
value is one of the sizes that changed is the suspect. The suspect that gets the forward furthest is kept, until it
ends or nothing helps; then the groups in the way are given back, to be frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoprune.structure.adapters import adapter_of
from autoprune.structure.propagate import Propagation
from autoprune.structure.record import Op
from autoprune.structure.replay import Replay
from autoprune.structure.structure import Attribute
from autoprune.structure.units import AffineSize, Group, Units

MOST_SUSPECTS = 40
"""Suspects tried at one operation."""

MOST_MEANINGS = 3
"""Sizes, the nearest first, that an attribute is taken for."""

REARRANGING = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "clone", "contiguous", "alias", "detach"),
        *("copy_", "transpose", "t", "permute", "unsqueeze", "squeeze", "empty", "empty_strided", "as_strided"),
        *("_to_copy", "copy"),
    )
)
"""Operations that a smaller module may run more or fewer of."""

Cut = Callable[[tuple[Attribute, ...]], nn.Module]
Run = Callable[[nn.Module, AbstractContextManager[Any]], None]


@dataclass(frozen=True)
class Found:
    """What following a smaller module found.

    Attributes:
        attributes: Sizes to rewrite.
        reached: Operation up to which the forward ran as recorded; their number if it ran to its end.
        stuck: Groups that must be frozen for the forward to get further, each with the reason.
    """

    attributes: tuple[Attribute, ...]
    reached: int
    stuck: Mapping[str, str]


class _DivergedError(Exception):
    pass


class _Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, without types
    """Counts the operations that run as recorded, with the shapes that the replay expects.

    Views and copies are passed over: whether a reshape needs a copy depends on the sizes. So are operations whose sizes
    do not change and that do not run, because modules may cache their results.
    """

    def __init__(self, replay: Replay) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.replay = replay
        self.steps = [op for op in replay.record.ops if op.name not in REARRANGING]
        shrinks = [any(replay.shrinks(value) for value in (*op.inputs(), *op.results())) for op in self.steps]
        self.waited = [i for i, smaller in enumerate(shrinks) if smaller]
        self.done = 0
        self.since = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.since += 1
        if func.overloadpacket.__name__ in REARRANGING:
            return out
        shapes = [tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        waited = next((i for i in self.waited if i >= self.done), len(self.steps) - 1)
        for i in range(self.done, waited + 1):
            if self.steps[i].func == func and self._expected(self.steps[i], shapes):
                self.done, self.since = i + 1, 0
                return out
        if self.waited and waited < len(self.steps) and self.steps[waited].func == func:
            raise _DivergedError
        return out

    def _expected(self, op: Op, shapes: list[tuple[int, ...]]) -> bool:
        # What nothing reads may differ between devices, as the statistics that batch norm saves do.
        read = self.replay.flow.read
        pairs = zip(op.results(), shapes, strict=True)
        return all(value not in read or self.replay.shape(value) == shape for value, shape in pairs)

    def reached(self) -> int:
        """The first recorded operation after the last one that ran as it should; past the last where all did."""
        if not self.waited or self.done > self.waited[-1]:
            return len(self.replay.record.ops)
        return self.steps[self.done - 1].index + 1 if self.done else 0


def find_attributes(flow: Propagation, units: Units, replay: Replay, cut: Cut, run: Run) -> Found:
    """Follow a smaller module to its end, rewriting sizes on the way.

    Args:
        flow: The labels.
        units: The units of the labels.
        replay: What should come out, for the units that the module lost.
        cut: Makes the smaller module with the given attributes rewritten.
        run: Its forward under a dispatch mode, on the meta device where possible.
    """
    end = len(flow.record.ops)
    kept: tuple[Attribute, ...] = ()
    hints: set[tuple[type[nn.Module], str]] = set()

    def reach(attributes: tuple[Attribute, ...]) -> tuple[int, int]:
        """Operation reached, and how many ran after it, which tells more when a view is what fails."""
        follow = _Follow(replay)
        try:
            run(cut(attributes), follow)
        except Exception:  # whatever the user's forward raises at a wrong size says: not further than here
            return min(follow.reached(), end - 1), follow.since
        return follow.reached(), 0

    done = reach(kept)
    while done[0] < end:
        modules = dict(cut(kept).named_modules())
        best, best_done = None, done
        for suspect in _suspects(flow, units, done[0], modules, kept, hints):
            further = reach((*kept, suspect))
            if further > best_done:
                best, best_done = suspect, further
                if (type(modules[suspect.module]), suspect.path) in hints:
                    break
        if best is None:
            return Found(kept, done[0], _culprits(flow, units, done[0]))
        hints.add((type(modules[best.module]), best.path))
        kept, done = (*kept, best), best_done
    return Found(kept, done[0], {})


def _suspects(
    flow: Propagation,
    units: Units,
    at: int,
    modules: Mapping[str, nn.Module],
    kept: tuple[Attribute, ...],
    hints: set[tuple[type[nn.Module], str]],
) -> list[Attribute]:
    """Integer attributes whose dense value is a size that shrinks: near the operation first, hints before others."""
    taken = {(attribute.module, attribute.path) for attribute in kept}
    suspects = []
    shrinking = _shrinking(flow, units, _nearest(flow.record.ops, at))
    sizes = [Attribute.of(units, size) for size in shrinking]
    for distance, name in enumerate(_around(flow.record.ops[at].module, modules)):
        for path, value in _integers(modules[name]):
            hinted = (type(modules[name]), path) in hints
            matching = [size for size in sizes if size.value({}) == value and (name, path) not in taken]
            for i, size in enumerate(matching[:MOST_MEANINGS]):
                suspects.append((not hinted, distance, i, replace(size, module=name, path=path)))
    return [suspect for *_, suspect in sorted(suspects, key=lambda s: s[:3])][:MOST_SUSPECTS]


def _around(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The module at a path and its children, then those around it, up to the model."""
    parts = path.split(".") if path else []
    line = [name for i in range(len(parts), -1, -1) if (name := ".".join(parts[:i])) in modules]
    found: dict[str, None] = {}
    for i, name in enumerate(line):
        found[name] = None
        if i < 2:
            found |= {f"{name}.{child}" if name else child: None for child, _ in modules[name].named_children()}
    return [name for name in found if adapter_of(modules[name]) is None]  # an adapter knows its sizes


def _integers(module: nn.Module) -> Iterable[tuple[str, int]]:
    """Sizes among the attributes of a module, and of plain objects that it refers to."""
    for name, value in vars(module).items():
        if type(value) is int and value > 1:
            yield name, value
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type) and not callable(value):
            yield from ((f"{name}.{k}", v) for k, v in vars(value).items() if type(v) is int and v > 1)


def _shrinking(flow: Propagation, units: Units, ops: Iterable[Op]) -> list[AffineSize]:
    """Sizes in the operations that shrink, in the order met."""
    found: dict[AffineSize, None] = {}
    for op in ops:
        for value in (*op.results(), *op.inputs()):
            for labels, size in zip(flow.of(value), flow.record.values[value].shape, strict=True):
                if labels is not None and (affine := units.affine(labels, size)).shares:
                    found.setdefault(affine)
    return list(found)


def _nearest(ops: Iterable[Op], at: int) -> list[Op]:
    return sorted(ops, key=lambda op: abs(op.index - at))


def _groups_in(units: Units, sizes: Iterable[AffineSize]) -> list[Group]:
    return [units.groups[i] for i in dict.fromkeys(group for size in sizes for group, _ in size.shares)]


def _culprits(flow: Propagation, units: Units, at: int) -> dict[str, str]:
    """Groups in the sizes of the operation that went wrong; those of a later one if it has none."""
    for op in flow.record.ops[at:]:
        if groups := _groups_in(units, _shrinking(flow, units, [op])):
            reason = f"{op.where()} has a size in Python that follows no attribute"
            return dict.fromkeys((group.name for group in groups), reason)
    return {}


def groups_near(flow: Propagation, units: Units, at: int, distance: int = 12) -> list[Group]:
    """Groups in the sizes of the operations around one, the nearest first."""
    window = flow.record.ops[max(at - distance, 0) : at + distance]
    return _groups_in(units, _shrinking(flow, units, _nearest(window, at)))
