"""Errors that the checks catch, and their behaviour where they cannot run."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.errors import StructureCheckError
from autoprune.structure import analysis
from autoprune.structure.analysis import analyse, best_choices
from autoprune.structure.checks.checks import Checker
from autoprune.structure.checks.values import cycle
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.structure.tracing.trace import trace
from autoprune.structure.units import find_units
from tests.small_networks import (
    IMAGE,
    Net,
    assert_right,
    branches,
    conv,
    grouped,
    known,
    residual,
    slots_of,
)
from zoo import ZOO, draw, settled


def gates() -> nn.Module:
    """A gate from two halves, a shuffle before a grouped convolution, and a tied layer."""

    def forward(s: Net, x: Tensor) -> Tensor:
        left, right = s.a(x).chunk(2, 1)
        x = F.channel_shuffle(left * right.sigmoid(), 2)
        return s.head(s.tied(s.tied(s.grouped(x))).sum((2, 3)))

    layers = {"a": conv(3, 16), "grouped": conv(8, 8, groups=2), "tied": conv(8, 8, 1), "head": nn.Linear(8, 3)}
    return Net(forward, **layers)


def analysed_without_an_edge(
    model: nn.Module, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Structure]]:
    """The operation of each coupling, and the structure found by an analysis without that coupling."""
    flow, _ = best_choices(trace(Example(model, args)))
    for i, edge in enumerate(flow.edges):
        broken = dataclasses.replace(flow, edges=flow.edges[:i] + flow.edges[i + 1 :])
        monkeypatch.setattr(analysis, "best_choices", lambda record, flow=broken: (flow, find_units(flow)))
        yield flow.record.ops[edge.op].where(), analyse(Example(model, args))


@pytest.mark.slow
@pytest.mark.parametrize("make", [branches, gates], ids=lambda make: make.__name__)
def test_the_checks_catch_every_coupling_that_is_forgotten_and_matters(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
):
    model, args, whole = known(make)
    assert_right(model, args, whole)
    for _, structure in analysed_without_an_edge(model, args, monkeypatch):
        assert_right(model, args, structure)
    assert couplings_that_matter(model, args) > 5, "a coupling that does not matter cannot be caught"


def couplings_that_matter(model: nn.Module, args: tuple[Any, ...]) -> int:
    """Edges without which groups fall apart; a tie, or a check, must make up for each."""
    flow, units = best_choices(trace(Example(model, args)))
    broken = (dataclasses.replace(flow, edges=flow.edges[:i] + flow.edges[i + 1 :]) for i in range(len(flow.edges)))
    return sum(len(find_units(each).groups) != len(units.groups) for each in broken)


@pytest.mark.slow
def test_the_checks_catch_forgotten_couplings_in_16_bits_too(monkeypatch: pytest.MonkeyPatch):
    model, (x,) = settled(residual, (IMAGE,)).bfloat16(), draw((IMAGE,))
    args = (x.bfloat16(),)
    whole = analyse(Example(model, args))
    assert [group.size for group in whole.groups] == [8]
    for where, structure in analysed_without_an_edge(model, args, monkeypatch):  # frozen, or tied again
        assert structure.groups == () or slots_of(structure) == slots_of(whole), where


class Deadly(nn.Module):
    """Ends the process when it is narrower than it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.a.weight.shape[0] < 6:
            os._exit(3)
        out: Tensor = self.b(self.a(x).relu())
        return out


@pytest.mark.slow
def test_isolated_checks_find_the_same_and_survive_a_model_that_kills_its_process():
    model, args = known(grouped)[:2]
    alone = analyse(Example(model, args), checks="isolated")
    assert [(group.name, group.size) for group in alone.groups] == [
        (group.name, group.size) for group in analyse(Example(model, args)).groups
    ]
    with pytest.raises(StructureCheckError, match="killed its process"):
        analyse(Example(Deadly(), (torch.randn(2, 4),)), checks="isolated")


@pytest.mark.parametrize("size", [2, 3, 4, 17])
def test_the_permutation_check_moves_every_unit(size: int):
    for seed in range(20):
        moved = cycle(size, np.random.default_rng(seed))
        assert sorted(moved) == list(range(size))
        assert (moved != np.arange(size)).all()


@pytest.mark.slow
def test_a_wrong_tie_of_few_units_is_seen_whatever_is_drawn():
    """Weights of a batch norm without their coupling are tied to the units of a channel shuffle, in a wrong order."""
    entry = ZOO["shufflenet_v2"]
    example = Example(entry.build(), entry.inputs())
    whole, _ = best_choices(trace(example))
    made_by = [whole.record.ops[edge.op].where() for edge in whole.edges]
    first = made_by.index("native_batch_norm in 4.side.1.1")
    flow = dataclasses.replace(whole, edges=whole.edges[:first] + whole.edges[first + 1 :])
    for seed in range(6):
        checker = Checker(flow, example, (), seed=seed)
        assert checker.sizes.settle() or checker.error({}) is not None, seed
