"""Contract of rules for operations."""

# ruff: noqa: D102  (the names of the tests are sentences)

from __future__ import annotations

from dataclasses import replace

import numpy as np

from autoprune.costs import StructuralCosts
from autoprune.protocols import Pruning
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import build
from autoprune.structure.units import Group


class RuleContract:
    """Contract of a rule: a network with the operation between two layers is pruned, and rightly so."""

    def make_example(self) -> Example:
        """Return a network whose layers the operation connects, with two samples for it; a new one at every call."""
        raise NotImplementedError

    def test_units_pass_through_the_operation_and_the_checks(self) -> None:
        assert analyse(self.make_example(), checks="strict").groups

    def test_costs_of_pruned_networks_are_those_that_are_counted_on_them(self) -> None:
        example = self.make_example()
        structure = analyse(example)
        costs = StructuralCosts(structure)
        for share in (0.75, 0.5, 0.0):
            kept = {group.name: _last_units(group, share) for group in structure.groups}
            built = build(example.model, structure.edit(Pruning(kept)))
            widths = np.array([[len(units) for units in kept.values()]], dtype=np.float64)
            found = analyse(replace(example, model=built))
            counted = StructuralCosts(found).flops(found.sizes[None].astype(np.float64))
            assert costs.flops(widths).tolist() == counted.tolist()
            assert costs.params(widths).tolist() == [sum(parameter.numel() for parameter in built.parameters())]


def _last_units(group: Group, share: float) -> tuple[int, ...]:
    """Units at the end of a group: about a share of them, in a number that the group may keep."""
    count = max(int(share * group.size) // group.multiple, 1) * group.multiple
    return tuple(range(group.size - count, group.size))
