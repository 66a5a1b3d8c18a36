"""Branches of a structure: what they hold, how they lie inside each other, and which of them are present."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from autoprune.protocols import FloatArray, IntArray


@dataclass(frozen=True)
class Branch:
    """Part of a model that is added to a stream and may be dropped: attention, a feed-forward part, or a whole block.

    Attributes:
        name: The smallest module that says what it is, for example ``"model.layers.3.self_attn"``.
        groups: Groups all of whose units lie inside it.
        parameters: Parameters that vanish with it.
        buffers: Buffers that vanish with it.
        parent: Name of the smallest other branch around it; None if there is none.
        members: Branches that make it up: it is dropped when all of them are. Empty where more would stay of it then.
        whole: Whether a module that hands its input on takes its place; else zeros are added.
        modules: Modules that vanish, each with what stands for its return value, JSON-ready.
        follows: Of a whole module, the branch whose result it is given; empty if there is none.
        fed_by: Of a whole module, the linear layer whose output is the last to be added to what it is given, so that a
            linear map in its place can be merged into that layer; empty if there is none.
    """

    name: str
    groups: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = field(default=(), repr=False)
    parent: str | None = None
    members: tuple[str, ...] = ()
    whole: bool = False
    modules: Mapping[str, Any] = field(default_factory=dict, repr=False)
    follows: str = ""
    fed_by: str = ""

    def holds(self, module: str) -> bool:
        """Return whether a module lies inside it."""
        return any(inside(module, own) for own in self.modules)


def inside(module: str, other: str) -> bool:
    """Return whether a module is another one or lies inside it, by their names."""
    return module == other or module.startswith(f"{other}.")


@dataclass(frozen=True)
class Presence:
    """Presence of branches, and of the groups inside them.

    Attributes:
        branches: In the order of a structure.
        groups: Names of all groups of the structure, in order.
    """

    branches: tuple[Branch, ...]
    groups: tuple[str, ...]

    @cached_property
    def positions(self) -> dict[str, int]:
        """Position of each branch by its name."""
        return {branch.name: i for i, branch in enumerate(self.branches)}

    @cached_property
    def _outermost_first(self) -> list[int]:
        depth = [len(self.around(branch.name)) for branch in self.branches]
        return sorted(range(len(depth)), key=depth.__getitem__)

    @cached_property
    def _around_group(self) -> tuple[list[int], list[int]]:
        """Positions of the groups inside branches, and the smallest branch around each."""
        at = {name: i for i, name in enumerate(self.groups)}
        around = {at[name]: b for b in self._outermost_first for name in self.branches[b].groups}
        return list(around), list(around.values())

    @cached_property
    def _joined(self) -> list[tuple[IntArray, IntArray]]:
        """Branches that members make up, (k,), and those members, (k, m); of one depth and number, the inner first."""
        alike: dict[tuple[int, int], list[int]] = {}
        for b, branch in enumerate(self.branches):
            if branch.members:
                alike.setdefault((-len(self.around(branch.name)), len(branch.members)), []).append(b)
        return [
            (np.array(found), np.array([[self.positions[name] for name in self.branches[b].members] for b in found]))
            for _, found in sorted(alike.items())
        ]

    @cached_property
    def _nested(self) -> list[tuple[IntArray, IntArray]]:
        """Branches inside others, (k,), and the smallest around each, (k,); of one depth, the outer first."""
        alike: dict[int, list[tuple[int, int]]] = {}
        for b, branch in enumerate(self.branches):
            if branch.parent is not None:
                depth = len(self.around(branch.name))
                alike.setdefault(depth, []).append((b, self.positions[branch.parent]))
        return [
            (np.array([b for b, _ in found]), np.array([p for _, p in found])) for _, found in sorted(alike.items())
        ]

    @property
    def rules(self) -> list[tuple[str, int, list[int]]]:
        """Steps of `effective` in order, each a kind, the column it changes, and the columns that it reads.

        ``"any"`` keeps a branch no longer than one of its members; ``"all"`` sets what lies in a dropped branch to 0.
        """
        first = len(self.groups)
        steps: list[tuple[str, int, list[int]]] = []
        for wholes, members in self._joined:
            steps += [
                ("any", first + whole, [first + member for member in own])
                for whole, own in zip(wholes.tolist(), members.tolist(), strict=True)
            ]
        for inner, parents in self._nested:
            steps += [("all", first + a, [first + b]) for a, b in zip(inner.tolist(), parents.tolist(), strict=True)]
        return [*steps, *(("all", a, [first + b]) for a, b in zip(*self._around_group, strict=True))]

    def around(self, name: str) -> list[str]:
        """Names of the branches around one, the smallest first."""
        found = []
        parent = self.branches[self.positions[name]].parent
        while parent is not None:
            found.append(parent)
            parent = self.branches[self.positions[parent]].parent
        return found

    def branch_of(self, module: str) -> int:
        """Position of the smallest branch that holds a module; -1 if there is none."""
        holding = [b for b in reversed(self._outermost_first) if self.branches[b].holds(module)]
        return holding[0] if holding else -1

    def closed(self, dropped: Iterable[str]) -> set[str]:
        """Add the branches that vanish with some: those all of whose members do, and those inside others.

        Raises:
            ValueError: If a name is unknown.
        """
        present = np.ones((1, len(self.groups) + len(self.branches)))
        for name in dropped:
            if name not in self.positions:
                raise ValueError(
                    f"pruning.dropped must name branches of the model, got {name!r}; see structure.branches"
                )
            present[0, len(self.groups) + self.positions[name]] = 0
        left = self.effective(present)[0, len(self.groups) :]
        return {branch.name for branch, there in zip(self.branches, left, strict=True) if not there}

    def outermost(self, dropped: Iterable[str]) -> list[Branch]:
        """Return the branches that vanish and lie in no other one that does, in order."""
        gone = self.closed(dropped)
        return [b for b in self.branches if b.name in gone and gone.isdisjoint(self.around(b.name))]

    def effective(self, widths: FloatArray) -> FloatArray:
        """Return widths (n, groups + branches) with all zero that lies in a dropped branch.

        Args:
            widths: Units kept in each group, then 1 for each branch that is kept and 0 for others. Columns of branches
                may be left out where all are kept.
        """
        groups = len(self.groups)
        if not len(widths):  # a space of the user's may give an array without columns for no candidates
            return np.zeros((0, groups + len(self.branches)))
        if widths.shape[1] == groups:
            return np.hstack([widths, np.ones((len(widths), len(self.branches)))])
        present = widths[:, groups:]
        if present.all():
            return widths
        present = present.copy()
        for whole, members in self._joined:
            present[:, whole] = np.minimum(present[:, whole], present[:, members].max(axis=2))
        for own, parents in self._nested:
            present[:, own] *= present[:, parents]
        out = np.hstack([widths[:, :groups], present])
        inner, around = self._around_group
        out[:, inner] *= present[:, around]
        return out


def relatives(branches: Sequence[Branch]) -> list[int | None]:
    """Find the smallest other branch around each, by the modules that vanish; None where there is none."""
    found: list[int | None] = []
    for i, own in enumerate(branches):
        around = [
            j
            for j, other in enumerate(branches)
            if j != i and all(map(other.holds, own.modules)) and not all(map(own.holds, other.modules))
        ]
        found.append(min(around, key=lambda j: len(branches[j].parameters)) if around else None)
    return found
