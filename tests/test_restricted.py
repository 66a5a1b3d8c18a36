"""Spaces with fewer options, and rounds from coarse to fine."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.protocols import SearchSpace
from autoprune.search_spaces import Channels, Choice, Choices, Product, Restricted, Sparsity, refine
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.testing.contracts import SpaceContract
from tests import own_space
from tests.candidates import uniform_order
from tests.searching import quick

EIGHTHS = Channels(step=0.125)


@cache
def network() -> nn.Module:
    """Groups 0 and 2 of 16 units."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


@cache
def structure() -> Structure:
    return analyse(Example(network(), (torch.ones(2, 4),)))


def bound(settings: Restricted) -> SearchSpace:
    return settings.bind(structure(), uniform_order(structure()))


def options(settings: Restricted) -> dict[str, tuple[object, ...]]:
    return {dimension.name: dimension.options for dimension in bound(settings).dimensions}


class OfTheNetwork(SpaceContract):
    def make_structure(self) -> Structure:
        return structure()


class TestRestrictedChannels(OfTheNetwork):
    def make_space(self) -> SearchSpace:
        return bound(Restricted(EIGHTHS, {"0": [8, 4]}))


class TestARestrictedProduct(OfTheNetwork):
    def make_space(self) -> SearchSpace:
        product = Product(EIGHTHS, Sparsity(levels=(0, 0.3, 0.5, 0.9)))
        return bound(Restricted(product, {"2.weight": [0.5]}, [{"0": 8, "2.weight": 0.5}]))


def test_options_by_name_stay_with_the_dense_one():
    assert options(Restricted("channels", {"0": [8, 4]}))["0"] == (16, 8, 4)
    assert len(options(Restricted("channels", {"0": [8, 4]}))["2"]) == 16


def test_around_candidates_neighbours_stay_and_every_dimension_keeps_dense():
    front = [{"0": 10, "2": 16}, {"0": 8, "2": 4}]
    assert options(Restricted(EIGHTHS, around=front)) == {"0": (16, 12, 10, 8, 6), "2": (16, 14, 6, 4, 2)}
    assert options(Restricted(EIGHTHS, around=front, reach=0)) == {"0": (16, 10, 8), "2": (16, 4)}


def test_numbers_that_are_no_options_stand_for_the_nearest():
    assert options(Restricted(EIGHTHS, around=[{"0": 9.1}], reach=0))["0"] == (16, 10)


def test_dimensions_without_an_order_keep_all_options():
    choice = Choice([{"0": 16}, {"0": 4}, {"0": 8}], labels=("all", "few", "half"), ordered=False)

    class Own:
        criterion = "l2"

        def bind(self, structure, order):
            return Choices.of(structure, order, {"x": choice})

    assert options(Restricted(Own(), around=[{"x": "few"}]))["x"] == ("all", "few", "half")
    assert options(Restricted(Own(), {"x": ["half"]}))["x"] == ("all", "half")


class TestRefine:
    def test_the_step_is_halved_around_the_front_only(self):
        coarse = Channels(step=0.25)
        assert options(Restricted(coarse))["0"] == (16, 12, 8, 4, 1)
        fine = refine(coarse, [{"0": 8, "2": 16}])
        assert options(fine) == {"0": (16, 10, 8, 6), "2": (16, 14)}
        finest = refine(fine, [{"0": 6, "2": 14}])
        assert options(finest) == {"0": (16, 7, 6, 5), "2": (16, 15, 14, 13)}

    @pytest.mark.parametrize(
        ("settings", "finer"),
        [
            (Channels(step=6), Channels(step=3)),
            (Channels(step=5), Channels(step=1)),
            (Channels(step=1), Channels(step=1)),
            (Channels(options=(1.0, 0.5)), Channels(options=(1.0, 0.75, 0.5))),
            (Product(Channels(step=0.5), Sparsity()), Product(Channels(step=0.25), Sparsity())),
        ],
    )
    def test_finer_settings(self, settings, finer):
        assert settings.finer() == finer

    @pytest.mark.parametrize("step", [0.25, 0.3, 0.1, 5, 6, 9])
    def test_finer_options_include_the_coarse_ones(self, step):
        coarse = Channels(step=step, round_to=2)
        for name, widths in options(Restricted(coarse)).items():
            assert set(widths) <= set(options(Restricted(coarse.finer()))[name])

    def test_a_search_in_rounds_starts_from_the_front_of_the_last(self):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        data = (x, (x.sum(1) > 0).long())
        space = Channels(step=0.25)
        first = quick(network(), "flops <= 60%", data, space=space, trials=8)
        space = refine(space, first.front)
        second = quick(network(), "flops <= 60%", data, space=space, trials=16, start=first)
        begun = {tuple(sorted(trial.decoded.items())) for trial in second.trials}
        assert {tuple(sorted(trial.decoded.items())) for trial in first.front} <= begun
        assert {trial.decoded["0"] for trial in second.trials} - {16, 12, 8, 4, 1}


class TestRefusals:
    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"options": {"nine": [1]}}, r"options must name dimensions of the space, \['0', '2'\], got 'nine'"),
            ({"around": [{"nine": 1}]}, r"around must name dimensions of the space"),
            ({"options": {"0": ["half"]}}, r"options of '0' must be among \(16, .*\), got 'half'"),
        ],
    )
    def test_what_the_space_does_not_have(self, given, said):
        with pytest.raises(ValueError, match=said):
            bound(Restricted(EIGHTHS, **given))

    def test_what_is_not_a_dictionary(self):
        with pytest.raises(ValueError, match=r"around must name options by dimension, got \[\[1, 2\]\]"):
            Restricted(EIGHTHS, around=[[1, 2]])

    def test_a_space_that_cannot_be_restricted(self):
        own_space.register()
        for settings in (own_space.OwnUniform(), Product(own_space.OwnUniform())):
            with pytest.raises(ValueError, match="method restricted, but UniformSpace has none"):
                bound(Restricted(settings))

    @pytest.mark.parametrize("kept", [[[0]], [[0], [1]], [[0], [0, 16]], [[0, 2, 1], [0]], [[], [0]]])
    def test_indices_that_are_no_options(self, kept):
        with pytest.raises(ValueError, match="options"):
            bound(Restricted("channels")).restricted(kept)


def test_the_kinds_of_space_stay_what_they_are():
    assert type(bound(Restricted("channels"))) is type(EIGHTHS.bind(structure(), uniform_order(structure())))
    np.testing.assert_array_equal(bound(Restricted(EIGHTHS, {"0": [8]})).widths(np.array([[1, 7]])), [[8, 2]])
