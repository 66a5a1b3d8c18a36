"""A space written out: each dimension is a choice between widths of some groups at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from autoprune.files.schema import require_form
from autoprune.protocols import Dimension, FloatArray, IntArray, Pruning
from autoprune.search_spaces.counts import candidates_of, counted, options_of
from autoprune.search_spaces.options import decoded, require_options
from autoprune.structure.structure import Structure

_FORM = {
    "groups": [[(str, int)]],
    "order": {str: [int]},
    "dimensions": [{"name": str, "ordered": bool, "labels": [(str, float)], "options": [{str: int}]}],
}


@dataclass(frozen=True)
class Choice:
    """One dimension of `Choices`.

    Attributes:
        options: For each option the units to keep of every group that the dimension decides on; option 0 keeps all.
        labels: Texts or numbers that stand for the options in results; the units kept if there are none.
        ordered: Whether every later option removes more.
    """

    options: Sequence[Mapping[str, int]]
    labels: Sequence[str | float] = ()
    ordered: bool = True


@dataclass(frozen=True)
class Choices:
    """Space for settings of one's own: ``bind(structure, order)`` writes down what each option keeps.

    Attributes:
        order: The units of every group of the structure, in its order, by falling importance; `of` sorts them so.
        dimensions_by_name: The dimensions. No two decide on one group; a group that none decides on stays whole.

    Raises:
        ValueError: If a group is unknown, is named by two dimensions or not by all options of one, or has a width out
            of range; if option 0 is not dense, or labels do not fit the options.

    Example:
        >>> space = Choices({"a": (1, 0)}, {"width": Choice([{"a": 2}, {"a": 1}])})
        >>> space.pruning([1]).kept
        {'a': (1,)}
    """

    order: Mapping[str, Sequence[int]]
    dimensions_by_name: Mapping[str, Choice]
    _dense: FloatArray = field(init=False, repr=False, compare=False)  # units of each group
    # The columns of each dimension's groups, and their widths by option.
    _tables: tuple[tuple[IntArray, FloatArray], ...] = field(init=False, repr=False, compare=False)

    @classmethod
    def of(cls, structure: Structure, order: Mapping[str, Sequence[int]], dimensions: Mapping[str, Choice]) -> Choices:
        """Make the space from what ``bind`` of settings gets, and the dimensions by name.

        Widths are raised to the multiples that groups need.
        """
        multiples = {group.name: group.multiple for group in structure.groups}

        def raised(kept: Mapping[str, int]) -> dict[str, int]:
            return {name: -(-units // multiples.get(name, 1)) * multiples.get(name, 1) for name, units in kept.items()}

        fitting = {
            name: replace(one, options=[raised(kept) for kept in one.options]) for name, one in dimensions.items()
        }
        return cls({group.name: tuple(map(int, order[group.name])) for group in structure.groups}, fitting)

    def __post_init__(self) -> None:
        taken: dict[str, str] = {}
        for name, choice in self.dimensions_by_name.items():
            if not choice.options or not all(choice.options):
                raise ValueError(
                    f"dimension {name!r} must have options, each with the units that groups keep, got none"
                )
            if choice.labels and len(choice.labels) != len(choice.options):
                raise ValueError(
                    f"labels of {name!r} must be as many as its {len(choice.options)} options, got {len(choice.labels)}"
                )
            groups = set(choice.options[0])
            for number, kept in enumerate(choice.options):
                if set(kept) != groups:
                    differing = sorted(groups ^ set(kept))
                    raise ValueError(
                        f"option {number} of {name!r} must name the groups of option 0, differs in {differing}"
                    )
                for group, units in kept.items():
                    self._require_width(name, number, group, units)
            for group in groups:
                if group in taken:
                    raise ValueError(f"group {group!r} must be in one dimension, is in {taken[group]!r} and {name!r}")
                taken[group] = name
        columns = {group: i for i, group in enumerate(self.order)}
        tables = tuple(
            (
                np.array([columns[group] for group in choice.options[0]], dtype=np.int64),
                np.array([[kept[group] for group in choice.options[0]] for kept in choice.options], dtype=np.float64),
            )
            for choice in self.dimensions_by_name.values()
        )
        dense = np.array([len(units) for units in self.order.values()], dtype=np.float64)
        object.__setattr__(self, "_dense", dense)
        object.__setattr__(self, "_tables", tables)

    def _require_width(self, name: str, number: int, group: str, units: int) -> None:
        if group not in self.order:
            raise ValueError(f"option {number} of {name!r} must name groups of the model, got {group!r}")
        most = len(self.order[group])
        least = most if number == 0 else 1
        if not least <= units <= most:
            rule = f"{most}, because option 0 is dense," if number == 0 else f"1 to {most}"
            raise ValueError(f"option {number} of {name!r} must keep {rule} units of {group!r}, got {units}")

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The dimensions, with the labels of their options, or the units that these keep."""
        given = self.dimensions_by_name.items()
        return tuple(Dimension(name, tuple(one.labels or map(dict, one.options)), one.ordered) for name, one in given)

    @property
    def sizes(self) -> IntArray:
        """Number of options of each dimension, shape (d,)."""
        return np.array([len(choice.options) for choice in self.dimensions_by_name.values()], dtype=np.int64)

    def canonical(self, candidates: IntArray) -> IntArray:
        """Return the candidates: no dimension makes another irrelevant."""
        return candidates

    def decode(self, candidate: Sequence[int]) -> dict[str, Any]:
        """Turn option indices, shape (d,), into ``{dimension: label}``."""
        return decoded(self.dimensions, candidate)

    def pruning(self, candidate: Sequence[int]) -> Pruning:
        """Keep the most important units of each group."""
        kept = {}
        for choice, i in zip(self.dimensions_by_name.values(), candidate, strict=True):
            for group, units in choice.options[i].items():
                if units < len(self.order[group]):
                    kept[group] = tuple(sorted(self.order[group][:units]))
        return Pruning(kept)

    def widths(self, candidates: IntArray) -> FloatArray:
        """Units kept in each group, shape (n, groups), for candidates of shape (n, d)."""
        found = np.tile(self._dense, (len(candidates), 1))
        for entry, (columns, widths) in zip(candidates.T, self._tables, strict=True):
            found[:, columns] = widths[entry]
        return found

    def restricted(self, options: Sequence[Sequence[int]]) -> Choices:
        """Return the space with these options of each dimension alone."""
        require_options(self.dimensions, options)
        left = {}
        for (name, choice), kept in zip(self.dimensions_by_name.items(), options, strict=True):
            labels = [choice.labels[i] for i in kept] if choice.labels else ()
            left[name] = replace(choice, options=[choice.options[i] for i in kept], labels=labels)
        return Choices(self.order, left)

    def zeroed(self, candidates: IntArray) -> FloatArray:
        """Return 0 for each candidate: no element is set to zero."""
        return np.zeros(len(candidates))

    def describe(self) -> str:
        """One line for people."""
        names = counted(len(self.dimensions_by_name), "dimension")
        return f"{names} with {options_of(self.sizes, 'option')}, {candidates_of(self.sizes)}"

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary from which `from_json` restores an equal space."""
        given = self.dimensions_by_name.items()
        return {
            "type": "choices",
            "groups": [[group, len(units)] for group, units in self.order.items()],
            "order": {group: list(units) for group, units in self.order.items()},
            "dimensions": [
                {
                    "name": name,
                    "ordered": one.ordered,
                    "labels": list(one.labels),
                    "options": [dict(kept) for kept in one.options],
                }
                for name, one in given
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Choices:
        """Restore what `to_json` wrote.

        Raises:
            ValueError: If it is something else; names the first place that differs.
        """
        require_form(data, _FORM, "space")
        order = {}
        for group, size in data["groups"]:
            units = data["order"].get(group, [])
            if sorted(units) != list(range(size)):
                raise ValueError(f"space.order[{group!r}] must have every unit of its group")
            order[group] = tuple(units)
        given = data["dimensions"]
        return cls(order, {each["name"]: Choice(each["options"], each["labels"], each["ordered"]) for each in given})
