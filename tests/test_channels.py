"""The channel space: which widths it offers, what it leaves alone, and what it refuses."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from torch import nn

from autoprune.errors import NothingToPruneError
from autoprune.protocols import SearchSpace
from autoprune.search_spaces.channels import Channels, ChannelSpace
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.testing.contracts import SpaceContract
from tests.candidates import uniform_order
from zoo import ZOO, draw


@cache
def structure() -> Structure:
    """Groups named body.first (16 units), body.second (10) and tail.0 (7)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            body = nn.ModuleDict({"first": nn.Linear(4, 16), "second": nn.Linear(16, 10)})
            self.body, self.tail = body, nn.Sequential(nn.Linear(10, 7), nn.Linear(7, 3))

        def forward(self, x: Any) -> Any:
            return self.tail(self.body["second"](self.body["first"](x).relu()).relu())

    return analyse(Example(Net(), draw(((4,),))))


def bound(**settings: Any) -> ChannelSpace:
    return Channels(**settings).bind(structure(), uniform_order(structure()))


def options(**settings: Any) -> dict[str, tuple[int, ...]]:
    return {dimension.name: dimension.options for dimension in bound(**settings).dimensions}


def eighths(**settings: Any) -> dict[str, tuple[int, ...]]:
    return options(**{"step": 0.125, "min_fraction": 0.125, **settings})


class TestChannelSpace(SpaceContract):
    def make_space(self) -> SearchSpace:
        return bound(ignore=["tail.*"])

    def make_structure(self) -> Structure:
        return structure()


class TestChannelSpaceOfAResNet(SpaceContract):
    def make_space(self) -> SearchSpace:
        return Channels(step=2, round_to=2).bind(self.make_structure(), uniform_order(self.make_structure()))

    @staticmethod
    @cache
    def make_structure() -> Structure:
        return analyse(Example(ZOO["resnet20"].build(), ZOO["resnet20"].inputs()))


class TestOptions:
    def test_equal_fractions_of_each_group_are_the_default(self):
        assert options() == {
            "body.first": tuple(range(16, 0, -1)),
            "body.second": tuple(range(10, 0, -1)),  # steps of 0.625 units: no width twice
            "tail.0": (7, 6, 5, 4, 3, 2, 1),
        }

    def test_steps_that_fall_between_units_round_half_to_even(self):
        assert eighths()["body.second"] == (10, 9, 8, 6, 5, 4, 2)

    def test_a_step_in_units(self):
        assert options(step=4, min_fraction=0.2)["body.first"] == (16, 12, 8, 4)
        assert options(step=4, min_fraction=0.2)["tail.0"] == (7, 3)

    def test_fractions_by_hand(self):
        assert options(options=(1.0, 0.5, 0.3)) == {
            "body.first": (16, 8, 5),
            "body.second": (10, 5, 3),
            "tail.0": (7, 4, 2),
        }

    def test_widths_are_multiples_of_round_to_but_for_the_dense_one(self):
        assert options(round_to=4) == {"body.first": (16, 12, 8, 4), "body.second": (10, 8, 4), "tail.0": (7, 4)}

    def test_a_minimum_width_and_a_minimum_fraction_both_hold(self):
        assert eighths(min_width=6) == {
            "body.first": (16, 14, 12, 10, 8, 6),
            "body.second": (10, 9, 8, 6),
            "tail.0": (7, 6),
        }
        assert eighths(min_fraction=0.5)["body.second"] == (10, 9, 8, 6, 5)
        assert eighths(min_fraction=0.5, min_width=6)["tail.0"] == (7, 6)

    def test_bounds_hold_for_groups_that_match(self):
        found = eighths(bounds={"body.*": (0.5, 0.8)})
        assert found["body.first"] == (16, 12, 10, 8)
        assert found["body.second"] == (10, 8, 6, 5)
        assert found["tail.0"] == eighths()["tail.0"]

    def test_bounds_may_go_below_the_minimum_fraction(self):
        assert eighths(min_fraction=0.5, bounds={"body.first": (0.25, 1.0)})["body.first"] == (16, 14, 12, 10, 8, 6, 4)

    def test_the_tightest_of_several_bounds_holds(self):
        assert eighths(bounds={"body.*": (0.25, 1.0), "*first": (0.5, 0.75)})["body.first"] == (16, 12, 10, 8)

    @pytest.mark.parametrize("pattern", ["body.first", "body.f*", "*.first"])
    def test_groups_of_ignored_modules_are_left_out(self, pattern: str):
        assert set(options(ignore=[pattern])) == {"body.second", "tail.0"}

    def test_ignoring_a_module_spares_every_group_that_touches_it(self):
        assert set(options(ignore=["body.second"])) == {"tail.0"}  # body.first ends in its columns

    def test_a_group_without_a_second_option_is_no_dimension(self):
        assert set(options(round_to=8)) == {"body.first", "body.second"}


