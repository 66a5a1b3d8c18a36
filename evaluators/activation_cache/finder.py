"""Search for the resume points of a recorded forward pass: which calls its other operations can do without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import reduce
from math import prod
from operator import or_
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from autoprune.evaluators.activation_cache.resume_points import Cut, Flow
from autoprune.structure.macs import dense_macs
from autoprune.structure.tracing.record import ModuleCall, Op, Record, Ref

_MOST_CUTS = 256  # calls that are looked at: more of them would hardly share more
_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # operations that read values
_MOST_ROUNDS = 256  # in which a cut finds the modules it must keep


class Finder:
    """Finds the cuts of one record. Values are told apart by the storage that they live in.

    Args:
        record: Of one pass.
        hooked: Modules that run hooks of the user's; they always run.
        holders: Modules that hold parameters or buffers of their own.
        decides: Whether Python code may act on the values that an operation gives.
    """

    def __init__(self, record: Record, hooked: set[str], holders: set[str], decides: bool = False) -> None:
        self._record = record
        self._base = [value.base for value in record.values]
        self._reads = [{self._base[i] for i in op.inputs()} for op in record.ops]
        self._mutates = [self._written_to(op) for op in record.ops]
        self._makes = [{i for i in op.results() if self._base[i] == i} for op in record.ops]
        self._touches = [makes | mutates for makes, mutates in zip(self._makes, self._mutates, strict=True)]
        self._decisive = [decides and bool(_VALUES.intersection(op.func.tags)) for op in record.ops]
        self._macs = [dense_macs(record, op) for op in record.ops]
        self._last = {base: i for i, read in enumerate(self._reads) for base in read}
        self._last |= {self._base[i]: len(record.ops) for i in record.outputs}
        self._written_last = {base: i for i, written in enumerate(self._mutates) for base in written}
        self._macs_before = np.concatenate([[0.0], np.cumsum(self._macs, dtype=np.float64)])
        ran = [call for call in record.calls if call.first < call.last]
        self._ran = [call.name for call in ran]
        self._bounds = np.array([(call.first, call.last - 1) for call in ran], dtype=np.int64).reshape(-1, 2)
        times = Counter(call.name for call in record.calls)
        self._repeated = {name for name, count in times.items() if count > 1}
        # Statistics taken over several calls cannot be told apart, so a call that hides only some of these must run.
        self._run_always = hooked | (self._repeated & holders)
        always = [call for call in ran if call.name in self._run_always]
        outermost_first = sorted(record.calls, key=lambda call: (call.first, -call.last))
        self._calls = [call for call in outermost_first if self._replaceable(call, always)]
        self._made_by = {call.name: self._outputs(call) for call in self._calls}  # none of them is repeated

    def flow(self) -> Flow:
        """Return the flow of the record, with its cuts."""
        record = self._record
        values = self._record.values
        reads: dict[str, int] = {}
        for op in record.ops:
            for i in op.inputs():
                if name := values[i].name or values[self._base[i]].name:
                    reads.setdefault(name, op.index)
        enters: dict[str, int] = {}
        for call in record.calls:
            enters[call.name] = min(call.first, enters.get(call.name, call.first))
        cuts = [cut for call in self._considered() if (cut := self._cut(call)) is not None]
        return Flow(tuple(sorted(cuts, key=lambda cut: cut.end)), reads, enters, sum(self._macs))

    def _considered(self) -> list[ModuleCall]:
        """Calls to cut after; of too many, the outermost, spread evenly over the multiply-accumulates."""
        levels: list[list[ModuleCall]] = []
        ends: list[int] = []  # of the calls around the present one
        for call in self._calls:
            while ends and ends[-1] < call.last:
                ends.pop()
            if len(levels) <= len(ends):
                levels.append([])
            levels[len(ends)].append(call)
            ends.append(call.last)
        chosen: list[ModuleCall] = []
        for level in levels:
            room = _MOST_CUTS - len(chosen)
            if len(level) > room:
                done = self._macs_before[[call.last for call in level]]
                places = np.searchsorted(done, np.linspace(0, done[-1], room + 1)[1:])
                level = [level[i] for i in sorted(set(places.tolist()))] if room > 0 else []
            chosen += level
        return sorted(chosen, key=lambda call: (call.first, -call.last))

    def _written_to(self, op: Op) -> set[int]:
        """Storages of arguments that an operation writes into."""
        targets = [a.name for a in op.func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        leaves = tree_leaves([op.args.get(name) for name in targets])
        return {self._base[leaf.id] for leaf in leaves if isinstance(leaf, Ref)}

    def _outputs(self, call: ModuleCall) -> set[int]:
        return {self._base[leaf.id] for leaf in call.outputs if isinstance(leaf, Ref)}

    def _inside(self, covered: Sequence[ModuleCall]) -> set[str]:
        """Names of modules that run only operations of the covered calls."""
        hidden = np.zeros(len(self._record.ops), dtype=bool)
        for call in covered:
            hidden[call.first : call.last] = True
        inside = hidden[self._bounds].all(axis=1)
        return {self._ran[i] for i in np.flatnonzero(inside)}

    def _replaceable(self, call: ModuleCall, always: Sequence[ModuleCall]) -> bool:
        """Return whether the rest of the pass sees nothing of a call but its outputs."""
        inside = range(call.first, call.last)
        if not call.name or call.name in self._repeated:
            return False
        if any(other.first in inside and other.last - 1 in inside for other in always):
            return False
        if not (inside and _plain(call.inputs) and _plain(call.outputs)):
            return False
        outputs = self._outputs(call)
        made = set[int]().union(*(self._makes[i] for i in inside))
        changed = set[int]().union(*(self._mutates[i] for i in inside)) - made
        leaves = {base for base in made if self._last.get(base, -1) >= call.last}
        older = all(self._record.values[base].kind == "result" for base in changed)
        return bool(outputs) and outputs <= made | changed and leaves | changed <= outputs and older

    def _cut(self, call: ModuleCall) -> Cut | None:
        """Cut after a call: it skips every call before it that it can, and keeps those that the rest needs.

        None where that takes too many rounds, as inside residual blocks, where in the end next to nothing is skipped.
        """
        kept: set[str] = set()
        for _ in range(_MOST_ROUNDS):
            skipped = self._skipped(call, kept)
            if not (needed := self._needed(call, skipped)):
                break
            kept |= needed
        else:
            return None
        values = self._record.values
        outputs = [values[leaf.id] for leaf in call.outputs if isinstance(leaf, Ref)]
        return Cut(
            name=call.name,
            end=call.last,
            skipped=tuple(each.name for each in skipped),
            hidden=frozenset(self._inside((*skipped, call))),
            macs=float(sum(self._macs_before[each.last] - self._macs_before[each.first] for each in (*skipped, call))),
            sample_bytes=sum(prod(value.shape) * value.dtype.itemsize for value in outputs) // self._record.batch,
            overwritten=any(self._written_last.get(base, -1) >= call.last for base in self._made_by[call.name]),
        )

    def _skipped(self, cut: ModuleCall, kept: set[str]) -> list[ModuleCall]:
        """Outermost replaceable calls before that of a cut, without the kept ones."""
        found: list[ModuleCall] = []
        for call in self._calls:
            if call.first >= cut.last:
                break
            if call.last <= cut.first and call.name not in kept and not (found and call.last <= found[-1].last):
                found.append(call)
        return found

    def _needed(self, cut: ModuleCall, skipped: Sequence[ModuleCall]) -> set[str]:
        """Skipped modules whose outputs are needed by an operation that still runs, after the cut or on real values."""
        missing: dict[int, int] = {}  # storages without values, and in bits the skipped modules that this is due to
        own = 1 << len(skipped)
        done = 0
        for k, call in enumerate((*skipped, cut)):
            for i in range(done, call.first) if missing else ():
                reads = self._reads[i]
                if self._decisive[i] and missing:  # what it reads may lie on the device of a placeholder
                    return {each.name for each in skipped if each.last <= i}
                due = lacking = 0
                for base in reads:
                    if (bits := missing.get(base)) is not None:
                        due |= bits
                        lacking += 1
                if 0 < lacking < len(reads):
                    return self._named(due, skipped, cut)
                for base in self._touches[i]:
                    if due:
                        missing[base] = due
                    else:
                        missing.pop(base, None)
            missing.update((base, 1 << k) for base in self._made_by[call.name])
            done = call.last
        missing = {base: due for base, due in missing.items() if not due & own}
        # An operation after the cut runs on real values, and it also reads the storages that it writes to.
        wanted = [due for base, due in missing.items() if self._last.get(base, -1) >= cut.last]
        return self._named(reduce(or_, wanted, 0), skipped, cut)

    def _named(self, due: int, skipped: Sequence[ModuleCall], cut: ModuleCall) -> set[str]:
        """Names of skipped modules, and of that of the cut, from their bits."""
        return {call.name for k, call in enumerate((*skipped, cut)) if due >> k & 1}


def _plain(tree: tuple[Any, ...]) -> bool:
    """Return whether arguments or outputs hold only tensors of the pass and values without state."""
    scalars = (Ref, bool, int, float, str, type(None), torch.dtype, torch.device)
    return all(isinstance(leaf, scalars) for leaf in tree)
