"""Sparsity: one dimension per weight, each option a fraction of its elements, or a pattern, that is set to zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from autoprune.arguments import numbers, patterns, shown
from autoprune.errors import NothingToPruneError
from autoprune.files.schema import require_form
from autoprune.protocols import Dimension, FloatArray, IntArray, Pruning
from autoprune.search_spaces.counts import candidates_of, counted, options_of
from autoprune.search_spaces.options import decoded, sizes_of, with_options
from autoprune.search_spaces.zeros import Option, ZeroCounts, is_ordered, options_for, parsed
from autoprune.structure.elements import (
    EXTENT_FORM,
    Extent,
    extents_from_json,
    extents_of,
    extents_to_json,
    presence_of,
)
from autoprune.structure.slicing.zeros import UNSTRUCTURED, Pattern
from autoprune.structure.structure import Structure

LEVELS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Sparsity:
    """Settings of a search over the sparsity of weights; `bind` turns them into a space for one model.

    The weights are the parameters that convolutions and matrix products multiply with: no biases, norms, or tables
    that are only looked up; a shared one counts once. The elements of least magnitude within a weight are set to zero,
    and the cost to limit is ``nonzero_params``. A fine-tune moves them away from zero again unless it masks them.

    Attributes:
        levels: Fractions of the elements set to zero, rising from 0 to below 1; of blocks, for patterns of blocks.
        patterns: Forms of the zeros, each of which every weight may take: ``"unstructured"``, N of M neighbouring
            inputs that stay such as ``"2:4"``, blocks of outputs x inputs such as ``"1x8"``; docs/sparsity.md. Where
            two options set equally many elements to zero, a dimension has no order.
        ignore: Weights to leave as they are, by the name or glob of the parameter or of its module.

    Raises:
        ValueError: If a setting is out of range.
    """

    levels: tuple[float, ...] = LEVELS
    ignore: Sequence[str] = ()
    patterns: Sequence[str] = (UNSTRUCTURED,)

    criterion = None
    """None: no unit is removed, so none is ranked."""

    def __post_init__(self) -> None:
        levels = numbers(self.levels)
        if not (levels and levels == sorted(set(levels)) and levels[0] == 0 and levels[-1] < 1):
            raise ValueError(f"levels must be fractions rising from 0 to below 1, got {shown(self.levels)}")
        object.__setattr__(self, "levels", tuple(levels))
        object.__setattr__(self, "ignore", patterns("ignore", self.ignore))
        names = list(dict.fromkeys(patterns("patterns", self.patterns)))
        if not names:
            raise ValueError("patterns must hold at least one form of zeros, such as 'unstructured' or '2:4', got none")
        for name in names:
            try:
                Pattern.parse(name)
            except ValueError as error:
                raise ValueError(f"patterns must hold forms of zeros, and each {error}") from None
        object.__setattr__(self, "patterns", tuple(names))

    def bind(self, structure: Structure, order: Mapping[str, Sequence[int]] | None = None) -> SparsitySpace:
        """Lay the space out for a model.

        Args:
            structure: Its weights are searched; a frozen group may still be sparse.
            order: Not used, because no unit is removed.

        Raises:
            NothingToPruneError: If no weight has a choice left.
            ValueError: If a pattern in `ignore` matches nothing.
        """
        names = {name: (name, name.rpartition(".")[0]) for name in structure.weights}
        for pattern in self.ignore:
            if not any(fnmatchcase(name, pattern) for both in names.values() for name in both):
                raise ValueError(f"ignore has {shown(pattern)}, which matches no weight; there are {', '.join(names)}")
        dimensions = []
        elements = []
        extents = []
        for weight, shape in structure.weights.items():
            if not any(fnmatchcase(name, pattern) for name in names[weight] for pattern in self.ignore):
                options = options_for(shape, self.levels, self.patterns)
                if len(options) > 1:
                    dimensions.append(Dimension(weight, tuple(options), is_ordered(options, shape)))
                    elements.append(math.prod(shape))
                    extents.append(extents_of(structure, weight))
        if not dimensions:
            raise NothingToPruneError(
                f"space has nothing to search: none of {len(names)} weights has a second option under {self}; "
                "loosen ignore= or levels="
            )
        groups = tuple((group.name, group.size) for group in structure.groups)
        branches = tuple(branch.name for branch in structure.branches)
        return SparsitySpace(tuple(dimensions), tuple(elements), groups, tuple(extents), branches)


_FORM = {
    "groups": [[(str, int)]],
    "branches?": [str],
    "dimensions": [
        {"name": str, "options": [(float, str)], "elements": int, "ordered?": bool, "extents?": [EXTENT_FORM]}
    ],
}


@dataclass(frozen=True)
class SparsitySpace:
    """Sparsity of the weights of one model.

    Attributes:
        dimensions: One for each weight with a choice; options are fractions set to zero, or patterns, by rising
            numbers of zeros from 0.
        elements: Elements of each of these weights.
        groups: Name and size of every group of the structure, in its order; all stay whole.
        extents: Sizes of the dimensions of each weight, and presences of branches around it; without them (in older
            files) all sizes are taken as constant.
        branches: Name of every branch of the structure, in its order.
    """

    dimensions: tuple[Dimension, ...]
    elements: tuple[int, ...]
    groups: tuple[tuple[str, int], ...]
    extents: tuple[tuple[Extent, ...], ...] = ()
    branches: tuple[str, ...] = ()
    _count: ZeroCounts = field(init=False, repr=False, compare=False)
    _rows: IntArray = field(init=False, repr=False, compare=False)
    _names: tuple[tuple[str | None, ...], ...] = field(init=False, repr=False, compare=False)  # patterns of options

    def __post_init__(self) -> None:
        extents = self.extents or tuple(((count, ()),) for count in self.elements)
        dense = [size for _, size in self.groups] + [1] * len(self.branches)
        object.__setattr__(self, "_count", ZeroCounts(self.dimensions, extents, self._columns, dense))
        object.__setattr__(self, "_rows", np.arange(len(self.dimensions)))
        object.__setattr__(self, "_names", tuple(tuple(map(_pattern_of, d.options)) for d in self.dimensions))

    @property
    def _columns(self) -> list[str]:
        return [*(name for name, _ in self.groups), *map(presence_of, self.branches)]

    @property
    def sizes(self) -> IntArray:
        """Number of options of each dimension, shape (d,)."""
        return sizes_of(self.dimensions)

    def canonical(self, candidates: IntArray) -> IntArray:
        """Return the candidates as they are: no dimension makes another irrelevant here."""
        return candidates

    def decode(self, candidate: Sequence[int]) -> dict[str, Any]:
        """Fraction set to zero of each weight that has a choice."""
        return decoded(self.dimensions, candidate)

    def pruning(self, candidate: Sequence[int]) -> Pruning:
        """Zero the elements of least magnitude within each weight, or within each cell of its pattern."""
        counts = self._count.table[self._rows, list(candidate)]
        zeroed = {d.name: int(n) for d, n in zip(self.dimensions, counts, strict=True) if n}
        return Pruning(zeroed=zeroed, patterns=self.patterns_of(candidate))

    def patterns_of(self, candidate: Sequence[int]) -> dict[str, str]:
        """Pattern of the zeros of each weight, where it is not single elements."""
        names = ((d.name, own[i]) for d, own, i in zip(self.dimensions, self._names, candidate, strict=True))
        return {name: pattern for name, pattern in names if pattern}

    def near(self, kept: Mapping[str, int]) -> list[int]:
        """Return the candidate whose weights keep about as many elements as given; others stay dense.

        The numbers are those of a rule, such as `autoprune.importance.masks.allocation.lamp`. Of options that set
        equally many elements to zero, the first is taken.
        """
        candidate = []
        for d, zeros, elements in zip(self.dimensions, self._count.table, self.elements, strict=True):
            wanted = elements - kept.get(d.name, elements)
            candidate.append(int(np.abs(zeros[: len(d.options)] - wanted).argmin()))
        return candidate

    def widths(self, candidates: IntArray) -> FloatArray:
        """Every unit stays; shape (n, groups)."""
        return np.tile(np.array([size for _, size in self.groups], dtype=np.float64), (len(candidates), 1))

    def zeroed(self, candidates: IntArray) -> FloatArray:
        """Elements set to zero, shape (n,)."""
        zeros: FloatArray = self.zeros_by_weight(candidates).sum(axis=1).astype(np.float64)
        return zeros

    def zeros_by_weight(self, candidates: IntArray) -> IntArray:
        """Elements of each weight that are set to zero, shape (n, d)."""
        zeros: IntArray = self._count.table[self._rows, candidates]
        return zeros

    @property
    def zeroed_weights(self) -> tuple[str, ...]:
        """The weight of each dimension."""
        return tuple(dimension.name for dimension in self.dimensions)

    def zeros_among(self, candidates: IntArray, widths: FloatArray) -> IntArray:
        """Elements that each dimension sets to zero, shape (n, d): its level of those left at widths (n, groups)."""
        return self._count(candidates, widths)

    def restricted(self, options: Sequence[Sequence[int]]) -> SparsitySpace:
        """Return the space with these levels of each weight alone."""
        return replace(self, dimensions=with_options(self.dimensions, options))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        dimensions: list[dict[str, Any]] = [
            {"name": d.name, "options": list(d.options), "elements": count, **({} if d.ordered else {"ordered": False})}
            for d, count in zip(self.dimensions, self.elements, strict=True)
        ]
        for dimension, extents in zip(dimensions, self.extents, strict=False):  # an older file has none
            dimension["extents"] = extents_to_json(extents)
        found = {"type": "sparsity", "groups": [list(group) for group in self.groups], "dimensions": dimensions}
        return found | ({"branches": list(self.branches)} if self.branches else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SparsitySpace:
        """Restore what `to_json` wrote.

        Raises:
            ValueError: If it is something else; names the first place that differs.
        """
        require_form(data, _FORM, "space")
        for d in data["dimensions"]:
            _require_options(d)
        extents = tuple(extents_from_json(d["extents"]) for d in data["dimensions"] if "extents" in d)
        if extents:
            _require_extents(extents, data)
        return cls(
            dimensions=tuple(
                Dimension(d["name"], tuple(d["options"]), d.get("ordered", True)) for d in data["dimensions"]
            ),
            elements=tuple(d["elements"] for d in data["dimensions"]),
            groups=tuple((str(name), int(size)) for name, size in data["groups"]),
            extents=extents,
            branches=tuple(data.get("branches", ())),
        )

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{counted(len(self.dimensions), 'weight')} of {counted(sum(self.elements), 'element')} with "
            f"{options_of(self.sizes, 'level')}, {candidates_of(self.sizes)}"
        )


def _pattern_of(option: Option) -> str | None:
    """Name of the pattern of an option; None for single elements."""
    name = parsed(option)[0].name
    return None if name == UNSTRUCTURED else name


def _require_options(dimension: Mapping[str, Any]) -> None:
    """Check the options of one weight in a file.

    Raises:
        ValueError: Names the weight.
    """
    options = dimension["options"]
    name = dimension["name"]
    shares = [option for option in options if not isinstance(option, str)]
    if not options or options[0] != 0 or shares != sorted(set(shares)) or shares[-1] >= 1 or dimension["elements"] < 1:
        raise ValueError(f"space.dimensions[{name!r}] must have elements, and levels that rise from 0")
    for option in options:
        try:
            parsed(option)
        except ValueError as error:
            raise ValueError(f"space.dimensions[{name!r}]: {error}") from error
    if len(set(map(str, options))) < len(options):
        raise ValueError(f"space.dimensions[{name!r}] must have every option once")


def _require_extents(extents: Sequence[Sequence[Extent]], data: Mapping[str, Any]) -> None:
    """Check that the sizes of weights multiply to their elements in the dense model.

    Raises:
        ValueError: Names the first weight for which they do not.
    """
    widths = {**dict(data["groups"]), **{presence_of(branch): 1 for branch in data.get("branches", ())}}
    for d, own in zip(data["dimensions"], extents, strict=False):
        known = all(name in widths for _, shares in own for name, _ in shares)
        sizes = [fixed + sum(each * widths[name] for name, each in shares) for fixed, shares in own] if known else []
        if "extents" not in d or math.prod(sizes) != d["elements"] or not sizes:
            raise ValueError(f"space.dimensions[{d['name']!r}] must have extents that multiply to its elements")
