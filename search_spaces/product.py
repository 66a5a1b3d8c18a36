"""Product of spaces: the dimensions of all of them in one candidate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoprune.arguments import shown
from autoprune.costs.latency.model import Latency
from autoprune.files.schema import require_form
from autoprune.importance.criteria import Criterion
from autoprune.protocols import Dimension, FloatArray, IntArray, Pruning, SearchSpace
from autoprune.search_spaces.combined import Combined
from autoprune.search_spaces.counts import candidates_of
from autoprune.search_spaces.options import decoded, require_options
from autoprune.search_spaces.protocol import Restricts, Settings, finer, needs_latency, why_no_less, with_latency
from autoprune.search_spaces.registry import make_space, require_registered, space_from_json
from autoprune.structure.structure import Structure


@dataclass(frozen=True, init=False)
class Product:
    """Settings of a search over several spaces at once.

    Units that one of the spaces removes are gone, and shares of elements set to zero are shares of what is left.
    Criteria that rank units must agree; ``"auto"`` agrees with any.

    Args:
        settings: Names or settings of spaces, such as ``Product(Channels(), Sparsity())``; other products are unfolded.

    Attributes:
        settings: The settings.

    Raises:
        ValueError: If there are none, one is no settings, or their criteria differ.
    """

    settings: tuple[Settings, ...]

    def __init__(self, *settings: str | Settings) -> None:
        made = [make_space(each) for each in settings]
        if not made:
            raise ValueError("settings must hold at least one space, such as Product(Channels(), Sparsity()), got none")
        flat = [inner for each in made for inner in (each.settings if isinstance(each, Product) else (each,))]
        object.__setattr__(self, "settings", tuple(flat))
        _ = self.criterion

    @property
    def criterion(self) -> str | Criterion | None:
        """Criterion that ranks the units of all of them; None if none removes units."""
        given = [each.criterion for each in self.settings if each.criterion is not None]
        wanted = [criterion for criterion in given if criterion != "auto"]
        for other in wanted[1:]:
            if other != wanted[0]:
                raise ValueError(
                    f"criterion must be the same in every space of a product, got {shown(wanted[0])} and "
                    f"{shown(other)}; set one in all of them"
                )
        return next(iter(wanted + given), None)

    @property
    def needs_latency(self) -> bool:
        """Return whether one of them follows the measured latency."""
        return any(map(needs_latency, self.settings))

    def with_latency(self, latency: Latency, structure: Structure) -> Product:
        """Give a measured latency to those that need one."""
        return Product(*(with_latency(each, latency, structure) for each in self.settings))

    def why_no_less(self) -> str:
        """Name the settings of all of them that keep the smallest network from being smaller."""
        return "; ".join(map(why_no_less, self.settings))

    def finer(self) -> Product:
        """Return the product of finer settings, where they know some."""
        return Product(*map(finer, self.settings))

    def bind(self, structure: Structure, order: Mapping[str, Sequence[int]]) -> ProductSpace:
        """Lay the spaces out for a model.

        Raises:
            NothingToPruneError: If one of them has nothing to search.
            ValueError: If two of them cannot be searched together; see `ProductSpace`.
        """
        members = tuple(each.bind(structure, order) for each in self.settings)
        for member in members:
            require_registered(member)
        return ProductSpace(members, tuple((group.name, group.size) for group in structure.groups))


_FORM = {"type": str, "groups": [[(str, int)]], "members": [{"type": str}]}


@dataclass(frozen=True)
class ProductSpace:
    """Several spaces of one model, whose candidates stand one after the other in a candidate of the product.

    A group keeps the fewest units that a member gives it. Where members agree on that, canonical candidates have
    option 0 in the last of them that can; so have dimensions that decide on dropped parts alone, or set nothing to zero
    in what is left.

    Attributes:
        members: The spaces.
        groups: Name and size of every group of the structure, in its order.

    Raises:
        ValueError: If there is no member; if a member sets elements to zero but does not follow the widths of another
            that removes units (`autoprune.search_spaces.FollowsWidths`); if two set elements of one weight to zero,
            drop the same part, or keep units of one group by different orders.
    """

    members: tuple[SearchSpace, ...]
    groups: tuple[tuple[str, int], ...]
    _joined: Combined = field(init=False, repr=False, compare=False)
    _dimensions: tuple[Dimension, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_joined", Combined(self.members, [name for name, _ in self.groups]))
        object.__setattr__(self, "_dimensions", _named(self.members))

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The dimensions of all members; names that two of them use get the type of their member as prefix."""
        return self._dimensions

    @property
    def sizes(self) -> IntArray:
        """Number of options of each dimension, shape (d,)."""
        return np.concatenate([member.sizes for member in self.members])

    def canonical(self, candidates: IntArray) -> IntArray:
        """Set entries that change nothing to 0, or to the first option that gives the same; shape (n, d)."""
        return self._joined.canonical(candidates)

    def silenced(self, candidates: IntArray) -> NDArray[np.bool_]:
        """Mark the groups that lie inside a dropped part, bool, shape (n, groups)."""
        return self._joined.silenced(candidates)[:, : len(self.groups)]

    def decode(self, candidate: Sequence[int]) -> dict[str, Any]:
        """Turn option indices, shape (d,), into ``{dimension: option}``."""
        return decoded(self.dimensions, candidate)

    def pruning(self, candidate: Sequence[int]) -> Pruning:
        """Keep the units that all members keep, and set to zero what they do of these."""
        return self._joined.pruning(candidate)

    def widths(self, candidates: IntArray) -> FloatArray:
        """Fewest units that a member keeps in each group, shape (n, groups), then what members add to it."""
        return self._joined.widths(candidates)

    def zeroed(self, candidates: IntArray) -> FloatArray:
        """Elements set to zero, shape (n,)."""
        return self._joined.zeroed(candidates)

    @property
    def zeroed_weights(self) -> tuple[str, ...]:
        """Weights that members set elements of to zero."""
        return self._joined.zeroed_weights

    def zeros_by_weight(self, candidates: IntArray) -> IntArray:
        """Elements of each of them that are set to zero, among those that stay, shape (n, weights)."""
        return self._joined.zeros_by_weight(candidates)

    def restricted(self, options: Sequence[Sequence[int]]) -> ProductSpace:
        """Return the product of the members with these options of each dimension alone.

        Raises:
            ValueError: If a member cannot be restricted.
        """
        require_options(self.dimensions, options)
        left = list(options)
        members = []
        for member in self.members:
            if not isinstance(member, Restricts):
                raise ValueError(f"space must have a method restricted, but {type(member).__name__} has none")
            own = [left.pop(0) for _ in member.sizes]
            members.append(member.restricted(own))
        return ProductSpace(tuple(members), self.groups)

    def describe(self) -> str:
        """One line for people."""
        each = "; ".join(
            f"{name}: {member.describe()}" for name, member in zip(_labels(self.members), self.members, strict=True)
        )
        return f"{each}; together {candidates_of(self.sizes)}"

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary from which `from_json` restores an equal space."""
        return {
            "type": "product",
            "groups": [list(group) for group in self.groups],
            "members": [member.to_json() for member in self.members],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProductSpace:
        """Restore what `to_json` wrote.

        Raises:
            FileFormatError: If the kind of a member is unknown here.
            ValueError: If it is something else; names the first place that differs.
        """
        require_form(data, _FORM, "space")
        members = tuple(space_from_json(member) for member in data["members"])
        return cls(members, tuple((str(name), int(size)) for name, size in data["groups"]))


def _labels(members: Sequence[SearchSpace]) -> list[str]:
    """Types of members, numbered where there are several of one type."""
    types = [str(member.to_json()["type"]) for member in members]
    several = Counter(types)
    seen: Counter[str] = Counter()
    labels = []
    for kind in types:
        seen[kind] += 1
        labels.append(f"{kind} {seen[kind]}" if several[kind] > 1 else kind)
    return labels


def _named(members: Sequence[SearchSpace]) -> tuple[Dimension, ...]:
    """Dimensions of all members under names of their own."""
    uses = Counter(dimension.name for member in members for dimension in member.dimensions)
    labelled = zip(_labels(members), members, strict=True)
    return tuple(
        d if uses[d.name] == 1 else Dimension(f"{label}: {d.name}", d.options, d.ordered)
        for label, member in labelled
        for d in member.dimensions
    )
