"""Streams that blocks are given and hand on, and the layers that feed them: what a linear map in their place needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from autoprune.structure.branches.additions import Addition, is_passage
from autoprune.structure.branches.branch import Branch
from autoprune.structure.branches.plan import Calls, Plan
from autoprune.structure.tracing.record import ModuleCall, Ref


@dataclass(frozen=True)
class Run:
    """Consecutive blocks that are dropped together.

    Attributes:
        blocks: Modules of the blocks, in forward order.
        fed_by: Module whose output is the last to be added to what the first of them is given.
    """

    blocks: tuple[str, ...]
    fed_by: str


def find_handovers(
    calls: Calls, additions: Sequence[Addition], plans: Mapping[str, Plan]
) -> dict[str, tuple[str, str]]:
    """Find, for each branch that is one module called once, the one before it and the layer that feeds it.

    Args:
        calls: Calls of the modules.
        additions: Additions of branches.
        plans: The way to leave out each branch, by name.

    Returns:
        By branch: the branch whose result it is given, and the layer whose output is the last to be added to that;
        empty where there is none.
    """
    whole = {name: plan for name, plan in plans.items() if plan.whole and len(plan.cuts) == 1}
    made_by = {plan.cuts[0].result: name for name, plan in whole.items()}
    streams = {name: plan.cuts[0].stream for name, plan in whole.items()}
    return {name: (made_by.get(s, ""), _last_added(calls, additions, s)) for name, s in streams.items()}


def _last_added(calls: Calls, additions: Sequence[Addition], stream: int) -> str:
    """Name the layer whose output is the last to be added to a stream; empty where that is no layer's."""
    sums = [addition for addition in additions if addition.result == stream and addition.inside is None]
    for whole in sums:
        terms = [addition for addition in additions if addition.inside == whole.key]
        for addition in (whole, *reversed(terms)):
            call = _made_by(calls, addition)
            if call is not None:
                return call.name
    return ""


def _made_by(calls: Calls, addition: Addition) -> ModuleCall | None:
    """Find the linear layer that makes a branch, through operations that only rearrange."""
    value = addition.branch
    before = addition.op
    while True:
        for call in calls.all:
            weight = getattr(calls.modules[call.name], "weight", None)
            # What was dropped before has something else in its place.
            linear = isinstance(weight, Tensor) and weight.ndim == 2 and not calls.modules[call.name]._modules
            if linear and Ref(value) in call.outputs and calls.times[call.name] == 1:
                return call
        sources = calls.flow.sources(value, before)
        op = calls.flow.record.ops[sources[0]] if len(sources) == 1 else None
        if op is None or op.index not in addition.region or not is_passage(op) or not op.inputs():
            return None
        value = op.inputs()[0]
        before = op.index


def runs_of(branches: Sequence[Branch], dropped: Collection[str]) -> list[Run]:
    """Find the runs of consecutive blocks among dropped modules that a layer feeds which stays.

    Args:
        branches: Those of a structure.
        dropped: Modules that an edit leaves out.
    """
    gone = {b.name: next(iter(b.modules)) for b in branches if b.whole and set(b.modules) <= set(dropped)}
    after = {b.follows: b.name for b in branches if b.name in gone and b.follows in gone}
    found = []
    for branch in branches:
        if branch.name in gone and branch.fed_by and branch.follows not in gone:
            blocks = [branch.name]
            while blocks[-1] in after:
                blocks.append(after[blocks[-1]])
            if not any(branch.fed_by == name or branch.fed_by.startswith(f"{name}.") for name in dropped):
                found.append(Run(tuple(gone[name] for name in blocks), branch.fed_by))
    return found
