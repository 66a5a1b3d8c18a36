"""Widths of repeated blocks: which groups are of one kind, and which ones blocks share."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import NothingToPruneError
from autoprune.protocols import SearchSpace
from autoprune.search_spaces import Blocks, Channels
from autoprune.search_spaces.blocks import shared_by_blocks
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.testing.contracts import SpaceContract
from tests.candidates import uniform_order
from zoo import ZOO

HALF = Channels(options=(1.0, 0.5))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.down(self.up(x).relu())


class Transformer(nn.Module):
    """Three blocks, the last one wider; the residual stream can shrink."""

    def __init__(self, blocks: tuple[int, ...] = (12, 12, 20)) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block(width) for width in blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


@cache
def structure() -> Structure:
    return analyse(Example(Transformer().eval(), (torch.ones(2, 3, 5),)))


def options(found: Structure, settings: Blocks) -> dict[str, tuple[object, ...]]:
    return {d.name: d.options for d in settings.bind(found, uniform_order(found)).dimensions}


class TestAlike(SpaceContract):
    def make_space(self) -> SearchSpace:
        return Blocks(Channels(step=0.25), shared=True).bind(structure(), uniform_order(structure()))

    def make_structure(self) -> Structure:
        return structure()


class TestEachBlockByItself(SpaceContract):
    def make_space(self) -> SearchSpace:
        return Blocks(Channels(step=0.25), alike=False).bind(structure(), uniform_order(structure()))

    def make_structure(self) -> Structure:
        return structure()


def test_groups_of_one_kind_are_one_dimension():
    assert options(structure(), Blocks(HALF)) == {
        "blocks.*.attention": (4, 2),
        "blocks.*.up": (12, 6),
        "blocks.2.up": (20, 10),
    }


def test_all_blocks_get_the_width_of_their_dimension():
    space = Blocks(HALF).bind(structure(), uniform_order(structure()))
    kept = space.pruning([1, 0, 0]).kept
    assert {name: len(units) for name, units in kept.items()} == dict.fromkeys(
        ("blocks.0.attention", "blocks.1.attention", "blocks.2.attention"), 2
    )


def test_each_block_has_widths_of_its_own_and_the_residual_stream_stays():
    names = set(options(structure(), Blocks(alike=False)))
    assert names == {f"blocks.{i}.{part}" for i in range(3) for part in ("attention", "up")}
    assert shared_by_blocks(structure().groups) == {"first"}
    assert set(options(structure(), Blocks(alike=False, shared=True))) == names | {"first"}


def test_settings_of_channels_count():
    assert options(structure(), Blocks(Channels(options=(1.0, 0.5), ignore=["blocks.0.up", "*.attention"]))) == {
        "blocks.1.up": (12, 6),
        "blocks.2.up": (20, 10),
    }
    narrow = Channels(step=0.25, bounds={"blocks.0.up": (0.5, 0.8)}, ignore=["*.attention"])
    assert options(structure(), Blocks(narrow))["blocks.*.up"] == (12, 9, 6)
    assert Blocks(narrow).finer() == Blocks(narrow.finer())


def test_blocks_of_a_residual_network_are_found():
    found = analyse(Example(ZOO["resnet20"].build(), ZOO["resnet20"].inputs()))
    shared = shared_by_blocks(found.groups)
    inside = {group.name for group in found.groups} - shared
    assert shared
    assert inside
    assert all(name.rpartition(".")[2] == "conv1" for name in inside - {"conv1"})


def test_layers_in_a_row_are_no_blocks():
    found = analyse(Example(nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))), (torch.ones(2, 6),)))
    assert shared_by_blocks(found.groups) == frozenset()
    assert options(found, Blocks(HALF)) == {"*": (6, 3)}


def test_where_all_is_shared_there_is_nothing_to_search():
    only = Channels(ignore=["*.attention", "*.up", "*.down"])
    with pytest.raises(NothingToPruneError):
        options(structure(), Blocks(only))


@pytest.mark.parametrize("given", [{"channels": "channels"}, {"alike": 1}, {"shared": None}])
def test_settings_of_another_kind_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        Blocks(**given)
