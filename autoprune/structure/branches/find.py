"""The branches of a traced model, each with the way to leave it out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import nn

from autoprune.structure.branches.additions import Addition, find_additions
from autoprune.structure.branches.blocks import Block, find_blocks
from autoprune.structure.branches.branch import Branch, inside, relatives
from autoprune.structure.branches.dataflow import Dataflow
from autoprune.structure.branches.handover import find_handovers
from autoprune.structure.branches.plan import Calls, NotLeftOutError, Plan, joined, plan_of
from autoprune.structure.labels import Propagation
from autoprune.structure.owners import owners
from autoprune.structure.units import AffineSize, Group, Units

MAIN = 0.6
"""Share of a branch's parameters from which on the module that holds them gives it its name."""


Members = dict[tuple[str, ...], frozenset[tuple[int, int]]]
"""Additions that make up a branch, by the modules that vanish with it."""


@dataclass(frozen=True)
class Found:
    """Branches of a model.

    Attributes:
        branches: In forward order, with their groups still to come.
        plans: The way to leave out each, by name.
        refused: Reason why a branch is not offered, by the module that adds it.
    """

    branches: tuple[Branch, ...]
    plans: dict[str, Plan]
    refused: dict[str, str]


def find_branches(labels: Propagation, units: Units, model: nn.Module) -> Found:
    """Find the residual branches of a traced model.

    Args:
        labels: Labels of its record.
        units: Their units.
        model: The model, for its parameters.
    """
    record = labels.record
    flow = Dataflow(record)

    def sizes(value: int, dim: int) -> AffineSize:
        return units.affine(labels.of(value)[dim], record.values[value].shape[dim])

    calls = Calls(flow, model, sizes)
    additions = find_additions(flow)
    stay: set[str] = set()
    while True:
        refused: dict[str, str] = {}
        planned = _planned(calls, additions, stay, refused)
        blocks = find_blocks(calls, additions, planned)
        plans = _of_modules([*planned, *(block.plan for block in blocks)], refused)
        busy = {name for plan in plans for name in calls.busy_elsewhere(plan)}
        more = {name for name in busy if not calls.learns(name)} - stay
        if not more:
            break
        stay |= more  # such as an activation that runs after the addition, too
    alone = []
    for plan in plans:
        if others := calls.busy_elsewhere(plan):
            refused.setdefault(_common(tuple(plan.modules)), f"{others[0]} runs elsewhere, too")
        else:
            alone.append(plan)
    found = _arranged(calls, alone, _sums(additions, alone) | _members(blocks), refused)
    handovers = find_handovers(calls, additions, found.plans)
    linked = (
        replace(branch, follows=handovers[branch.name][0], fed_by=handovers[branch.name][1])
        if branch.name in handovers
        else branch
        for branch in found.branches
    )
    return replace(found, branches=tuple(linked))


def _planned(calls: Calls, additions: Sequence[Addition], stay: set[str], refused: dict[str, str]) -> list[Plan]:
    planned = []
    for addition in additions:
        try:
            planned.append(plan_of(calls, addition, stay))
        except NotLeftOutError as error:
            if addition.inside is None and _learns(calls.flow, addition):
                refused.setdefault(calls.flow.record.ops[addition.op].module, str(error))
    return planned


def _learns(flow: Dataflow, addition: Addition) -> bool:
    """Return whether a branch reads parameters; that of an activation, ``x + x**3``, does not."""
    values = flow.record.values
    read = (value for index in addition.region for value in flow.record.ops[index].inputs())
    return any(values[value].kind == "parameter" for value in read)


def _of_modules(plans: Iterable[Plan], refused: dict[str, str]) -> list[Plan]:
    """Join the plans for the same modules."""
    by_modules: dict[tuple[str, ...], list[Plan]] = defaultdict(list)
    for plan in plans:
        by_modules[tuple(plan.modules)].append(plan)
    found = []
    for names, same in by_modules.items():
        try:
            found.append(joined(same))
        except NotLeftOutError as error:
            refused.setdefault(_common(names), str(error))
    return found