class TestWhatCandidatesMean:
    def test_the_most_important_units_stay_in_their_own_order(self):
        order = uniform_order(structure()) | {"tail.0": (6, 2, 0, 1, 5, 4, 3)}
        space = Channels(step=1).bind(structure(), order)
        candidate = np.zeros(len(space.sizes), dtype=np.int64)
        candidate[-1] = 4
        assert space.pruning(candidate.tolist()).kept == {"tail.0": (0, 2, 6)}
        assert space.decode(candidate.tolist()) == {"body.first": 16, "body.second": 10, "tail.0": 3}
        assert space.widths(candidate[None]).tolist() == [[16, 10, 3]]

    def test_groups_without_a_dimension_keep_their_width(self):
        space = bound(ignore=["body.second"])
        assert space.widths(np.array([[0], [6]])).tolist() == [[16, 10, 7], [16, 10, 1]]


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"step": 0}, r"step must be a fraction in \(0, 1\) or a whole number of units >= 1, got 0"),
            ({"step": 1.5}, r"got 1.5"),
            ({"step": -0.5}, r"got -0.5"),
            ({"round_to": 0}, "round_to must be an integer of at least 1, or 'auto', got 0"),
            ({"round_to": 2.5}, "round_to must be an integer of at least 1, or 'auto', got 2.5"),
            ({"round_to": None}, "round_to must be an integer of at least 1, or 'auto', got None"),
            ({"min_width": "4"}, "min_width must be an integer of at least 1, got '4'"),
            ({"min_fraction": 0.0}, r"min_fraction must be in \(0, 1\], got 0.0"),
            ({"options": ()}, r"options must be fractions falling from 1.0 to above 0, got \(\)"),
            ({"options": (0.5, 1.0)}, r"falling from 1.0"),
            ({"options": (1.0, 0.5, 0.5)}, r"falling from 1.0"),
            ({"options": (0.9, 0.5)}, r"falling from 1.0"),
            ({"options": (1.0, 0.0)}, r"falling from 1.0 to above 0"),
            ({"bounds": {"head": (0.5, 0.2)}}, r"bounds\['head'\] must be \(least, most\) .* got \(0.5, 0.2\)"),
            ({"bounds": {"head": (0.0, 1.0)}}, r"0 < least"),
            ({"bounds": {"head": (0.5,)}}, r"must be \(least, most\)"),
            ({"ignore": (name for name in ["head"])}, "ignore must be a list of names or globs, got <generator"),
            ({"options": (x for x in (1.0, 0.5))}, "falling from 1.0 to above 0, got <generator"),
            ({"ignore": "head"}, "ignore must be a list of names or globs, got the string 'head'"),
        ],
    )
    def test_settings_out_of_range(self, settings: dict[str, Any], message: str):
        with pytest.raises(ValueError, match=message):
            Channels(**settings)

    @pytest.mark.parametrize("settings", [{"ignore": ["haed.*"]}, {"bounds": {"haed.*": (0.5, 1.0)}}])
    def test_patterns_that_match_nothing(self, settings: dict[str, Any]):
        with pytest.raises(
            ValueError, match=rf"{next(iter(settings))} has 'haed.\*', which matches no module; there are body"
        ):
            bound(**settings)

    def test_a_pattern_may_match_a_module_that_stays_anyway(self):
        assert set(options(ignore=["tail.1"])) == {"body.first", "body.second"}

    def test_nothing_left_to_search(self):
        with pytest.raises(NothingToPruneError, match=r"none of 3 groups has a second option .* loosen ignore="):
            bound(ignore=["*"])
