"""Depth: one dimension for each residual branch or block, which is kept or dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from autoprune.arguments import is_number, is_whole, one_of, patterns, shown
from autoprune.errors import NothingToPruneError
from autoprune.files.schema import require_form
from autoprune.protocols import Dimension, FloatArray, IntArray, Pruning
from autoprune.search_spaces.counts import candidates_of, counted
from autoprune.search_spaces.options import with_options
from autoprune.structure.branches.branch import Branch, Presence
from autoprune.structure.structure import Structure

KEPT = "kept"
DROPPED = "dropped"

Granularity = Literal["branches", "blocks", "both"]


@dataclass(frozen=True)
class Depth:
    """Settings of a search over the parts of a model that are dropped as a whole; `bind` finds them in one model.

    Attributes:
        granularity: ``"branches"`` decides on each residual branch alone: attention, feed-forward part, convolutions; a
            block goes where all of its branches do. ``"blocks"`` decides on blocks alone. ``"both"`` has dimensions for
            both, as blocks with norms between their branches need.
        ignore: Branches and modules to leave as they are, by name or glob.
        min_kept: Fewest parts that stay: a fraction of them in [0, 1), or a number of them.

    Raises:
        ValueError: If a setting is out of range.

    Reference:
        Blocks: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        arXiv:2403.03853. Branches: He et al., "What Matters in Transformers? Not All Attention is Needed",
        arXiv:2406.15786.
    """

    granularity: str = "branches"
    ignore: Sequence[str] = ()
    min_kept: float | int = 0.25

    criterion = None
    """None: no single unit is removed, so none is ranked."""

    def __post_init__(self) -> None:
        one_of("granularity", self.granularity, get_args(Granularity))
        share = is_number(self.min_kept) and 0 <= self.min_kept < 1
        if not share and not (is_whole(self.min_kept) and self.min_kept >= 1):
            raise ValueError(f"min_kept must be a fraction in [0, 1) or a whole number, got {shown(self.min_kept)}")
        object.__setattr__(self, "ignore", patterns("ignore", self.ignore))

    def why_no_less(self) -> str:
        """Name the settings that keep models from being smaller."""
        named = [f"{name}={shown(value)}" for name in ("min_kept", "ignore") if (value := getattr(self, name))]
        return f"{', '.join((*named, f'granularity={self.granularity!r}'))} of Depth(...)"

    def bind(self, structure: Structure, order: Mapping[str, Sequence[int]] | None = None) -> DepthSpace:
        """Lay the space out for a model.

        Args:
            structure: What can be dropped.
            order: Not used, because no single unit is removed.

        Raises:
            NothingToPruneError: If nothing can be dropped.
            ValueError: If a pattern in `ignore` matches nothing.
        """
        names = {branch.name: {branch.name, *branch.modules} for branch in structure.branches}
        for pattern in self.ignore:
            if names and not any(fnmatchcase(name, pattern) for own in names.values() for name in own):
                raise ValueError(f"ignore has {shown(pattern)}, which matches no branch; there are {', '.join(names)}")
        parents = {branch.parent for branch in structure.branches}
        wanted = []
        for branch in structure.branches:
            level = {"branches": branch.name not in parents, "blocks": branch.parent is None, "both": True}
            ignored = any(fnmatchcase(name, pattern) for name in names[branch.name] for pattern in self.ignore)
            holds_ignored = any(
                fnmatchcase(name, pattern)
                for inner in structure.branches
                if branch.name in structure.presence.around(inner.name)
                for name in names[inner.name]
                for pattern in self.ignore
            )
            if level[self.granularity] and not ignored and not holds_ignored:
                wanted.append(Dimension(branch.name, (KEPT, DROPPED)))
        if not wanted:
            reasons = dict.fromkeys(structure.undropped.values())
            why = "; ".join(list(reasons)[:3]) or "no branch is added to its own input"
            way_out = (
                f"loosen ignore= of {self}" if structure.branches else "search without Depth, or with space='auto'"
            )
            raise NothingToPruneError(f"space has nothing to drop: {why}; {way_out}")
        least = int(self.min_kept if is_whole(self.min_kept) and self.min_kept else self.min_kept * len(wanted))
        if least >= len(wanted):
            raise NothingToPruneError(
                f"space has nothing to drop: all of {len(wanted)} branches must stay; lower min_kept= of {self}"
            )
        return DepthSpace(
            dimensions=tuple(wanted),
            groups=tuple((group.name, group.size) for group in structure.groups),
            branches=tuple(Branch(b.name, b.groups, parent=b.parent, members=b.members) for b in structure.branches),
            least=least,
        )


_BRANCH = {"name": str, "parent": (str, None), "members": [str], "groups": [str]}
_FORM = {
    "groups": [[(str, int)]],
    "branches": [_BRANCH],
    "dimensions": [{"name": str, "options": [str]}],
    "least": int,
}


@dataclass(frozen=True)
class DepthSpace:
    """Branches of one model, each kept, by option 0, or dropped.

    Where fewer than `least` parts would stay, the first of those dropped stay, too: what is early matters most.

    Attributes:
        dimensions: One for each branch with a choice.
        groups: Name and size of every group of the structure, in its order.
        branches: Every branch of the structure, in its order, without its modules.
        least: Fewest of the dimensions that are kept.
    """

    dimensions: tuple[Dimension, ...]
    groups: tuple[tuple[str, int], ...]
    branches: tuple[Branch, ...]
    least: int = 0
    _presence: Presence = field(init=False, repr=False, compare=False)
    _columns: IntArray = field(init=False, repr=False, compare=False)  # the branch of each dimension
    _inner: FloatArray = field(init=False, repr=False, compare=False)  # 1 where a dimension lies around another, (d, d)

    def __post_init__(self) -> None:
        presence = Presence(self.branches, tuple(name for name, _ in self.groups))
        object.__setattr__(self, "_presence", presence)
        object.__setattr__(self, "_columns", np.array([presence.positions[d.name] for d in self.dimensions]))
        around = [set(presence.around(d.name)) for d in self.dimensions]
        inner = np.array([[d.name in other for other in around] for d in self.dimensions], dtype=np.float64)
        object.__setattr__(self, "_inner", inner)

    @property
    def sizes(self) -> IntArray:
        """Number of options of each dimension, shape (d,)."""
        return np.array([len(dimension.options) for dimension in self.dimensions], dtype=np.int64)

    @property
    def choices(self) -> tuple[IntArray, FloatArray]:
        """No group for any dimension: -1, shape (d,), and no units, shape (d, 2)."""
        return np.full(len(self.dimensions), -1), np.zeros((len(self.dimensions), 2))

    def canonical(self, candidates: IntArray) -> IntArray:
        """Keep the fewest parts that must stay, and name a block in the place of all that lies inside it."""
        chosen, there = self._with_least(candidates)
        gone = there[:, len(self.groups) + self._columns] == 0
        covered = gone.astype(np.float64) @ self._inner > 0  # lies inside another dimension that is dropped
        return np.where(gone & ~covered, np.maximum(chosen, 1), 0)

    def _with_least(self, candidates: IntArray) -> tuple[IntArray, FloatArray]:
        """Keep the first of the parts dropped, one after the other, where too few stay; with what is there then."""
        chosen, there = candidates, self._effective(candidates)
        while self.least:
            few = np.flatnonzero((there[:, len(self.groups) + self._columns] > 0).sum(axis=1) < self.least)
            if not few.size:
                break
            chosen = chosen.copy()
            chosen[few, (chosen[few] > 0).argmax(axis=1)] = 0
            there[few] = self._effective(chosen[few])
        return chosen, there

    def _effective(self, candidates: IntArray) -> FloatArray:
        """Presence of every group and branch, shape (n, groups + branches)."""
        groups = len(self.groups)
        there = np.ones((len(candidates), groups + len(self.branches)))
        there[:, groups + self._columns] = candidates == 0
        return self._presence.effective(there)

    def silenced(self, candidates: IntArray) -> NDArray[np.bool_]:
        """Mark the groups that lie inside a dropped part, bool, shape (n, groups)."""
        marked: NDArray[np.bool_] = self._with_least(candidates)[1][:, : len(self.groups)] == 0
        return marked

    def decode(self, candidate: Sequence[int]) -> dict[str, Any]:
        """Return what happens to each branch that has a choice."""
        return {d.name: d.options[int(i)] for d, i in zip(self.dimensions, candidate, strict=True)}

    def pruning(self, candidate: Sequence[int]) -> Pruning:
        """Drop branches, each named once: not what lies inside them."""
        present = self._with_least(np.array([candidate], dtype=np.int64))[1][0, len(self.groups) :]
        gone = {branch.name for branch, there in zip(self.branches, present, strict=True) if not there}
        return Pruning(dropped=tuple(branch.name for branch in self._presence.outermost(gone)))

    def widths(self, candidates: IntArray) -> FloatArray:
        """Every unit of each group, then 1 for each branch that is kept, shape (n, groups + branches)."""
        whole = np.tile(np.array([size for _, size in self.groups], dtype=np.float64), (len(candidates), 1))
        return np.hstack([whole, self._with_least(candidates)[1][:, len(self.groups) :]])

    def zeroed(self, candidates: IntArray) -> FloatArray:
        """Zeros, shape (n,): whole parts are removed, and no single elements."""
        return np.zeros(len(candidates))

    def restricted(self, options: Sequence[Sequence[int]]) -> DepthSpace:
        """Return the space with these options of each dimension alone; a dimension of one stays."""
        dimensions = with_options(self.dimensions, options)
        return DepthSpace(dimensions, self.groups, self.branches, self.least)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {
            "type": "depth",
            "groups": [list(group) for group in self.groups],
            "branches": [
                {"name": b.name, "parent": b.parent, "members": list(b.members), "groups": list(b.groups)}
                for b in self.branches
            ],
            "dimensions": [{"name": d.name, "options": list(d.options)} for d in self.dimensions],
            "least": self.least,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DepthSpace:
        """Restore what `to_json` wrote.

        Raises:
            ValueError: If it is something else; names the first place that differs.
        """
        require_form(data, _FORM, "space")
        names = {branch["name"] for branch in data["branches"]}
        groups = {name for name, _ in data["groups"]}
        for branch in data["branches"]:
            known = names.issuperset({*branch["members"], branch["parent"] or branch["name"]})
            if not known or not groups.issuperset(branch["groups"]) or _in_circle(branch["name"], data["branches"]):
                raise ValueError(
                    f"space.branches[{branch['name']!r}] must lie in branches and hold groups of the space"
                )
        for d in data["dimensions"]:
            if d["name"] not in names or d["options"][:1] != [KEPT] or not {*d["options"]} <= {KEPT, DROPPED}:
                raise ValueError(f"space.dimensions[{d['name']!r}] must keep or drop a branch of the space")
        return cls(
            dimensions=tuple(Dimension(d["name"], tuple(d["options"])) for d in data["dimensions"]),
            groups=tuple((str(name), int(size)) for name, size in data["groups"]),
            branches=tuple(
                Branch(b["name"], tuple(b["groups"]), parent=b["parent"], members=tuple(b["members"]))
                for b in data["branches"]
            ),
            least=data["least"],
        )

    def describe(self) -> str:
        """One line for people."""
        parts = counted(len(self.dimensions), "part")
        return f"{parts}, each kept or dropped, of which {self.least} stay at least, {candidates_of(self.sizes)}"


def _in_circle(name: str, branches: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a branch lies inside itself."""
    parents = {branch["name"]: branch["parent"] for branch in branches}
    at = parents.get(name)
    for _ in parents:
        if at is None:
            return False
        at = parents.get(at)
    return True
