"""Spaces written out: every mistake is named, and widths follow what groups need."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.protocols import SearchSpace
from autoprune.search_spaces import Choice, Choices
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.testing.contracts import SpaceContract
from tests.candidates import uniform_order

ORDER = {"a": (2, 0, 1), "b": (1, 0), "c": (0, 1)}


def grouped() -> Structure:
    """Three groups; two of them are tied by a grouped convolution."""
    model = nn.Sequential(
        nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 8, 1), nn.Conv1d(8, 8, 1, groups=2), nn.Conv1d(8, 2, 1)
    )
    return analyse(Example(model.eval(), (torch.ones(2, 3, 5),)))


class TestTwoDimensions(SpaceContract):
    def make_space(self) -> SearchSpace:
        structure = grouped()
        names = [group.name for group in structure.groups]
        sizes = {group.name: group.size for group in structure.groups}
        dimensions = {
            "first": Choice([{names[0]: sizes[names[0]]}, {names[0]: 2}, {names[0]: 1}], labels=("all", "half", "one")),
            "others": Choice([{name: sizes[name] for name in names[1:]}, dict.fromkeys(names[1:], 2)]),
        }
        return Choices.of(structure, uniform_order(structure), dimensions)

    def make_structure(self) -> Structure:
        return grouped()


def test_the_most_important_units_stay_and_groups_without_a_dimension_stay_whole():
    space = Choices(ORDER, {"x": Choice([{"a": 3, "c": 2}, {"a": 2, "c": 2}, {"a": 1, "c": 1}])})
    assert space.pruning([0]).kept == {}
    assert space.pruning([1]).kept == {"a": (0, 2)}
    assert space.pruning([2]).kept == {"a": (2,), "c": (0,)}
    np.testing.assert_array_equal(space.widths(np.array([[0], [1], [2]])), [[3, 2, 2], [2, 2, 2], [1, 2, 1]])
    assert space.describe() == "1 dimension with 3 options, 3 candidates"


@pytest.mark.parametrize(
    ("dimensions", "said"),
    [
        ({"x": Choice([])}, "dimension 'x' must have options"),
        ({"x": Choice([{"a": 3}, {}])}, "dimension 'x' must have options"),
        (
            {"x": Choice([{"a": 2}, {"a": 1}])},
            "option 0 of 'x' must keep 3, because option 0 is dense",
        ),
        ({"x": Choice([{"a": 3}, {"a": 0}])}, "option 1 of 'x' must keep 1 to 3 units of 'a', got 0"),
        ({"x": Choice([{"z": 3}, {"z": 1}])}, "option 0 of 'x' must name groups of the model, got 'z'"),
        ({"x": Choice([{"a": 3}, {"b": 1}])}, "option 1 of 'x' must name the groups of option 0"),
        ({"x": Choice([{"a": 3}, {"a": 1}], labels=("all",))}, "labels of 'x' must be as many as its 2 options, got 1"),
        ({"x": Choice([{"a": 3}]), "y": Choice([{"a": 3}])}, "group 'a' must be in one dimension, is in 'x' and 'y'"),
    ],
)
def test_every_mistake_is_named(dimensions, said):
    with pytest.raises(ValueError, match=said):
        Choices(ORDER, dimensions)


def test_widths_are_raised_to_the_multiples_that_groups_need():
    structure = SimpleNamespace(groups=[SimpleNamespace(name="a", multiple=2), SimpleNamespace(name="b", multiple=1)])
    order = {"b": [0, 1, 2], "a": [3, 1, 0, 2]}
    space = Choices.of(structure, order, {"x": Choice([{"a": 4, "b": 3}, {"a": 1, "b": 1}])})
    np.testing.assert_array_equal(space.widths(np.array([[0], [1]])), [[4, 3], [2, 1]])
    assert space.pruning([1]).kept == {"a": (1, 3), "b": (0,)}


def test_a_damaged_order_is_refused():
    data = Choices(ORDER, {"x": Choice([{"a": 3}, {"a": 1}])}).to_json()
    data["order"]["b"] = [1, 1]
    with pytest.raises(ValueError, match=r"space.order\['b'\] must have every unit"):
        Choices.from_json(data)
