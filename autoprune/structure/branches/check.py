"""Checks of branches: the model without them must compute what its record without their operations does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from autoprune.protocols import Pruning
from autoprune.structure.branches.branch import Branch, Presence
from autoprune.structure.branches.find import Found, find_branches, with_groups
from autoprune.structure.branches.numbers import find_numbers
from autoprune.structure.branches.plan import Plan
from autoprune.structure.checks.checks import Checker
from autoprune.structure.checks.rounding import CheckError
from autoprune.structure.checks.values import Values
from autoprune.structure.labels import Propagation
from autoprune.structure.sizes.sizes import some
from autoprune.structure.structure import Structure
from autoprune.structure.terms import Contents, cost_terms
from autoprune.structure.units import Units

MOST_ALONE = 8
"""Most branches of one kind that are checked one by one, where they fail together."""


Run = tuple[Values, Propagation, Units]
"""Checks of values on one example, with its labels."""


def with_branches(structure: Structure, units: Units, frozen: Mapping[str, str], checker: Checker) -> Structure:
    """Add the residual branches of a model that can be dropped, and costs that depend on them.

    Args:
        structure: The structure without them.
        units: Its units.
        frozen: Groups that failed other checks, with the reasons.
        checker: Runs the model on its example.
    """
    found = find_branches(checker.flow, units, checker.example.model)
    if not found.branches and not found.refused:
        return structure
    whole = replace(
        structure,
        branches=with_groups(found.branches, structure.groups),
        numbered=find_numbers(checker.example.model),
        graphs={},
    )
    runs = checker.values_for(units, frozen)
    names, reasons = _passing(whole, runs, checker.seed, found.plans)
    branches = among(whole.branches, names)
    contents = _contents(checker, branches, structure, found)
    return replace(
        structure,
        branches=branches,
        numbered=whole.numbered if branches else (),
        undropped={**found.refused, **reasons},
        terms=cost_terms(checker.flow, units, contents) if branches else structure.terms,
    )


def among(branches: Sequence[Branch], names: Iterable[str]) -> tuple[Branch, ...]:
    """Select some branches: each then lies in the next one around it that is left."""
    wanted = set(names)
    presence = Presence(tuple(branches), ())
    return tuple(
        replace(
            branch,
            parent=next((name for name in presence.around(branch.name) if name in wanted), None),
            members=branch.members if wanted.issuperset(branch.members) else (),
        )
        for branch in branches
        if branch.name in wanted
    )


def _passing(
    structure: Structure, runs: Sequence[Run], seed: int, plans: dict[str, Plan]
) -> tuple[set[str], dict[str, str]]:
    """Find a large set of branches that pass jointly, and the reasons why others do not."""
    every = [branch.name for branch in structure.branches]

    def error(names: Iterable[str]) -> str | None:
        return _error(replace(structure, branches=among(structure.branches, names)), runs, seed, plans)

    reasons: dict[str, str] = {}
    if error(every) is None:
        return set(every), reasons
    passed: set[str] = set()
    for kind in _kinds(every):
        if (why := error({*passed, *kind})) is None:
            passed |= set(kind)
        elif len(kind) > MOST_ALONE:
            reasons |= dict.fromkeys(kind, why)
        else:
            for name in kind:
                if (why := error({*passed, name})) is None:
                    passed.add(name)
                else:
                    reasons[name] = why
    return passed, reasons


def _kinds(names: Sequence[str]) -> list[list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return list(kinds.values())


def _error(structure: Structure, runs: Sequence[Run], seed: int, plans: dict[str, Plan]) -> str | None:
    """Drop branches in a few ways, with units of groups removed in one, and return the first error, or None."""
    error = None
    for values, flow, units in runs:  # a model may run other operations on a smaller example
        error = None
        for pruning in _draws(structure, np.random.default_rng(seed), values.dear):
            cuts = [cut for branch in structure.presence.outermost(pruning.dropped) for cut in plans[branch.name].cuts]
            try:
                values.without(flow, units, structure, pruning, cuts)
            except CheckError as failed:
                error = str(failed)
                break
            except Exception as raised:  # a user's forward may raise anything without a part of the model
                error = f"without it the forward raised {type(raised).__name__}: {raised}".partition("\n")[0][:160]
                break
        if error is None:
            break
    return error


def _draws(structure: Structure, rng: np.random.Generator, dear: bool) -> list[Pruning]:
    """Draw prunings that drop every branch where those around it stay; one leaves all units of the others."""
    around = {branch.name: structure.presence.around(branch.name) for branch in structure.branches}
    kept = {group.name: some(group, rng) for group in structure.groups}
    parts = (_spread if dear else _halves)(around, rng)
    draws = [Pruning(kept, dropped=tuple(part)) for part in parts if part]
    if not draws:
        return []
    return [*(draws[:-1] if dear and len(draws) > 1 else draws), replace(draws[-1], kept={})]


def _halves(around: Mapping[str, Sequence[str]], rng: np.random.Generator) -> list[list[str]]:
    """Divide the branches of each depth into two halves, the deepest first."""
    parts: list[list[str]] = []
    for depth in sorted({len(each) for each in around.values()}, reverse=True):
        names = [name for name in around if len(around[name]) == depth]
        first = set(rng.permutation(names)[: len(names) // 2].tolist())
        parts += [[name for name in names if name in first], [name for name in names if name not in first]]
    return parts


def _spread(around: Mapping[str, Sequence[str]], rng: np.random.Generator) -> list[list[str]]:
    """Divide branches of all depths into one part more than there are depths, none with one that lies around it."""
    parts: list[list[str]] = [[] for _ in range(len({len(each) for each in around.values()}) + 1)]
    for name in sorted(rng.permutation(list(around)).tolist(), key=lambda name: len(around[name])):
        free = [part for part in parts if not {*around[name]}.intersection(part)]
        min(free, key=len).append(name)
    return parts


def _contents(checker: Checker, branches: Sequence[Branch], structure: Structure, found: Found) -> Contents:
    """Find what of a record lies in which branch."""
    presence = Presence(tuple(branches), tuple(group.name for group in structure.groups))
    at = presence.positions
    parents = [-1 if branch.parent is None else at[branch.parent] for branch in branches]
    ops: dict[int, int] = {}
    values: dict[int, int] = {}
    tensors: dict[str, int] = {}
    for branch in sorted(branches, key=lambda branch: len(presence.around(branch.name))):  # the outermost first
        plan = found.plans[branch.name]
        ops |= dict.fromkeys(plan.gone, at[branch.name])
        values |= dict.fromkeys(plan.zeros, parents[at[branch.name]])
        tensors |= dict.fromkeys((*branch.parameters, *branch.buffers), at[branch.name])
    numbers = {name: i for i, name in enumerate(presence.groups)}
    first = checker.flow.record.first
    cuts = [(cut, at[b.name]) for b in branches if b.whole for cut in found.plans[b.name].cuts if cut.exit < first]
    return Contents(
        groups=[frozenset(numbers[name] for name in branch.groups) for branch in branches],
        parents=parents,
        ops=ops,
        tensors=tensors,
        values=values,
        handed_on=[(cut.result, cut.stream, branch) for cut, branch in cuts],
    )
