"""Interfaces of the settings of a space, which a user gives before the model is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from autoprune.costs.latency.model import Latency
from autoprune.importance.criteria import Criterion
from autoprune.protocols import FloatArray, IntArray, SearchSpace
from autoprune.structure.structure import Structure


class Settings(Protocol):
    """Settings of a space, as a user gives them before the model is known."""

    @property
    def criterion(self) -> str | Criterion | None:
        """Criterion that ranks the units of each group; None where no unit is removed."""
        ...

    def bind(self, structure: Structure, order: Mapping[str, Sequence[int]]) -> SearchSpace:
        """Lay the space out for a model; `order` holds the units of each group by falling importance."""
        ...


@runtime_checkable
class FollowsLatency(Protocol):
    """Optional protocol: settings whose options depend on the measured latency of the model."""

    @property
    def needs_latency(self) -> bool:
        """Return whether these settings need it; the search then measures latency whatever its budget limits."""
        ...

    def with_latency(self, latency: Latency, structure: Structure) -> Settings:
        """Return equal settings that `bind` can lay out."""
        ...


@runtime_checkable
class NamesLimits(Protocol):
    """Optional protocol: settings that say what keeps networks from being smaller, for messages."""

    def why_no_less(self) -> str:
        """Name the settings that stop there, with their values."""
        ...


@runtime_checkable
class FollowsWidths(Protocol):
    """Optional protocol: spaces that set elements to zero, as a share of those that other spaces leave."""

    @property
    def zeroed_weights(self) -> tuple[str, ...]:
        """The weight whose elements each dimension sets to zero, length d; no two dimensions share one."""
        ...

    def zeros_among(self, candidates: IntArray, widths: FloatArray) -> IntArray:
        """Elements that each dimension sets to zero, shape (n, d), in a model of `widths` as ``SearchSpace.widths``.

        They do not fall along the options, and are 0 at option 0.
        """
        ...


@runtime_checkable
class Refines(Protocol):
    """Optional protocol: settings that know finer ones."""

    def finer(self) -> Settings:
        """Return settings whose options include these, with others half-way between them."""
        ...


@runtime_checkable
class Restricts(Protocol):
    """Optional protocol: spaces of which some options can be left out."""

    def restricted(self, options: Sequence[Sequence[int]]) -> SearchSpace:
        """Return the space with these options of each dimension alone, ascending indices, 0 among them."""
        ...


def needs_latency(settings: Settings) -> bool:
    """Return whether settings must be given a measured latency before they are bound."""
    return isinstance(settings, FollowsLatency) and settings.needs_latency


def finer(settings: Settings) -> Settings:
    """Return finer settings, or the same where they know none."""
    return settings.finer() if isinstance(settings, Refines) else settings


def with_latency(settings: Settings, latency: Latency, structure: Structure) -> Settings:
    """Give a measured latency to settings that need one; return others as they are."""
    if isinstance(settings, FollowsLatency) and settings.needs_latency:
        return settings.with_latency(latency, structure)
    return settings


def why_no_less(settings: Settings) -> str:
    """Name the settings that keep the smallest network of a space from being smaller."""
    return settings.why_no_less() if isinstance(settings, NamesLimits) else "the options of the space"
