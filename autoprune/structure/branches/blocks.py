"""Blocks: modules that hand a stream on with several branches added to it, which may be left out as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoprune.structure.branches.additions import Addition, is_passage
from autoprune.structure.branches.cut import Cut
from autoprune.structure.branches.plan import Calls, Plan
from autoprune.structure.macs import products_of
from autoprune.structure.tracing.record import ModuleCall, Ref


@dataclass(frozen=True)
class Block:
    """Call of a block.

    Attributes:
        plan: The way to leave it out.
        members: Additions on its stream.
        plain: Whether its stream passes nothing but these additions, so that without them all it is left out.
    """

    plan: Plan
    members: frozenset[tuple[int, int]]
    plain: bool


def find_blocks(calls: Calls, additions: Sequence[Addition], known: Iterable[Plan]) -> list[Block]:
    """Find the innermost calls whose output is their input with at least two branches added to it.

    Args:
        calls: Calls of the modules.
        additions: Additions of branches.
        known: Branches that are whole modules already.
    """
    outer = {addition.op: addition for addition in additions if addition.inside is None}
    taken = [(min(plan.gone), max(plan.gone)) for plan in known if plan.whole]
    found = []
    for call in sorted(calls.all, key=lambda call: call.last - call.first):
        if any(call.first <= first and last < call.last for first, last in taken):
            continue
        if sum(call.first <= index < call.last for index in outer) > 1:
            block = _block(calls, call, outer)
            if block is not None:
                found.append(block)
                taken.append((call.first, call.last - 1))
    return found


def _block(calls: Calls, call: ModuleCall, outer: dict[int, Addition]) -> Block | None:
    flow = calls.flow
    value = _output(calls, call)
    if value is None or _repeats(calls, call, outer):
        return None
    values = flow.record.values
    sources = flow.sources(value, call.last)
    given = {leaf.id for leaf in call.inputs if isinstance(leaf, Ref)}
    members = set()
    plain = True
    at = value
    before = call.last
    while at not in given or flow.sources(at, before) != flow.sources(at, call.first):
        step = _step(calls, call, outer, at, before)
        if step is None:
            return None
        at, before, member = step
        if member is None:
            plain = False
        else:
            members.add(member)
    place = calls.place(call, at)
    alike = (values[at].shape, values[at].dtype) == (values[value].shape, values[value].dtype)
    if place is None or not alike or len(members) < 2 or len(sources) != 1:
        return None
    own = frozenset(range(call.first, call.last))
    returns = calls.returns(call, {value: {"same": place}})
    cut = Cut(sources[0], value, at, own)
    return Block(Plan({call.name: returns}, (cut,), own, whole=True), frozenset(members), plain)


def _output(calls: Calls, call: ModuleCall) -> int | None:
    """Return the only value that others read of what a call computes."""
    flow = calls.flow
    made = [leaf.id for leaf in call.outputs if isinstance(leaf, Ref)]
    ends = {source: value for value in made for source in flow.sources(value, call.last) if source >= call.first}
    read = {
        index
        for index in range(call.first, call.last)
        if index in flow.live and any(use >= call.last for use in flow.uses[index])
    }
    found = {ends.get(index) for index in read}
    return found.pop() if len(found) == 1 else None


def _step(
    calls: Calls, call: ModuleCall, outer: dict[int, Addition], value: int, before: int
) -> tuple[int, int, tuple[int, int] | None] | None:
    """Follow the stream of a block one step back: the value there, the operation reading it, and an addition."""
    flow = calls.flow
    sources = flow.sources(value, before)
    if len(sources) != 1 or sources[0] < call.first:
        return None
    op = flow.record.ops[sources[0]]
    addition = outer.get(op.index)
    if addition is not None and addition.result == value:
        return addition.stream, op.index, addition.key
    shape = flow.record.values[value].shape
    for inner in calls.around(op.index, op.index):
        if not call.first <= inner.first <= inner.last <= call.last or inner.name == call.name:
            continue
        ops = flow.record.ops[inner.first : inner.last]
        if (
            any(each.index in outer or products_of(flow.record, each) for each in ops)
            or Ref(value) not in inner.outputs
        ):
            continue
        tensors = [leaf.id for leaf in inner.inputs if isinstance(leaf, Ref)]
        alike = [i for i in tensors if flow.record.values[i].shape == shape]
        if len(alike) == 1:
            return alike[0], inner.first, None
    if op.inputs() and (is_passage(op) or "norm" in op.name or op.name.startswith("relu")):
        return op.inputs()[0], op.index, None
    return None


def _repeats(calls: Calls, call: ModuleCall, outer: dict[int, Addition]) -> bool:
    """Return whether a call is a run of like modules, each with an addition, such as a stage of blocks."""
    kinds: dict[str, set[str]] = {}
    for index in outer:
        if call.first <= index < call.last:
            for inner in calls.around(index, index):
                within = (
                    inner.name.startswith(f"{call.name}.") and call.first <= inner.first and inner.last <= call.last
                )
                if within:
                    kinds.setdefault(re.sub(r"\d+", "*", inner.name), set()).add(inner.name)
    return any(len(names) > 1 for names in kinds.values())
