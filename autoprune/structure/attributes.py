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
from autoprune.structure.replay import Replay
from autoprune.structure.structure import Attribute
from autoprune.structure.terms import SizeRow
from autoprune.structure.units import Units

MOST_SUSPECTS = 40
"""Suspects tried at one operation."""

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
        stuck: Groups that must be frozen for the forward to get further, each with the reason.
    """

    attributes: tuple[Attribute, ...]
    stuck: Mapping[str, str]


class _DivergedError(Exception):
    pass


class _Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, without types
    """Counts the operations that run as recorded, with the shapes that the replay expects.

    Views and copies are passed over: whether a reshape needs a copy depends on the sizes.
    """

    def __init__(self, replay: Replay) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.replay = replay
        self.steps = [op for op in replay.record.ops if op.name not in REARRANGING]
        self.done = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in REARRANGING:
            return out
        if self.done >= len(self.steps) or self.steps[self.done].func != func:
            raise _DivergedError
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for leaf, value in zip(made, self.steps[self.done].results(), strict=True):
            # What nothing reads may differ between devices, as the statistics that batch norm saves do.
            if value in self.replay.flow.read and tuple(leaf.shape) != self.replay.shape(value):
                raise _DivergedError
        self.done += 1
        return out

    def reached(self) -> int:
        """The first recorded operation after the last one that ran as it should."""
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
    kept: tuple[Attribute, ...] = ()
    hints: set[tuple[type[nn.Module], str]] = set()

    def reach(attributes: tuple[Attribute, ...]) -> int:
        follow = _Follow(replay)
        try:
            run(cut(attributes), follow)
        except Exception:  # whatever the user's forward raises at a wrong size says: not further than here
            return follow.reached()
        return len(flow.record.ops)

    done = reach(kept)
    while done < len(flow.record.ops):
        modules = dict(cut(kept).named_modules())
        best, best_done = None, done
        for suspect in _suspects(flow, units, done, modules, kept, hints):
            further = reach((*kept, suspect))
            if further > best_done:
                best, best_done = suspect, further
                if (type(modules[suspect.module]), suspect.path) in hints:
                    break
        if best is None:
            return Found(kept, _culprits(flow, units, done))
        hints.add((type(modules[best.module]), best.path))
        kept, done = (*kept, best), best_done
    return Found(kept, {})


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
    sizes = [Attribute.of(units, row) for row in _rows(flow, units, at)]
    for distance, name in enumerate(_around(flow.record.ops[at].module, modules)):
        for path, value in _integers(modules[name]):
            hinted = (type(modules[name]), path) in hints
            for i, size in enumerate(sizes):
                if size.value({}) == value and (name, path) not in taken:
                    suspects.append((not hinted, distance, i, replace(size, module=name, path=path)))
    return [suspect for *_, suspect in sorted(suspects, key=lambda s: s[:3])][:MOST_SUSPECTS]


def _around(path: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The module at a path, then those around it, then the children of these."""
    parts = path.split(".") if path else []
    line = [".".join(parts[:i]) for i in range(len(parts), -1, -1)]
    known = [name for name in line if name in modules]
    children = [(name, child) for name in known[:2] for child, _ in modules[name].named_children()]
    found = dict.fromkeys([*known, *(f"{name}.{child}" if name else child for name, child in children)])
    return [name for name in found if adapter_of(modules[name]) is None]  # an adapter knows its sizes


def _integers(module: nn.Module) -> Iterable[tuple[str, int]]:
    """Sizes among the attributes of a module, and of plain objects that it refers to."""
    for name, value in vars(module).items():
        if type(value) is int and value > 1:
            yield name, value
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type) and not callable(value):
            yield from ((f"{name}.{k}", v) for k, v in vars(value).items() if type(v) is int and v > 1)


def _rows(flow: Propagation, units: Units, at: int) -> list[SizeRow]:
    """Sizes that shrink, as functions of the widths: those of the nearest operations first."""
    rows: dict[SizeRow, None] = {}
    for op in sorted(flow.record.ops, key=lambda op: abs(op.index - at)):
        for value in (*op.results(), *op.inputs()):
            for labels, size in zip(flow.of(value), flow.record.values[value].shape, strict=True):
                row = units.size_row(labels, size)
                if any(row[1:]):
                    rows.setdefault(row)
    return list(rows)


def _culprits(flow: Propagation, units: Units, at: int) -> dict[str, str]:
    """Groups in the sizes of the operation that went wrong; those of a later one if it has none."""
    for op in flow.record.ops[at:]:
        rows = [
            units.size_row(labels, size)
            for value in (*op.results(), *op.inputs())
            for labels, size in zip(flow.of(value), flow.record.values[value].shape, strict=True)
        ]
        names = [g.name for i, g in enumerate(units.groups, 1) if any(row[i] for row in rows)]
        if names:
            return dict.fromkeys(names, f"{op.where()} has a size in Python that follows no attribute")
    return {}
