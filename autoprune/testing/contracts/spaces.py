"""Contract of search spaces."""

# ruff: noqa: D102  (the names of the tests are sentences)

from __future__ import annotations

import json

import numpy as np

from autoprune.costs import make_costs
from autoprune.protocols import ChoosesWidths, SearchSpace
from autoprune.search_spaces import require_registered, space_from_json
from autoprune.structure.structure import Structure
from autoprune.testing.contracts.shared import draw


class SpaceContract:
    """Contract of spaces: the properties that the search relies on."""

    def make_space(self) -> SearchSpace:
        """Return a space of at least one dimension."""
        raise NotImplementedError

    def make_structure(self) -> Structure:
        """Return the structure that the space was made for."""
        raise NotImplementedError

    def test_sizes_count_the_options(self) -> None:
        space = self.make_space()
        assert space.sizes.dtype == np.int64
        assert space.sizes.tolist() == [len(dimension.options) for dimension in space.dimensions]
        assert (space.sizes >= 1).all()

    def test_option_zero_is_dense(self) -> None:
        space, structure = self.make_space(), self.make_structure()
        dense = np.zeros(len(space.sizes), dtype=np.int64)
        widths = space.widths(dense[None])[0].tolist()
        assert widths == structure.dense[: len(widths)].tolist()
        assert space.zeroed(dense[None]).tolist() == [0]
        edit = structure.edit(space.pruning(dense.tolist()))
        assert not edit.slices
        assert not edit.zeroed
        assert not edit.dropped

    def test_later_options_of_ordered_dimensions_cost_fewer_nonzero_parameters(self) -> None:
        space = self.make_space()
        cost = make_costs(self.make_structure(), space)["nonzero_params"]
        for j, dimension in enumerate(space.dimensions):
            if dimension.ordered:
                ladder = np.zeros((len(dimension.options), len(space.sizes)), dtype=np.int64)
                ladder[:, j] = np.arange(len(ladder))
                assert (np.diff(space.widths(ladder), axis=0) <= 0).all(), dimension.name
                assert (np.diff(cost(ladder)) < 0).all(), dimension.name

    def test_canonical_is_idempotent_and_stays_in_the_space(self) -> None:
        space = self.make_space()
        canonical = space.canonical(draw(space))
        assert canonical.dtype == np.int64
        assert ((canonical >= 0) & (canonical < space.sizes)).all()
        np.testing.assert_array_equal(space.canonical(canonical), canonical)
        np.testing.assert_array_equal(space.widths(canonical), space.widths(draw(space)))
        np.testing.assert_array_equal(space.zeroed(canonical), space.zeroed(draw(space)))

    def test_decode_names_every_dimension_with_one_of_its_options(self) -> None:
        space = self.make_space()
        for candidate in space.canonical(draw(space)):
            decoded = space.decode(candidate.tolist())
            assert list(decoded) == [dimension.name for dimension in space.dimensions]
            for dimension, option in zip(space.dimensions, candidate, strict=True):
                assert decoded[dimension.name] == dimension.options[option]

    def test_json_restores_an_equal_space(self) -> None:
        space = self.make_space()
        require_registered(space)
        restored = space_from_json(json.loads(json.dumps(space.to_json())))
        assert type(restored) is type(space)
        assert restored.to_json() == space.to_json()
        assert restored.dimensions == space.dimensions
        candidates = draw(space)
        np.testing.assert_array_equal(restored.widths(candidates), space.widths(candidates))
        np.testing.assert_array_equal(restored.zeroed(candidates), space.zeroed(candidates))
        assert restored.pruning(candidates[0].tolist()) == space.pruning(candidates[0].tolist())

    def test_choices_of_widths_are_all_that_a_candidate_changes(self) -> None:
        space = self.make_space()
        if not isinstance(space, ChoosesWidths):
            return
        groups, widths = space.choices
        candidates = draw(space)
        chosen = np.flatnonzero(groups >= 0)
        candidates[:, groups < 0] = 0
        expected = np.tile(space.widths(np.zeros((1, len(space.sizes)), dtype=np.int64)), (len(candidates), 1))
        expected[:, groups[chosen]] = widths[chosen, candidates[:, chosen]]
        np.testing.assert_array_equal(space.widths(candidates), expected)
        assert len(set(groups[chosen].tolist())) == len(chosen)
        assert not space.zeroed(candidates).any()

    def test_what_is_kept_and_zeroed_agrees_with_the_numbers(self) -> None:
        space, structure = self.make_space(), self.make_structure()
        groups = {group.name: group.size for group in structure.groups}
        candidates = space.canonical(draw(space))
        widths, zeroed = space.widths(candidates), space.zeroed(candidates)
        assert widths.dtype == zeroed.dtype == np.float64
        assert len(widths) == len(candidates)
        assert widths.shape[1] in (len(groups), len(structure.dense))  # columns of branches are left out by many
        assert zeroed.shape == (len(candidates),)
        for candidate, row, zeros in zip(candidates, widths, zeroed, strict=True):
            pruning = space.pruning(candidate.tolist())
            structure.edit(pruning)  # refuses names and numbers that the model does not have
            kept = pruning.kept
            assert sum(pruning.zeroed.values()) == zeros
            for units in kept.values():
                assert list(units) == sorted(set(units))
            assert [len(kept.get(name, range(size))) for name, size in groups.items()] == row[: len(groups)].tolist()
            gone = structure.presence.closed(pruning.dropped)
            present = [branch.name not in gone for branch in structure.branches]
            assert row[len(groups) :].tolist() in ([], present)

    def test_it_describes_itself_in_one_line(self) -> None:
        description = self.make_space().describe()
        assert description.strip()
        assert "\n" not in description
