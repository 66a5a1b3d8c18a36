"""Changes of costs by single changes, against costs that are counted from scratch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.costs import make_costs
from autoprune.costs.changes import LimitedCosts
from autoprune.optimizers import Problem, uniform_seeds
from autoprune.optimizers.knapsack.relinearise import front_of, spread_budgets
from autoprune.optimizers.knapsack.sensitivity import cost_shares
from autoprune.optimizers.level_switch import switch_levels
from autoprune.optimizers.random import draw, fill_up
from autoprune.protocols import FloatArray, IntArray
from autoprune.search_spaces import Channels, Depth, Product, Settings
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.study.layout import changes_of


class Residual(nn.Module):
    """Layers that all read and write one stream, next to a concatenation and to layers in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 1)) for _ in range(4)
        )
        self.branch = nn.Conv2d(12, 6, 1)
        self.mixed = nn.Conv2d(18, 10, 3, padding=1)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        x = self.depthwise(torch.relu(self.mixed(torch.cat([x, self.branch(x)], dim=1))))
        return self.head(x.mean((2, 3)))


def chain() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(12):
        layers += [nn.Linear(9, 9), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(9, 3))


NETWORKS = {
    "residual": (Residual, torch.ones(2, 3, 6, 6)),
    "chain": (chain, torch.ones(2, 9)),
}
SPACES: dict[str, Callable[..., Settings]] = {
    "channels": Channels,
    "channels and depth": lambda **settings: Product(Channels(**settings), Depth(min_kept=0.3)),
}
CASES = [("residual", "channels"), ("residual", "channels and depth"), ("chain", "channels")]
BUDGETS = {"flops": {"flops": 0.5}, "both": {"flops": 0.6, "params": 0.5}, "nonzero": {"nonzero_params": 0.4}}


def problem_of(network: str, space: str, budget: str, **settings: object) -> Problem:
    make, example = NETWORKS[network]
    structure = analyse(Example(make().eval(), (example,)), checks="on")
    bound = SPACES[space](**settings).bind(structure, {g.name: range(g.size) for g in structure.groups})
    names = tuple(BUDGETS[budget])
    changes = changes_of(structure, bound, names)
    assert changes is not None
    costs = LimitedCosts(make_costs(structure, bound), names, changes)
    dense = costs(np.zeros((1, len(bound.sizes)), dtype=np.int64))[0]
    return Problem(bound.sizes, names, dense * [*BUDGETS[budget].values()], costs, canonical=bound.canonical)


def recounting(problem: Problem) -> Problem:
    """The same problem with a cost that says nothing of changes."""
    return replace(problem, cost_function=lambda candidates: problem.cost_function(candidates))


def losses_of(problem: Problem) -> list[FloatArray]:
    rng = np.random.default_rng(3)
    return [np.cumsum(rng.random(size)) for size in problem.sizes]


@pytest.mark.slow
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("network", "space"), CASES)
@pytest.mark.parametrize("ignored", [(), ("0", "stem")], ids=["all", "some"])
def test_costs_after_a_change_are_those_counted_from_scratch(
    network: str, space: str, budget: str, ignored: tuple[str]
) -> None:
    problem = problem_of(
        network, space, budget, ignore=[name for name in ignored if hasattr(NETWORKS[network][0](), name)]
    )
    rng = np.random.default_rng(0)
    assert isinstance(problem.cost_function, LimitedCosts)
    position = problem.cost_function.at(rng.integers(problem.sizes, size=(5, len(problem.sizes))))
    assert position is not None
    for _ in range(20):
        row, dim = rng.integers(5, size=40), rng.integers(len(problem.sizes), size=40)
        option = rng.integers(problem.sizes[dim])
        changed = position.candidates[row]
        changed[np.arange(40), dim] = option
        costs = problem.costs(changed)
        np.testing.assert_array_equal(position.after(row, dim, option), costs)
        limits = costs[rng.permutation(5)]
        fits = position.change(row, dim, option) <= position.room(limits)[row]
        np.testing.assert_array_equal(fits, costs <= limits[row])
        moved = np.unique(row, return_index=True)[1]
        position.move(row[moved], dim[moved], option[moved])


