"""Costs against PyTorch's own counters and hand counts, and costs that users add."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.costs import Candidates, StructuralCosts, make_costs
from autoprune.protocols import FloatArray, Pruning
from autoprune.search_spaces.channels import Channels, ChannelSpace
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from tests.candidates import random_pruning, uniform_order, widths_of
from tests.oracle import count_macs, count_params
from zoo import draw, settled


class Attention(nn.Module):
    """Batched matrix products of two widths that shrink apart, over positions of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(3, width, 1) for width in (6, 6, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        weights = torch.bmm(query.transpose(1, 2), key).tanh()
        return self.head(torch.baddbmm(value.transpose(1, 2), weights, value.transpose(1, 2)))


def sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


KINDS = {
    "convolutions": (
        sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 6, 5), nn.Conv2d(6, 2, 1)),
        (3, 16, 16),
    ),
    "grouped": (sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 2, 1)), (3, 9, 9)),
    "groups of several": (
        sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 24, 3, groups=3), nn.Conv2d(24, 2, 1)),
        (3, 9, 9),
    ),
    "transposed": (
        sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 4, stride=2), nn.ConvTranspose2d(6, 2, 2, stride=2)),
        (3, 9, 9),
    ),
    "transposed and grouped": (
        sequential(nn.Conv1d(3, 8, 3), nn.ConvTranspose1d(8, 16, 4, stride=2, groups=4), nn.Conv1d(16, 2, 1)),
        (3, 20),
    ),
    "linear": (sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 12, bias=False), nn.Linear(12, 3)), (10,)),
    "linear over positions": (sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5), nn.Linear(5, 2)), (7, 6)),
    "flattened": (sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(45, 7), nn.Linear(7, 2)), (3, 5, 5)),
    "matrix products": (Attention, (3, 4, 4)),
}


def analysed(make: Callable[[], nn.Module], shape: tuple[int, ...], batch: int = 2) -> tuple[nn.Module, Any, Structure]:
    model, args = settled(make, (shape,)), draw((shape,), batch)
    return model, args, analyse(Example(model, args), checks="strict")


@pytest.mark.parametrize(("make", "shape"), KINDS.values(), ids=KINDS)
def test_macs_and_parameters_equal_those_counted_on_the_built_model(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
):
    model, args, structure = analysed(make, shape)
    rng = np.random.default_rng(0)
    prunings = [Pruning(), *(random_pruning(structure, rng) for _ in range(8))]
    costs, widths = StructuralCosts(structure), widths_of(structure, prunings)
    built = [structure.build(model, pruning) for pruning in prunings]
    assert costs.flops(widths).tolist() == [count_macs(module, args) / 2 for module in built]
    assert costs.params(widths).tolist() == [count_params(module) for module in built]
    assert len(set(costs.flops(widths).tolist())) > 3


@pytest.mark.slow
@pytest.mark.parametrize("cost", ["flops", "params", "memory_bytes"])
def test_the_batch_of_the_trace_is_divided_out(cost: str):
    make, shape = KINDS["flattened"]
    structures = [analysed(make, shape, batch)[2] for batch in (1, 2, 5)]
    widths = np.array([[5, 7], [3, 2], [1, 1]], dtype=float)
    values = [getattr(StructuralCosts(structure, batch=3), cost)(widths).tolist() for structure in structures]
    assert values[0] == values[1] == values[2]


def test_a_number_before_the_samples_is_not_taken_for_them():
    class Scaled(nn.Sequential):
        def forward(self, scale: Tensor, x: Tensor) -> Tensor:
            return scale * super().forward(x)

    model = Scaled(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    structure = analyse(Example(model, (torch.tensor(2.0), torch.randn(3, 4))))
    assert StructuralCosts(structure).flops(structure.sizes[None].astype(float))[0] == 4 * 8 + 8 * 2


def test_memory_is_weights_buffers_and_the_two_largest_neighbours_at_the_stated_batch():
    model, _, structure = analysed(sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), (10,))
    state = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    # At the peak the input (10), which the caller holds, the linear layer's (8) and the batch norm's output (8) live.
    for batch in (1, 2, 7):
        memory = StructuralCosts(structure, batch=batch).memory_bytes(np.array([[8.0], [3.0]]))
        gone = 5 * (10 + 1 + 4 + 3) * 4  # a row and a bias; scale, shift, mean and variance; a column of the last layer
        assert memory.tolist() == [state + batch * 4 * 26, state - gone + batch * 4 * 16]


