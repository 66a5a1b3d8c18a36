"""Widths of repeated blocks: all blocks alike, or only what lies inside a block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from autoprune.arguments import flag, shown
from autoprune.costs.latency.model import Latency
from autoprune.errors import NothingToPruneError
from autoprune.importance.criteria import Criterion
from autoprune.search_spaces.channels import Channels, ChannelSpace
from autoprune.search_spaces.choices import Choice, Choices
from autoprune.structure.structure import Structure
from autoprune.structure.units import Group


@dataclass(frozen=True)
class Blocks:
    """Settings of a search over widths for networks of repeated blocks, such as transformers.

    ``Blocks()`` gives all blocks the same widths: few dimensions, and a network that one global config describes.
    ``Blocks(alike=False, shared=False)`` gives each block widths of its own, and leaves those that blocks share: what a
    config with widths by layer can say, such as ``per_layer_config`` of transformers.

    Attributes:
        channels: Settings of the options.
        alike: One dimension for all groups of one kind: equal shapes under the same names but for numbers.
        shared: Search widths that several blocks share, too, such as that of the residual stream.

    Raises:
        ValueError: If a setting is of another kind.
    """

    channels: Channels = field(default_factory=Channels)
    alike: bool = True
    shared: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.channels, Channels):
            raise ValueError(f"channels must be Channels(...), got {shown(self.channels)}")
        object.__setattr__(self, "alike", flag("alike", self.alike))
        object.__setattr__(self, "shared", flag("shared", self.shared))

    @property
    def criterion(self) -> str | Criterion:
        """Criterion that ranks the units of each group."""
        return self.channels.criterion

    @property
    def needs_latency(self) -> bool:
        """Return whether widths follow the measured latency."""
        return self.channels.needs_latency

    def with_latency(self, latency: Latency, structure: Structure) -> Blocks:
        """Fill in the right edges of the steps of a latency."""
        return replace(self, channels=self.channels.with_latency(latency, structure))

    def why_no_less(self) -> str:
        """Name the settings that keep widths from being smaller, with their values."""
        return f"{self.channels.why_no_less()} in Blocks(alike={self.alike}, shared={self.shared})"

    def finer(self) -> Blocks:
        """Halve the step."""
        return replace(self, channels=self.channels.finer())

    def bind(self, structure: Structure, order: Mapping[str, Sequence[int]]) -> ChannelSpace | Choices:
        """Lay the space out for a model.

        Raises:
            NothingToPruneError: If no group inside a block has a choice left.
            ValueError: As `Channels.bind`.
        """
        space = self.channels.bind(structure, order)
        left_alone = frozenset() if self.shared else shared_by_blocks(structure.groups)
        dimensions = tuple(d for d in space.dimensions if d.name not in left_alone)
        if not dimensions:
            raise NothingToPruneError(
                f"space has nothing to search: all {len(space.dimensions)} groups with a second option are shared by "
                f"several blocks; use Blocks(shared=True) or Channels()"
            )
        if not self.alike:
            return ChannelSpace(dimensions, space.groups, {d.name: space.order[d.name] for d in dimensions})
        options = {dimension.name: dimension.options for dimension in dimensions}
        kinds: dict[Hashable, list[str]] = defaultdict(list)
        for group in structure.groups:
            if group.name in options:
                kinds[kind_of(group)].append(group.name)
        choices: dict[str, Choice] = {}
        for names in kinds.values():
            widths = sorted(set.intersection(*(set(options[name]) for name in names)), reverse=True)
            common = starred(names[0]) if len(names) > 1 else names[0]
            name = names[0] if common in choices else common
            choices[name] = Choice([dict.fromkeys(names, width) for width in widths], labels=widths)
        return Choices.of(structure, order, choices)


def starred(name: str) -> str:
    """Name with a star in place of every component that is a number.

    Example:
        >>> starred("layers.12.mlp.up")
        'layers.*.mlp.up'
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def kind_of(group: Group) -> Hashable:
    """Size and slots of a group, which those of the same place in other blocks share."""
    slots = sorted((starred(slot.tensor), slot.dim, slot.indices.shape[1]) for slot in group.slots)
    return group.size, group.multiple, tuple(slots)


def shared_by_blocks(groups: Sequence[Group]) -> frozenset[str]:
    """Names of the groups that touch several blocks of a list; blocks have groups of one kind inside."""
    inside: dict[tuple[Hashable, str], set[str]] = defaultdict(set)
    for group in groups:
        for block in set.intersection(*(_blocks(slot.tensor) for slot in group.slots)):
            inside[kind_of(group), block.rpartition(".")[0]].add(block)
    repeated = {block for blocks in inside.values() if len(blocks) > 1 for block in blocks}
    found = set()
    for group in groups:
        touched: dict[str, set[str]] = defaultdict(set)
        for slot in group.slots:
            for block in repeated & _blocks(slot.tensor):
                touched[block.rpartition(".")[0]].add(block)
        if any(len(blocks) > 1 for blocks in touched.values()):
            found.add(group.name)
    return frozenset(found)


def _blocks(tensor: str) -> set[str]:
    """Names of the numbered modules that a tensor lies in."""
    parts = tensor.split(".")
    return {".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdecimal()}
