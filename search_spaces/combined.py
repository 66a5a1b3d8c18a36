"""Meaning of several spaces together: fewest units, elements left, and options that change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import final

import numpy as np
from numpy.typing import NDArray

from autoprune.protocols import FloatArray, IntArray, Pruning, SearchSpace, Silences
from autoprune.search_spaces.compatible import require_following, require_nested, single_changes
from autoprune.search_spaces.protocol import FollowsWidths

BoolArray = NDArray[np.bool_]


@final
class Combined:
    """Spaces of one model that are applied together.

    Args:
        members: The spaces.
        groups: Names of the groups of the structure, the first columns of widths.

    Raises:
        ValueError: If they cannot be applied together; see `autoprune.search_spaces.product.ProductSpace`.
    """

    def __init__(self, members: Sequence[SearchSpace], groups: Sequence[str]) -> None:
        if not members:
            raise ValueError("members must hold at least one space, got none")
        self._members = tuple(members)
        self._groups = tuple(groups)
        ends = np.cumsum([0, *(len(member.sizes) for member in members)]).tolist()
        self._parts = [slice(start, end) for start, end in pairwise(ends)]
        alone = [single_changes(member) for member in members]
        self._columns = max(member.widths(changes[:1]).shape[1] for member, changes in zip(members, alone, strict=True))
        changed = [self._widths_of(member, changes) for member, changes in zip(members, alone, strict=True)]
        # Dimensions x columns: the widths that a dimension changes when it alone changes.
        self._decides = np.zeros((ends[-1], self._columns), dtype=np.bool_)
        for part, changes, widths in zip(self._parts, alone, changed, strict=True):
            row, dim = np.nonzero(changes)
            np.logical_or.at(self._decides[part], dim, (widths != widths[0])[row])
        by_member = np.stack([self._decides[part].any(axis=0) for part in self._parts])
        require_following(members, alone, by_member)
        require_nested(members, alone, by_member, self._groups)
        shared = by_member.sum(axis=0) > 1
        self._shared_dims = np.flatnonzero((self._decides & shared).any(axis=1))[::-1]
        self._same_widths = self._find_same_widths(shared, np.concatenate([widths[1:] for widths in changed]))

    def _find_same_widths(self, shared: BoolArray, alone: FloatArray) -> list[tuple[IntArray, list[FloatArray]]]:
        """Dimensions that decide on one group alone, the same one, with the width of each of their options.

        Args:
            shared: Columns that several members decide on.
            alone: Widths of single changes of all dimensions, shape (sum of sizes - 1, columns).
        """
        sizes = np.concatenate([member.sizes for member in self._members])
        firsts = np.cumsum(sizes - 1) - (sizes - 1)
        drops = np.concatenate([np.full(len(m.sizes), isinstance(m, Silences)) for m in self._members])
        single = (self._decides.sum(axis=1) == 1) & ~drops
        found = []
        for column in np.flatnonzero(shared):
            dims = np.flatnonzero(single & self._decides[:, column])
            if len(dims) > 1:
                dense = self._widths_of(self._members[0], np.zeros((1, self._parts[0].stop), dtype=np.int64))[0, column]
                tables = [np.append(dense, alone[firsts[j] : firsts[j] + sizes[j] - 1, column]) for j in dims]
                found.append((dims, tables))
        return found

    def _widths_of(self, member: SearchSpace, candidates: IntArray) -> FloatArray:
        """Widths of a member, with 1 for the parts that it knows nothing of, shape (n, columns)."""
        widths = member.widths(candidates)
        return np.pad(widths, ((0, 0), (0, self._columns - widths.shape[1])), constant_values=1.0)

    def silenced(self, candidates: IntArray, members: int | None = None) -> BoolArray:
        """Mark what lies inside a part that one of the first `members` drops, shape (n, columns)."""
        marked = np.zeros((len(candidates), self._columns), dtype=np.bool_)
        for member, part in [*zip(self._members, self._parts, strict=True)][:members]:
            if isinstance(member, Silences):
                own = member.silenced(candidates[:, part])
                marked[:, : own.shape[1]] |= own
        return marked

    def widths(self, candidates: IntArray) -> FloatArray:
        """Fewest units of each group, shape (n, columns); inside dropped parts only the members that drop count."""
        silenced = self.silenced(candidates)
        least = np.full((len(candidates), self._columns), np.inf)
        for member, part in zip(self._members, self._parts, strict=True):
            own = self._widths_of(member, candidates[:, part])
            if isinstance(member, Silences):
                np.minimum(least, own, out=least)
            else:
                np.minimum(least, own, out=least, where=~silenced)
        return least

    def zeroed(self, candidates: IntArray) -> FloatArray:
        """Elements set to zero, shape (n,)."""
        total = np.zeros(len(candidates))
        widths = self.widths(candidates)
        for member, part in zip(self._members, self._parts, strict=True):
            own = candidates[:, part]
            if isinstance(member, FollowsWidths):
                total += member.zeros_among(own, widths).sum(axis=1)
            else:
                total += member.zeroed(own)
        return total

    @property
    def zeroed_weights(self) -> tuple[str, ...]:
        """Weights that members set elements of to zero."""
        return tuple(
            name for member in self._members if isinstance(member, FollowsWidths) for name in member.zeroed_weights
        )

    def zeros_by_weight(self, candidates: IntArray) -> IntArray:
        """Elements of each of them that are set to zero, shape (n, weights)."""
        widths = self.widths(candidates)
        found = [
            member.zeros_among(candidates[:, part], widths)
            for member, part in zip(self._members, self._parts, strict=True)
            if isinstance(member, FollowsWidths)
        ]
        return np.concatenate(found, axis=1) if found else np.zeros((len(candidates), 0), dtype=np.int64)

    def pruning(self, candidate: Sequence[int]) -> Pruning:
        """Keep the units that all members keep."""
        row = self.canonical(np.array([candidate], dtype=np.int64))
        silenced = {name for name, gone in zip(self._groups, self.silenced(row)[0], strict=False) if gone}
        widths = self.widths(row)
        kept: dict[str, tuple[int, ...]] = {}
        zeroed: dict[str, int] = {}
        dropped: dict[str, None] = {}
        patterns: dict[str, str] = {}
        for member, part in zip(self._members, self._parts, strict=True):
            own = member.pruning(row[0, part].tolist())
            dropped.update(dict.fromkeys(own.dropped))
            for name, units in own.kept.items():
                if name not in silenced or isinstance(member, Silences):
                    kept[name] = tuple(sorted({*units} & {*kept.get(name, units)}))
            if isinstance(member, FollowsWidths):
                zeros = member.zeros_among(row[:, part], widths)[0].tolist()
                zeroed |= {name: count for name, count in zip(member.zeroed_weights, zeros, strict=True) if count}
            else:
                zeroed |= own.zeroed
            patterns |= own.patterns
        patterns = {name: pattern for name, pattern in patterns.items() if name in zeroed}
        return Pruning(kept, zeroed, tuple(dropped), patterns)

    def canonical(self, candidates: IntArray) -> IntArray:
        """Lower entries that change nothing; shape (n, d) in and out. Repeated until nothing changes."""
        current = candidates
        while True:
            lowered = self._lowered(current)
            if np.array_equal(lowered, current):
                return lowered
            current = lowered

    def _lowered(self, candidates: IntArray) -> IntArray:
        out = np.concatenate(
            [member.canonical(candidates[:, part]) for member, part in zip(self._members, self._parts, strict=True)],
            axis=1,
        )
        self._silence(out)
        for dims, tables in self._same_widths:
            _name_once(out, dims, tables)
        for dim in self._shared_dims.tolist():  # later members give way
            self._lower_shared(out, dim)
        for member, part in zip(self._members, self._parts, strict=True):
            if isinstance(member, FollowsWidths):
                out[:, part] = _first_equal(member, out[:, part], self.widths(out))
        return out

    def _silence(self, candidates: IntArray) -> None:
        """Set dimensions, in place, to 0 that decide on dropped parts alone; of dropping members, the first counts."""
        for i, (member, part) in enumerate(zip(self._members, self._parts, strict=True)):
            silenced = self.silenced(candidates, i if isinstance(member, Silences) else None)
            if silenced.any():
                decides = self._decides[part]
                heard = (~silenced).astype(np.float64) @ decides.T > 0
                candidates[:, part] = np.where(~heard & decides.any(axis=1), 0, candidates[:, part])

    def _lower_shared(self, candidates: IntArray, dim: int) -> None:
        """Set one entry, in place, to the first option that leaves all widths as they are."""
        rows = np.flatnonzero(candidates[:, dim])
        for option in range(int(candidates[:, dim].max(initial=0))):
            rows = rows[candidates[rows, dim] > option]
            if not rows.size:
                return
            trial = candidates[rows]
            trial[:, dim] = option
            same = (self.widths(trial) == self.widths(candidates[rows])).all(axis=1)
            same &= (self.silenced(trial) == self.silenced(candidates[rows])).all(axis=1)
            candidates[rows[same], dim] = option
            rows = rows[~same]


def _name_once(candidates: IntArray, dims: IntArray, tables: Sequence[FloatArray]) -> None:
    """Name the fewest units of a group, in place, by the first dimension that has an option for them alone."""
    widths = np.stack([table[candidates[:, j]] for j, table in zip(dims, tables, strict=True)], axis=1)
    rows = np.flatnonzero((candidates[:, dims] > 0).sum(axis=1))
    least = widths[rows].min(axis=1)
    unnamed = np.ones(len(rows), dtype=np.bool_)
    for j, table in zip(dims.tolist(), tables, strict=True):
        equal = (table == least[:, None]) & unnamed[:, None]
        candidates[rows, j] = np.where(equal.any(axis=1), equal.argmax(axis=1), 0)
        unnamed &= ~equal.any(axis=1)


def _first_equal(member: FollowsWidths, candidates: IntArray, widths: FloatArray) -> IntArray:
    """Lower each entry to the first option that sets as many elements to zero; shape (n, d).

    Options of a dimension without an order may set other elements to zero: they are lowered to none alone.
    """
    dimensions = getattr(member, "dimensions", ())
    ordered = np.array([dimension.ordered for dimension in dimensions] or [True])
    zeros = member.zeros_among(candidates, widths)
    found = np.where(~ordered & (zeros == 0), 0, candidates)
    while True:
        lower = np.maximum(found - 1, 0)
        same = ordered & (found > 0) & (member.zeros_among(lower, widths) == zeros)
        if not same.any():
            return found
        found = np.where(same, lower, found)
