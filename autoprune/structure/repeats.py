"""Repeated parts of a record: modules of one class, such as the blocks of a deep network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from torch import nn

from autoprune.structure.sizes.held import sizes_held
from autoprune.structure.tracing.record import ModuleCall, Op, Record


@dataclass(frozen=True)
class Place:
    """Place of a size in a record.

    Attributes:
        op: Index of an operation.
        operand: Number of a result, or, after these, of an input.
        dim: Dimension of that tensor.
    """

    op: int
    operand: int
    dim: int


@dataclass(frozen=True)
class Twin:
    """Later module of the same class as a given one.

    Attributes:
        record: Record of the model.
        shift: Distance from an operation of the given module to that of the later one.
        here: Name of the given module.
        there: Name of the later one.
    """

    record: Record
    shift: int
    here: str
    there: str

    def name(self, module: str) -> str | None:
        """Return the twin's counterpart of a module inside the given one; None for one outside."""
        if module == self.here:
            return self.there
        return f"{self.there}{module[len(self.here) :]}" if module.startswith(f"{self.here}.") else None

    def place(self, place: Place) -> Place | None:
        """Return the same place in the twin; None if another operation ran there."""
        at = place.op + self.shift
        ops = self.record.ops
        if not 0 <= at < len(ops) or ops[at].func != ops[place.op].func:
            return None
        same = self._ranks(ops[at]) == self._ranks(ops[place.op])
        return Place(at, place.operand, place.dim) if same else None

    def _ranks(self, op: Op) -> tuple[list[int], list[int]]:
        """Numbers of dimensions of its results and inputs, to compare operations: only a decoder may mask, say."""
        results, inputs = ([len(self.record.values[v].shape) for v in vs] for vs in (op.results(), op.inputs()))
        return results, inputs


class Repeats:
    """Modules of a model by name, and the repeated ones among them.

    Args:
        record: Record of the model.
        model: The model, or a copy of it.
    """

    def __init__(self, record: Record, model: nn.Module) -> None:
        self.record = record
        self.modules: Mapping[str, nn.Module] = dict(model.named_modules())
        self.held = cache(lambda name: sizes_held(self.modules[name]))
        self.names = {id(module): name for name, module in self.modules.items()}
        self._calls: dict[type[nn.Module], dict[str, ModuleCall]] = {}
        for call in record.calls:
            module = self.modules[call.name]
            if not type(module).__module__.startswith("torch.nn"):  # a Linear here is no twin of one elsewhere
                self._calls.setdefault(type(module), {}).setdefault(call.name, call)

    def _call_at(self, at: int) -> ModuleCall | None:
        """Find the first call of the user's innermost module around an operation."""
        around = [c for calls in self._calls.values() for c in calls.values() if c.first <= at < c.last]
        return min(around, key=lambda call: call.last - call.first, default=None)

    def around(self, at: int) -> tuple[int, int]:
        """Return the first operation of the user's innermost module around one, and the one after its last."""
        call = self._call_at(at)
        return (at, at + 1) if call is None else (call.first, call.last)

    def twins(self, at: int) -> list[Twin]:
        """List later modules of the class of the innermost one around an operation."""
        call = self._call_at(at)
        if call is None:
            return []
        alike = self._calls[type(self.modules[call.name])]
        return [
            Twin(self.record, c.first - call.first, call.name, c.name) for c in alike.values() if c.first > call.first
        ]
