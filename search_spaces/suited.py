"""The space that suits a model: widths and depth, as its structure offers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoprune.errors import NothingToPruneError
from autoprune.importance.criteria import Criterion
from autoprune.protocols import SearchSpace
from autoprune.search_spaces.blocks import Blocks, shared_by_blocks
from autoprune.search_spaces.channels import Channels
from autoprune.search_spaces.depth import Depth
from autoprune.search_spaces.product import Product
from autoprune.search_spaces.protocol import Settings
from autoprune.structure.structure import Structure

_MATRIX = 2


@dataclass(frozen=True)
class Suited:
    """Settings of ``space="auto"``: the widths that suit a model, with its depth where it has branches to drop.

    A model of repeated blocks without convolutions, such as a transformer, has its heads and feed-forward widths
    searched, each block by itself, and its residual stream left as it is: one unit less there takes a part of every
    block. Other models have all their channels searched. `parts` says what was chosen, as the note of a result does.

    Attributes:
        criterion: Ranks the units of a group, as in `Channels`.
    """

    criterion: str | Criterion = "auto"

    def bind(self, structure: Structure, order: Mapping[str, Sequence[int]]) -> SearchSpace:
        """Lay the space out for a model.

        Raises:
            NothingToPruneError: If the model has neither groups nor branches with a choice.
        """
        parts = self.parts(structure, order)
        return parts[0].bind(structure, order) if len(parts) == 1 else Product(*parts).bind(structure, order)

    def parts(self, structure: Structure, order: Mapping[str, Sequence[int]]) -> tuple[Settings, ...]:
        """Settings that suit a model: of its widths, of its depth, or of both.

        Raises:
            NothingToPruneError: If neither has a choice; that of the widths.
        """
        widths = Channels(criterion=self.criterion)
        stacked = all(len(shape) <= _MATRIX for shape in structure.weights.values())
        inside = Blocks(widths, alike=False)
        wanted: list[Settings] = [inside if stacked and shared_by_blocks(structure.groups) else widths, Depth()]
        found: list[Settings] = []
        missing: list[NothingToPruneError] = []
        for settings in wanted:
            try:
                settings.bind(structure, order)
                found.append(settings)
            except NothingToPruneError as error:
                missing.append(error)
        if not found:
            raise missing[0]
        return tuple(found)

    def why_no_less(self) -> str:
        """Name what keeps the smallest network from being smaller."""
        return "what space='auto' searches: give Channels(...), Depth(...) or their Product(...) yourself"