def _arranged(calls: Calls, plans: Sequence[Plan], made_of: Members, refused: dict[str, str]) -> Found:
    order = sorted(plans, key=lambda plan: (min(plan.gone), -len(plan.gone)))
    vanishing = [_vanishing(calls, plan) for plan in order]
    sizes = {name: parameter.numel() for name, parameter in calls.model.named_parameters()}
    names = _names(order, [{name: sizes[name] for name in own if name in sizes} for own in vanishing])
    branches = []
    for name, plan, lost in zip(names, order, vanishing, strict=True):
        parameters = tuple(tensor for tensor in lost if tensor in sizes)
        buffers = tuple(tensor for tensor in lost if tensor not in sizes)
        branches.append(Branch(name, (), parameters, buffers, whole=plan.whole, modules=plan.modules))
    of_addition = {key: name for name, plan in zip(names, order, strict=True) for key in plan.additions}
    arranged = []
    for branch, around in zip(branches, relatives(branches), strict=True):
        own = {of_addition.get(key) for key in made_of.get(tuple(branch.modules), ())}
        members = () if None in own else tuple(name for name in names if name in own)
        arranged.append(replace(branch, parent=None if around is None else names[around], members=members))
    return Found(tuple(arranged), dict(zip(names, order, strict=True)), refused)


def _members(blocks: Iterable[Block]) -> Members:
    """Return the additions that make up each block, of those that are nothing else."""
    return {tuple(block.plan.modules): block.members for block in blocks if block.plain}


def _sums(additions: Iterable[Addition], plans: Iterable[Plan]) -> Members:
    """Return the terms that make up each branch that is a sum."""
    terms: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    for addition in additions:
        if addition.inside is not None:
            terms[addition.inside].add(addition.key)
    found = {}
    for plan in plans:
        if all(key in terms for key in plan.additions) and plan.additions:
            found[tuple(plan.modules)] = frozenset(term for key in plan.additions for term in terms[key])
    return found


def _vanishing(calls: Calls, plan: Plan) -> list[str]:
    """Return the parameters and buffers all of whose holders vanish."""
    stays: dict[str, bool] = {}
    for owner in owners(calls.model):
        lost = any(inside(owner.module, own) for own in plan.modules)
        stays[owner.name] = stays.get(owner.name, False) or not lost
    return [name for name, any_left in stays.items() if not any_left]


def _names(plans: Sequence[Plan], sizes: Sequence[dict[str, int]]) -> list[str]:
    """Name branches after the module that goes, holds most of it, or lies around all that go; no two alike."""
    single = {i: next(iter(plan.modules)) for i, plan in enumerate(plans) if len(plan.modules) == 1}
    taken = set(single.values())
    names = []
    for i, (plan, own) in enumerate(zip(plans, sizes, strict=True)):
        shares = {m: sum(n for name, n in own.items() if inside(name.rpartition(".")[0], m)) for m in plan.modules}
        largest = max(shares, key=shares.__getitem__)
        common = _common(tuple(plan.modules))
        wanted = [largest] if shares[largest] >= MAIN * sum(shares.values()) else [common, largest]
        free = (name for name in (*wanted, *plan.modules) if name and name not in taken)
        names.append(single[i] if i in single else next(free, f"{largest}~{i}"))
        taken.add(names[-1])
    return names


def _common(modules: Sequence[str]) -> str:
    """Name of the smallest module around some others."""
    parts = [name.split(".") for name in modules]
    return ".".join(same[0] for same in takewhile(lambda at: len(set(at)) == 1, zip(*parts, strict=False)))


def with_groups(branches: Sequence[Branch], groups: Sequence[Group]) -> tuple[Branch, ...]:
    """Add to each branch the groups that lie inside it."""
    holders = {group.name: {slot.tensor.rpartition(".")[0] for slot in group.slots} for group in groups}
    return tuple(
        replace(branch, groups=tuple(name for name, own in holders.items() if all(map(branch.holds, own))))
        for branch in branches
    )