@pytest.mark.slow
@pytest.mark.parametrize(("network", "space"), CASES)
def test_only_coupled_changes_are_worth_another_look(network: str, space: str) -> None:
    problem = problem_of(network, space, "both")
    d = len(problem.sizes)
    assert isinstance(problem.cost_function, LimitedCosts)
    position = problem.cost_function.at(np.zeros((1, d), dtype=np.int64))
    assert position is not None
    zero, dims = np.zeros(d, dtype=np.int64), np.arange(d)
    for dim in range(d):
        before = position.change(zero, dims, problem.sizes - 1)
        row, coupled = position.coupled(zero[:1], dims[[dim]])
        assert not row.any()
        position.move(zero[:1], dims[[dim]], problem.sizes[[dim]] - 1)
        other = np.flatnonzero((position.change(zero, dims, problem.sizes - 1) != before).any(axis=1))
        assert set(other) <= set(coupled)
        if network == "chain":
            assert len(coupled) <= 3


def repaired_to_exact_costs(problem: Problem) -> IntArray:
    """Repair under limits that other candidates cost to the last digit, so that some steps just fit."""
    first, other = np.random.default_rng(1).integers(problem.sizes, size=(2, 100, len(problem.sizes)))
    return problem.repair(
        first, np.maximum(problem.costs(problem.repair(other)), problem.costs(problem.cheapest[None]))
    )


PROPOSALS: dict[str, Callable[[Problem], IntArray]] = {
    "cheapest": lambda problem: problem.cheapest[None],
    "uniform": lambda problem: uniform_seeds(problem, (1.0, 0.8)),
    "random": lambda problem: draw(problem, 20, np.random.default_rng(0)),
    "repaired": lambda problem: problem.repair(
        np.random.default_rng(1).integers(problem.sizes, size=(20, len(problem.sizes)))
    ),
    "repaired to exact costs": repaired_to_exact_costs,
    "filled": lambda problem: fill_up(
        problem, np.tile(problem.cheapest, (9, 1)), np.tile(problem.limits, (9, 1)), np.random.default_rng(0)
    ),
    "switched": lambda problem: switch_levels(
        problem, np.tile(problem.cheapest, (9, 1)), np.tile(problem.limits, (9, 1)), np.random.default_rng(0)
    ),
    "knapsack": lambda problem: front_of(problem, losses_of(problem), spread_budgets(problem, 5)),
    "minimax": lambda problem: front_of(problem, losses_of(problem), spread_budgets(problem, 3), "minimax"),
    "shares": cost_shares,  # type: ignore[dict-item]  # of floats
}


@pytest.mark.slow
@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("budget", ["flops", "both"])
@pytest.mark.parametrize(("network", "space"), CASES)
def test_proposals_are_the_same_as_with_costs_counted_from_scratch(
    network: str, space: str, budget: str, proposal: str
) -> None:
    problem = problem_of(network, space, budget)
    np.testing.assert_array_equal(PROPOSALS[proposal](problem), PROPOSALS[proposal](recounting(problem)))


@pytest.mark.slow
def test_a_front_counts_few_candidates_from_scratch() -> None:
    problem = problem_of("chain", "channels", "flops")
    counted = 0

    def count(candidates: IntArray) -> FloatArray:
        nonlocal counted
        counted += len(candidates)
        return problem.cost_function(candidates)

    assert isinstance(problem.cost_function, LimitedCosts)
    watched = LimitedCosts({"flops": lambda c: count(c)[:, 0]}, ("flops",), problem.cost_function._changes)
    front_of(replace(problem, cost_function=watched), losses_of(problem), spread_budgets(problem, 5))
    from_scratch = counted
    counted = 0
    front_of(replace(problem, cost_function=count), losses_of(problem), spread_budgets(problem, 5))
    assert 10 * from_scratch < counted
