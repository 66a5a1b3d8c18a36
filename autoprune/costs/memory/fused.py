"""Modules that run as one fused operation as long as the groups that it needs whole are not pruned.

`nn.TransformerEncoderLayer` and `nn.MultiheadAttention` replace their own code by a fused operation in inference, and
take less memory. Pruned heads or embeddings disable it, so a traced pass never takes it: it shows the operations of
pruned layers. Here the dense model runs as in inference, and each call that differs from the trace is run alone.
Nothing is specific to these classes: any module that autoprune prepares for pruning may run differently unpruned.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.costs.memory.scratch import Scratch, Values, fit_scratch
from autoprune.costs.operations.allocations import Allocation, allocation_of
from autoprune.costs.operations.parts import Family, Part, prefixes
from autoprune.protocols import FloatArray, IntArray
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import Slicer
from autoprune.structure.structure import Structure
from autoprune.structure.tracing.record import ModuleCall, Record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fused:
    """Call that runs other operations than traced where some groups are whole.

    Attributes:
        first: Its first operation in the trace.
        last: The operation after its last.
        whole: Groups by number, and their sizes, that must be whole.
        part: Its other groups, as the variables of its memory.
        taken: Bytes at its peak, with its results.
    """

    first: int
    last: int
    whole: tuple[tuple[int, int], ...]
    part: Part
    taken: Scratch

    def runs(self, widths: FloatArray) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return whether it runs fused at widths (n, groups), shape (n,)."""
        groups, sizes = ([pair[side] for pair in self.whole] for side in (0, 1))
        whole: np.ndarray[Any, np.dtype[np.bool_]] = (widths[:, groups] == sizes).all(axis=1)
        return whole


def find_fused(example: Example, structure: Structure, record: Record) -> list[Fused]:
    """Find the calls of a dense model that run other operations in inference than were traced.

    Args:
        example: The dense model with its inputs; comes back unchanged.
        structure: What can be removed from it.
        record: The traced pass.
    """
    slicer = Slicer(example.model)
    seen = _calls_of(example.of(slicer.cut(structure.edit(prefixes(structure, structure.sizes))).eval()))
    traced = dict(zip(_numbered(record.calls), record.calls, strict=True))
    found: list[tuple[_Seen, ModuleCall]] = []
    for key, own in zip(_numbered(seen), seen, strict=True):  # inner modules return first
        call = traced.get(key)
        inside = call is not None and any(call.first <= other.first < call.last for _, other in found)
        if call is None or not call.name or inside:
            continue
        if _kinds(own.ran) != _kinds([str(op.func) for op in record.ops[call.first : call.last]]):
            found.append((own, call))
    return [fused for own, call in found if (fused := _Alone(slicer, structure, own).fused(call)) is not None]


@dataclass
class _Seen:
    """A call of a module: its inputs, and names of the operations that it ran."""

    name: str
    args: Any
    kwargs: Any
    ran: tuple[str, ...]


class _Names(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, without types
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _kinds(names: Sequence[str]) -> list[str]:
    """Names of operations, with additions in place named like others: watched passes have none in place."""
    return [name.replace("aten.add_.", "aten.add.") for name in names]


def _numbered(calls: Sequence[ModuleCall] | Sequence[_Seen]) -> list[tuple[str, int]]:
    """Names of modules, and how often each was called before."""
    count: Counter[str] = Counter()
    keys = []
    for call in calls:
        keys.append((call.name, count[call.name]))
        count[call.name] += 1
    return keys


def _calls_of(example: Example) -> list[_Seen]:
    """Operations of each module in inference, in the order in which they return; the model is a private copy.

    Methods are wrapped, because hooks would disable the fused operation of a module.
    """
    mode = _Names()
    seen = list[_Seen]()

    def watch(name: str, module: nn.Module) -> None:
        forward = module.forward

        @wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            start = len(mode.names)
            output = forward(*args, **kwargs)
            seen.append(_Seen(name, args, kwargs, tuple(mode.names[start:])))
            return output

        module.forward = watched

    watching = list(example.model.named_modules())
    for name, module in watching:
        watch(name, module)
    try:
        with torch.no_grad(), mode:  # under inference_mode operations are seen before they are taken apart
            example()
    finally:
        for _, module in watching:
            del module.forward
    return seen


class _Alone:
    """Runs the module of a call that was seen, at other widths."""

    def __init__(self, slicer: Slicer, structure: Structure, seen: _Seen) -> None:
        self.slicer = slicer
        self.structure = structure
        self.seen = seen

    def fused(self, call: ModuleCall) -> Fused | None:
        """Memory of the fused call that was traced as `call`; None if it cannot be run alone or takes nothing."""
        structure = self.structure
        touching = [g for g, group in enumerate(structure.groups) if self._touches(g)]
        whole = [g for g in touching if not self._runs_with_less_of(g)]
        free = [g for g in touching if g not in whole]
        least = [structure.groups[g].multiple for g in free]
        highest = tuple(int(structure.sizes[g]) for g in free)
        key = f"{self.seen.name} as one, call of operation {call.first}"
        family = Family(key, "elementwise", (highest,), tuple(least), tuple(least))
        try:
            taken = fit_scratch(family, partial(self._taken, free))
        except Exception as error:  # a module may depend on the one around it
            log.warning("counted as traced, because it cannot be run alone (%s): %s", error, self.seen.name)
            return None
        if taken is None:
            return None
        part = Part(key, tuple((0, ((g, 1),)) for g in free), 1)
        pairs = tuple((g, int(structure.sizes[g])) for g in whole)
        return Fused(call.first, call.last, pairs, part, taken)

    def _touches(self, group: int) -> bool:
        edit = self.structure.edit(prefixes(self.structure, self._less({group: None})))
        return any(name.startswith(f"{self.seen.name}.") for name in edit.slices)

    def _runs_with_less_of(self, group: int) -> bool:
        """Return whether it runs the same operations with fewer units of a group, on the inputs of the dense model."""
        module = self._cut(self._less({group: None}))
        mode = _Names()
        try:
            with torch.no_grad(), mode:
                module(*self.seen.args, **self.seen.kwargs)
        except Exception as error:  # its input changes with the group, which so counts as needed whole
            log.debug("%s wants other inputs with less of group %d: %s", self.seen.name, group, error)
            return False
        return tuple(mode.names) == self.seen.ran

    def _taken(self, groups: Sequence[int], values: Values) -> Allocation:
        module = self._cut(self._less(dict(zip(groups, values, strict=True))))
        device = next(module.parameters()).device
        found = allocation_of(lambda: module(*self.seen.args, **self.seen.kwargs), device)
        return Allocation(found.pattern, found.tops, 0)

    def _less(self, widths: Mapping[int, int | None]) -> IntArray:
        """Dense widths but for some groups: those given, or one step less."""
        less = self.structure.sizes.copy()
        for group, width in widths.items():
            less[group] = less[group] - self.structure.groups[group].multiple if width is None else width
        return less

    def _cut(self, widths: IntArray) -> nn.Module:
        cut = self.slicer.cut(self.structure.edit(prefixes(self.structure, widths))).eval()
        return cut.get_submodule(self.seen.name)
