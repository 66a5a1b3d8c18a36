"""Sizes of a smaller module: rewrite those kept in Python, tie groups that the code needs equal, freeze the rest.

Code such as ``self.reduce(x).reshape(b, x.shape[1], -1)`` needs equal counts where no operation does, and the attention
of most ViT code, ``B, N, C = x.shape ... reshape(B, N, C)``, needs as many residual channels as heads times their size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np
from torch import nn

from autoprune.protocols import Pruning
from autoprune.structure.checks.replay import Replay
from autoprune.structure.labels import Edge, Propagation
from autoprune.structure.repeats import Place, Repeats
from autoprune.structure.sizes.attributes import Found, Known, Search, groups_near, size_at
from autoprune.structure.structure import Attribute, Structure, without_costs
from autoprune.structure.units import Group, Units, find_units, first_labels

ROUNDS = 3
"""Number of draws of units to remove: numbers equal by chance in one draw hide that code needs them equal."""

MakeSmaller = Callable[[Units, Structure, Pruning], nn.Module]
RunUnder = Callable[[nn.Module, AbstractContextManager[Any]], None]


@dataclass(frozen=True)
class Tie:
    """Tie of two groups whose numbers of units the code needs in a fixed proportion.

    Attributes:
        at: Operation at which a smaller module fails without it.
        more: Place of the group of more units.
        fewer: Place of the other: each of its units is tied to a number of the first.
    """

    at: int
    more: Place
    fewer: Place


class Sizes:
    """Finds sizes, ties and groups to freeze for one record.

    Args:
        flow: Labels of the record; ties are added to its edges.
        model: The model; never changed.
        cut: Makes a smaller module for the `Structure.edit` of a pruning.
        run: Its forward under a dispatch mode.
        seed: Draws the units that it removes.

    Attributes:
        known: Meaning of each size in Python.
        attributes: These sizes as functions of the widths, once settled.
        ties: The ties that the code needs.
        stuck: Groups that must be frozen, each with the reason.
    """

    def __init__(self, flow: Propagation, model: nn.Module, cut: MakeSmaller, run: RunUnder, seed: int) -> None:
        self.flow = flow
        self.cut = cut
        self.run = run
        self.seed = seed
        self.repeats = Repeats(flow.record, model)
        self.known: Known = {}
        self.attributes: tuple[Attribute, ...] = ()
        self.ties: list[Tie] = []
        self.stuck: dict[str, str] = {}
        self._ended: dict[int, tuple[Units, Known, Found]] = {}  # draws that ran to their end, with what was known
        self._assembled: tuple[Units, Structure] | None = None

    def settle(self) -> dict[str, str]:
        """Tie and freeze groups until the forward of a smaller module runs to its end; returns the groups to freeze."""
        for seed in range(self.seed, self.seed + ROUNDS):
            units = find_units(self.flow, self.stuck)
            found, draw = self._in_any_draw(units, seed)
            while found.stuck:
                further = self._tie(units, found, draw) or self._give_up(units, found, draw)
                if further is None:
                    self.stuck |= found.stuck
                units = find_units(self.flow, self.stuck)
                found = self.follow(units, draw)
        self.attributes = found.attributes
        return dict(self.stuck)

    def follow(self, units: Units, seed: int) -> Found:
        """Follow a smaller module as far as it runs; sizes found stay known."""
        same, known, found = self._ended.get(seed, (None, {}, None))
        if found is not None and same is units and known == self.known:
            return found
        found = self._search(units, seed).find(self.known)
        if not found.stuck:
            self._ended[seed] = units, dict(self.known), found
        return found

    def reach(self, units: Units, seed: int) -> int:
        """Return the operation up to which a smaller module runs with the known sizes."""
        return self._search(units, seed).reach(self.known)[0]

    def _in_any_draw(self, units: Units, seed: int) -> tuple[Found, int]:
        """Follow a smaller module in up to two draws, and return the result with its draw.

        Widths that are equal by chance may change the branch of a layer, or give a size a wrong meaning. A tie in the
        code also shows in a second draw, which begins without known sizes.
        """
        found = self.follow(units, seed)
        if not found.stuck:
            return found, seed
        self.known = {}
        return self.follow(units, seed + ROUNDS), seed + ROUNDS

    def _search(self, units: Units, seed: int) -> Search:
        pruning = _apart(units.groups, seed)
        base = self._structure(units)

        def cut(attributes: tuple[Attribute, ...]) -> nn.Module:
            return self.cut(units, replace(base, attributes=(*base.attributes, *attributes)), pruning)

        return Search(self.repeats, units, Replay(self.flow, units, base.keep(pruning)), cut, self.run)

    def _structure(self, units: Units) -> Structure:
        """Structure without sizes in Python; that of the latest units is kept, because many draws are made of them."""
        if self._assembled is None or self._assembled[0] is not units:
            self._assembled = units, without_costs(self.flow, units)
        return self._assembled[1]

    def _tie(self, units: Units, found: Found, seed: int) -> Found | None:
        """Tie a group that stops the forward to one nearby, if the forward then gets further; also in later twins."""
        near = self._groups_of_attributes(units, found) | groups_near(self.flow, units, found.reached)
        candidates = list(self._candidates(near, found))
        for promising in (self._promising_as_known, self._promising):
            for tie in candidates:
                made = [edge for each in self._repeated(tie) if (edge := self._edge(units, each)) is not None]
                self.flow.edges.extend(made)
                again = promising(found, seed)
                if again is not None:
                    self.ties.append(tie)
                    return again
                del self.flow.edges[len(self.flow.edges) - len(made) :]
        return None

    def _groups_of_attributes(self, units: Units, found: Found) -> dict[str, tuple[Group, Place]]:
        """Find groups that sizes in the modules around follow: one head count may serve several attention layers."""
        around = self.flow.record.ops[found.reached].module
        near = {}
        for (module, _), place in self.known.items():
            if not module or around == module or around.startswith(f"{module}."):
                group = self._group_at(units, place)
                if group is not None:
                    near[group.name] = (group, place)
        return near

    def _candidates(self, near: Mapping[str, tuple[Group, Place]], found: Found) -> Iterator[Tie]:
        for name in found.stuck:
            for other, (group, place) in near.items():
                if name in near and other != name:
                    (blocked, here) = near[name]
                    if blocked.size >= group.size and blocked.size % group.size == 0:
                        yield Tie(found.reached, here, place)
                    elif group.size % blocked.size == 0:
                        yield Tie(found.reached, place, here)

    def _repeated(self, tie: Tie) -> list[Tie]:
        found = [tie]
        for twin in self.repeats.twins(tie.at):
            more, fewer = twin.place(tie.more), twin.place(tie.fewer)
            if more is not None and fewer is not None:
                found.append(Tie(tie.at + twin.shift, more, fewer))
        return found

    def _edge(self, units: Units, tie: Tie) -> Edge | None:
        """Join two groups in order, equally many units of the larger with each of the smaller; None if they are one."""
        more, fewer = (self._group_at(units, place) for place in (tie.more, tie.fewer))
        if more is None or fewer is None or more is fewer or more.size % fewer.size:
            return None
        few = np.repeat(first_labels(self.flow, fewer), more.size // fewer.size)
        return Edge(tie.at, first_labels(self.flow, more), few)

    def _group_at(self, units: Units, place: Place) -> Group | None:
        size = size_at(self.flow, units, place)
        return units.groups[size.shares[0][0]] if len(size.shares) == 1 else None

    def _promising_as_known(self, found: Found, seed: int) -> Found | None:
        """Try the edges as in `_promising`, in one pass, which is enough if no further sizes are needed."""
        search = self._search(find_units(self.flow, self.stuck), seed)
        return self._promising(found, seed) if search.reach(self.known) > found.reach else None

    def _promising(self, found: Found, seed: int) -> Found | None:
        """Follow a smaller module with the present edges, and return the result if it gets further."""
        units = find_units(self.flow, self.stuck)
        known = dict(self.known)
        again = self._search(units, seed).find(known)
        if again.reach <= found.reach:
            return None
        self.known = known
        return again

    def _give_up(self, units: Units, found: Found, seed: int) -> Found | None:
        """Freeze the group nearby without which the forward gets furthest, if there is one, and its twins with it."""
        best: tuple[Found, dict[str, str]] | None = None
        before = self.stuck
        for promising in (self._promising_as_known, self._promising):
            for name, (_, place) in groups_near(self.flow, units, found.reached).items():
                reason = found.stuck.get(name, f"{self.flow.record.ops[found.reached].where()} needs its full size")
                frozen = {name: reason} | dict.fromkeys(self._twins(units, place, found.reached), reason)
                self.stuck = {**before, **frozen}
                again = promising(best[0] if best else found, seed)
                if again is not None:
                    best = (again, frozen)
            if best:
                break
        self.stuck = {**before, **(best[1] if best else {})}
        return best[0] if best else None

    def stuck_alike(self, units: Units, found: Found) -> dict[str, str]:
        """Find groups that stop the forward, and those at the same places of later twins, each with the reason."""
        near = groups_near(self.flow, units, found.reached)
        alike: dict[str, str] = {}
        for name, reason in found.stuck.items():
            if name in near:
                alike |= dict.fromkeys(self._twins(units, near[name][1], found.reached), reason)
        return alike | dict(found.stuck)

    def _twins(self, units: Units, place: Place, at: int) -> list[str]:
        """List groups at the same place of later twins."""
        places = [there for twin in self.repeats.twins(at) if (there := twin.place(place)) is not None]
        groups = [self._group_at(units, there) for there in places]
        return [group.name for group in groups if group is not None]


def some(group: Group, rng: np.random.Generator, count: int | None = None) -> tuple[int, ...]:
    """Draw units to keep, in a random number unless given: at least one stays, at least one is removed."""
    most = (group.size - 1) // group.multiple
    count = group.multiple * int(rng.integers(1, most + 1)) if count is None else count
    return tuple(sorted(rng.choice(group.size, count, replace=False).tolist()))


def _apart(groups: Sequence[Group], seed: int) -> Pruning:
    """Draw units of every group, in numbers that differ between groups of one size as far as possible.

    A single unit stays only in small groups: einsum and squeeze treat a dimension of one differently. A group of two
    stays whole for every other seed, because otherwise one unit would always be left.
    """
    rng = np.random.default_rng(seed)
    counts: dict[tuple[int, int], Iterator[int]] = {}
    kept = {}
    for group in groups:
        kind = group.size, group.multiple
        if kind not in counts:
            most = (group.size - 1) // group.multiple
            counts[kind] = cycle((rng.permutation(most - 1) + 2).tolist() if most > 2 else (1 + seed % 2, 2 - seed % 2))
        kept[group.name] = some(group, rng, min(group.size, group.multiple * next(counts[kind])))
    return Pruning(kept)
