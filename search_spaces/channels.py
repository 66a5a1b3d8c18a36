"""Channel pruning: one dimension per group, each option a number of units to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from math import lcm
from typing import Any

import numpy as np

from autoprune.arguments import is_number, is_whole, numbers, patterns, shown, whole_number, why_no_function
from autoprune.costs.latency.model import Latency
from autoprune.errors import NothingToPruneError
from autoprune.files.schema import require_form
from autoprune.importance.criteria import CRITERIA, Criterion
from autoprune.protocols import Dimension, FloatArray, IntArray, Pruning
from autoprune.search_spaces.counts import candidates_of, counted, options_of
from autoprune.search_spaces.options import decoded, sizes_of, with_options
from autoprune.structure.analysis import require_prunable
from autoprune.structure.structure import Structure
from autoprune.structure.units import Group


@dataclass(frozen=True)
class Channels:
    """Settings of a search over widths; `bind` turns them into a space for one model.

    Attributes:
        step: Distance between options: a fraction of each group (float in (0, 1)) or a number of units (int >= 1).
        round_to: Widths are multiples of this many units, except the dense one. ``"auto"`` takes widths at the right
            edges of steps in the measured latency: each option goes up to the first that cannot be widened for free.
        min_width: Fewest units that a group keeps.
        min_fraction: Smallest fraction of its units that a group keeps, in (0, 1].
        options: Fractions to keep, falling from 1.0, instead of equal steps.
        bounds: For groups whose name, or one of whose modules, matches a glob: (least, most) fraction to keep.
        ignore: Modules to leave as they are, by name or glob: every group that touches one keeps all its units.
        criterion: Ranks the units of a group: a name in ``autoprune.importance.criteria.CRITERIA``, or a callable.
            ``"auto"`` is the best in a calibration check (see `autoprune.study.calibration_check`) with
            ``evaluator="auto"``, else ``"l2"``.
        edges: The right edges, ascending, for each group by name; a search with ``round_to="auto"`` fills them in.

    Raises:
        ValueError: If a setting is out of range, or `options` is empty or unsorted.
    """

    step: float | int = 0.0625
    round_to: int | str = 1
    min_width: int = 1
    min_fraction: float = 0.0625
    options: tuple[float, ...] | None = None
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    ignore: Sequence[str] = ()
    criterion: str | Criterion = "auto"
    edges: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        units = is_whole(self.step) and self.step >= 1
        if not units and not (isinstance(self.step, float) and 0 < self.step < 1):
            raise ValueError(
                f"step must be a fraction in (0, 1) or a whole number of units >= 1, got {shown(self.step)}"
            )
        if not (isinstance(self.round_to, str) and self.round_to == "auto"):
            object.__setattr__(self, "round_to", whole_number("round_to", self.round_to, 1, why=", or 'auto'"))
        object.__setattr__(self, "min_width", whole_number("min_width", self.min_width, 1))
        if not (is_number(self.min_fraction) and 0 < self.min_fraction <= 1):
            raise ValueError(f"min_fraction must be in (0, 1], got {shown(self.min_fraction)}")
        if self.options is not None:
            options = numbers(self.options)
            if not (options and options == sorted(set(options), reverse=True) and options[0] == 1 and options[-1] > 0):
                raise ValueError(f"options must be fractions falling from 1.0 to above 0, got {shown(self.options)}")
            object.__setattr__(self, "options", tuple(options))
        if not isinstance(self.bounds, Mapping):
            raise ValueError(
                f"bounds must be (least, most) by name or glob, such as {{'layer1.*': (0.5, 1.0)}}, got "
                f"{shown(self.bounds)}"
            )
        for pattern, bound in self.bounds.items():
            ends = numbers(bound)
            if not (len(ends) == 2 and 0 < ends[0] <= ends[1] <= 1):
                raise ValueError(
                    f"bounds[{shown(pattern)}] must be (least, most) with 0 < least <= most <= 1, got {shown(bound)}"
                )
        patterns("bounds", self.bounds)
        if not isinstance(self.edges, Mapping):
            raise ValueError(f"edges must be widths by the name of the group, got {shown(self.edges)}")
        object.__setattr__(self, "ignore", patterns("ignore", self.ignore))
        named = isinstance(self.criterion, str)
        known = named and self.criterion in (*CRITERIA, "auto")
        if not known and (why := f"got {shown(self.criterion)}" if named else why_no_function(self.criterion, 1)):
            raise ValueError(
                f"criterion must be one of {sorted(CRITERIA)}, 'auto', or a function of what is known of a group, {why}"
            )

    @property
    def needs_latency(self) -> bool:
        """Return whether widths follow the measured latency."""
        return self.round_to == "auto"

    def with_latency(self, latency: Latency, structure: Structure) -> Channels:
        """Fill in the right edges of the steps of a latency."""
        return replace(self, edges=latency.right_edges([group.multiple for group in structure.groups]))

    def why_no_less(self) -> str:
        """Name the settings that keep widths from being smaller, with their values."""
        stops = {name: getattr(self, name) for name in ("min_fraction", "min_width", "round_to", "ignore", "bounds")}
        loose = {"min_fraction": 0.0, "min_width": 1, "round_to": 1}
        named = [f"{name}={shown(value)}" for name, value in stops.items() if value and value != loose.get(name)]
        even = f"step={self.step!r}" if self.options is None else f"options={shown(self.options)}"
        return f"{', '.join((*named, even))} of Channels(...)"

    def finer(self) -> Channels:
        """Halve the step, or divide a whole number of units by its least divisor; halve the gaps of `options`."""
        if self.options is not None:
            halves = [(a + b) / 2 for a, b in pairwise(self.options)]
            return replace(self, options=tuple(sorted({*self.options, *halves}, reverse=True)))
        if isinstance(self.step, float):
            return replace(self, step=self.step / 2)
        return replace(self, step=max([d for d in range(1, self.step) if self.step % d == 0], default=1))

    def bind(self, structure: Structure, order: Mapping[str, Sequence[int]]) -> ChannelSpace:
        """Lay the space out for a model.

        Args:
            structure: What can be removed.
            order: For each group, its units by falling importance.

        Raises:
            NothingToPruneError: If the model has no groups, or none with a choice left.
            ValueError: If a pattern in `ignore` or `bounds` matches nothing.
        """
        require_prunable(structure)
        self._require_matches(structure)
        dimensions = []
        for group in structure.groups:
            widths = self._widths(group)
            if group.name in structure.unread:  # nothing speaks for any other width
                widths = (widths[0], *widths[1:][-1:])
            if len(widths) > 1:
                dimensions.append(Dimension(group.name, widths))
        if not dimensions:
            raise NothingToPruneError(
                f"space has nothing to search: none of {len(structure.groups)} groups has a second option under "
                f"{self}; loosen ignore=, bounds=, round_to= or min_width="
            )
        return ChannelSpace(
            dimensions=tuple(dimensions),
            groups=tuple((group.name, group.size) for group in structure.groups),
            order={dimension.name: tuple(int(unit) for unit in order[dimension.name]) for dimension in dimensions},
        )

    def _require_matches(self, structure: Structure) -> None:
        names = {name for group in structure.groups for name in _names(group)}
        names |= {frozen.tensor.rpartition(".")[0] for frozen in structure.frozen}
        for argument, given in (("ignore", self.ignore), ("bounds", self.bounds)):
            for pattern in given:
                if not any(fnmatchcase(name, pattern) for name in names):
                    some = ", ".join(sorted(names)[:8])
                    raise ValueError(f"{argument} has {shown(pattern)}, which matches no module; there are {some}, ...")

    def _widths(self, group: Group) -> tuple[int, ...]:
        if any(fnmatchcase(name, pattern) for name in _names(group) for pattern in self.ignore):
            return (group.size,)
        own = [b for pattern, b in self.bounds.items() if any(fnmatchcase(n, pattern) for n in _names(group))]
        least = max([self.min_fraction] if not own else [low for low, _ in own])
        most = min([1.0, *[high for _, high in own]])
        lowest = max(self.min_width, int(np.ceil(least * group.size - 1e-9)))
        highest = int(np.floor(most * group.size + 1e-9))
        if self.options is not None:
            wanted = [fraction * group.size for fraction in self.options]
        else:
            step = self.step if isinstance(self.step, int) else self.step * group.size
            wanted = [group.size - i * step for i in range(int(group.size / step) + 1)]
        even = group.multiple if isinstance(self.round_to, str) else lcm(self.round_to, group.multiple)
        rounded = {max(even, round(width / even) * even) for width in wanted}
        if self.needs_latency:
            if group.name not in self.edges:
                raise ValueError(
                    "round_to='auto' needs measured latencies: a table as costs={'latency_ms': table}, or a budget on "
                    "latency without costs="
                )
            rounded = {min((edge for edge in self.edges[group.name] if edge >= w), default=w) for w in rounded}
        # Option 0 is dense whatever the bounds say: every candidate is compared with it.
        smaller = sorted((w for w in rounded if lowest <= w <= highest and w < group.size), reverse=True)
        return (group.size, *smaller)


def _names(group: Group) -> set[str]:
    return {group.name, *(slot.tensor.rpartition(".")[0] for slot in group.slots)}


_FORM = {"groups": [[(str, int)]], "dimensions": [{"name": str, "options": [int], "order": [int]}]}


@dataclass(frozen=True)
class ChannelSpace:
    """Widths of the groups of one model.

    Attributes:
        dimensions: One for each group with a choice; options are units kept, falling.
        groups: Name and size of every group of the structure, in its order.
        order: Units by falling importance, for each dimension.
    """

    dimensions: tuple[Dimension, ...]
    groups: tuple[tuple[str, int], ...]
    order: Mapping[str, tuple[int, ...]]
    _table: FloatArray = field(init=False, repr=False, compare=False)  # units kept by option, rows one after the other
    _rows: IntArray = field(init=False, repr=False, compare=False)  # where each begins
    _columns: IntArray = field(init=False, repr=False, compare=False)  # the group of each dimension

    def __post_init__(self) -> None:
        names = [name for name, _ in self.groups]
        table = np.zeros((len(self.dimensions), max(len(d.options) for d in self.dimensions)))
        for i, dimension in enumerate(self.dimensions):
            table[i, : len(dimension.options)] = dimension.options
        object.__setattr__(self, "_table", table.ravel())
        object.__setattr__(self, "_rows", np.arange(len(self.dimensions)) * table.shape[1])
        object.__setattr__(self, "_columns", np.array([names.index(d.name) for d in self.dimensions]))

    @property
    def sizes(self) -> IntArray:
        """Number of options of each dimension, shape (d,)."""
        return sizes_of(self.dimensions)

    def canonical(self, candidates: IntArray) -> IntArray:
        """Return the candidates as they are: no dimension makes another irrelevant here."""
        return candidates

    def decode(self, candidate: Sequence[int]) -> dict[str, Any]:
        """Units kept in each group that has a choice."""
        return decoded(self.dimensions, candidate)

    def pruning(self, candidate: Sequence[int]) -> Pruning:
        """Keep the most important units of each group."""
        kept = {}
        options = np.asarray(candidate, dtype=np.int64)
        for j in np.flatnonzero(options).tolist():
            dimension = self.dimensions[j]
            kept[dimension.name] = tuple(sorted(self.order[dimension.name][: dimension.options[options[j]]]))
        return Pruning(kept)

    def widths(self, candidates: IntArray) -> FloatArray:
        """Units kept in each group of the structure, shape (n, groups)."""
        kept: FloatArray = self._table[candidates + self._rows]
        if len(self.dimensions) == len(self.groups):
            return kept
        out = np.tile(np.array([size for _, size in self.groups], dtype=np.float64), (len(candidates), 1))
        out[:, self._columns] = kept
        return out

    @property
    def choices(self) -> tuple[IntArray, FloatArray]:
        """Position in `groups` of each dimension's group, (d,), and units kept by each option, padded, (d, most)."""
        return self._columns, self._table.reshape(len(self.dimensions), -1)

    def zeroed(self, candidates: IntArray) -> FloatArray:
        """Zeros, shape (n,): whole units are removed, and no single elements."""
        return np.zeros(len(candidates))

    def restricted(self, options: Sequence[Sequence[int]]) -> ChannelSpace:
        """Return the space with these widths of each group alone."""
        return replace(self, dimensions=with_options(self.dimensions, options))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return {
            "type": "channels",
            "groups": [list(group) for group in self.groups],
            "dimensions": [
                {"name": d.name, "options": list(d.options), "order": list(self.order[d.name])} for d in self.dimensions
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ChannelSpace:
        """Restore what `to_json` wrote.

        Raises:
            ValueError: If it is something else; names the first place that differs.
        """
        require_form(data, _FORM, "space")
        sizes = dict(data["groups"])
        for d in data["dimensions"]:
            size = sizes.get(d["name"])
            widths = d["options"]
            if size is None or not widths or widths != sorted({*widths, size}, reverse=True) or widths[-1] < 1:
                raise ValueError(f"space.dimensions[{d['name']!r}] must have widths that fall from that of its group")
            if sorted(d["order"]) != list(range(size)):
                raise ValueError(f"space.dimensions[{d['name']!r}] must have every unit of its group in its order")
        return cls(
            dimensions=tuple(Dimension(d["name"], tuple(d["options"])) for d in data["dimensions"]),
            groups=tuple((str(name), int(size)) for name, size in data["groups"]),
            order={d["name"]: tuple(d["order"]) for d in data["dimensions"]},
        )

    def describe(self) -> str:
        """One line for people."""
        units = sum(dimension.options[0] for dimension in self.dimensions)
        return (
            f"{counted(len(self.dimensions), 'group')} of {counted(units, 'unit')} with "
            f"{options_of(self.sizes, 'width')}, {candidates_of(self.sizes)}"
        )