def test_costs_are_exact_integers_for_large_populations_in_blocks():
    _, _, structure = analysed(*KINDS["convolutions"])
    rng = np.random.default_rng(0)
    widths = rng.integers(1, structure.sizes + 1, size=(10_000, len(structure.sizes))).astype(float)
    costs = StructuralCosts(structure)
    for cost in (costs.flops, costs.params, costs.memory_bytes):
        values = cost(widths)
        assert values.shape == (10_000,)
        assert (values == np.round(values)).all()
        np.testing.assert_array_equal(values[5000:5003], cost(widths[5000:5003]))
        assert cost(widths[:0]).shape == (0,)


def test_every_unit_less_costs_less():
    _, _, structure = analysed(*KINDS["groups of several"])
    costs = StructuralCosts(structure)
    full = structure.sizes[None].astype(float)
    for cost in (costs.flops, costs.params, costs.memory_bytes):
        for i in range(len(structure.sizes)):
            fewer = full.copy()
            fewer[0, i] -= 1
            assert cost(fewer)[0] < cost(full)[0]


def test_a_batch_below_one_is_refused():
    _, _, structure = analysed(*KINDS["linear"])
    with pytest.raises(ValueError, match="cost_batch must be at least 1, got 0"):
        StructuralCosts(structure, batch=0)


@pytest.fixture(scope="module")
def space() -> tuple[Structure, ChannelSpace]:
    structure = analysed(*KINDS["linear"])[2]
    return structure, Channels(step=1, min_fraction=0.1).bind(structure, uniform_order(structure))


class TestCostsOfCandidates:
    def test_built_in_costs_see_the_widths_of_candidates(self, space: tuple[Structure, ChannelSpace]):
        candidates = np.array([[0, 0], [3, 10]])
        costs = make_costs(*space)
        assert set(costs) == {"flops", "params", "memory_bytes", "nonzero_params"}
        assert costs["nonzero_params"](candidates).tolist() == costs["params"](candidates).tolist()
        assert costs["flops"](candidates).tolist() == [10 * 8 + 8 * 12 + 12 * 3, 10 * 5 + 5 * 2 + 2 * 3]

    def test_a_cost_may_be_any_function_of_candidates(self, space: tuple[Structure, ChannelSpace]):
        def staircase(candidates: Candidates) -> FloatArray:
            return np.ceil(candidates.indices.sum(axis=1) % 5 / 2)

        costs = make_costs(*space, user={"energy_mj": staircase})
        assert costs["energy_mj"](np.array([[0, 0], [1, 2], [2, 2]])).tolist() == [0, 2, 2]

    def test_a_cost_sees_widths_and_options_by_name(self, space: tuple[Structure, ChannelSpace]):
        seen: list[Candidates] = []

        def cost(candidates: Candidates) -> FloatArray:
            seen.append(candidates)
            return candidates.widths["0"] * 10 + candidates.widths["2"]

        found = make_costs(*space, user={"energy_mj": cost})["energy_mj"](np.array([[0, 0], [3, 10]]))
        assert found.tolist() == [8 * 10 + 12, 5 * 10 + 2]
        assert {name: column.tolist() for name, column in seen[0].options.items()} == {"0": [8, 5], "2": [12, 2]}
        assert (len(seen[0]), seen[0].indices.tolist()) == (2, [[0, 0], [3, 10]])

    def test_a_name_that_is_taken_is_refused(self, space: tuple[Structure, ChannelSpace]):
        with pytest.raises(ValueError, match=r"must not redefine .*'memory_bytes'.*, got 'flops'; choose another"):
            make_costs(*space, user={"flops": lambda candidates: np.zeros(len(candidates))})

    @pytest.mark.parametrize(
        ("wrong", "got"),
        [
            (lambda candidates: 1.0, r"\(\)"),
            (lambda candidates: np.zeros((len(candidates), 1)), r"\(2, 1\)"),
            (lambda candidates: np.full(len(candidates), np.nan), r"\(2,\) with NaN"),
        ],
    )
    def test_a_result_of_another_shape_or_without_value_is_refused(
        self, space: tuple[Structure, ChannelSpace], wrong: Callable[[Candidates], Any], got: str
    ):
        costs = make_costs(*space, user={"energy_mj": wrong})
        with pytest.raises(ValueError, match=r"costs\['energy_mj'\] must return 2 finite numbers .* got shape " + got):
            costs["energy_mj"](np.zeros((2, 2), dtype=np.int64))
