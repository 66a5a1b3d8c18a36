"""The exact choice among coupled options: against enumeration, and never below the knapsack."""

import itertools

import numpy as np
import pytest

from autoprune.errors import InfeasibleBudgetError
from autoprune.optimizers.knapsack.coupling import coupled_front, coupling_of, silences_of
from autoprune.optimizers.knapsack.milp import Choice, Pair, Silence, choose_coupled
from autoprune.optimizers.knapsack.multiple_choice import choose_options, total
from autoprune.optimizers.knapsack.relinearise import front_of, spread_budgets
from autoprune.testing.problems import (
    additive_problem,
    blocks_problem,
    product_problem,
    staircase_problem,
    table_problem,
)


class Instance:
    """Random losses, costs of one or two kinds, pairs and silences of three to five dimensions."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.sizes = rng.integers(1, 5, rng.integers(3, 6))
        d, kinds = len(self.sizes), int(rng.integers(1, 3))
        self.losses = [rng.random(size).round(3) for size in self.sizes]
        self.costs = [rng.integers(-3, 12, (size, kinds)).astype(float) for size in self.sizes]
        couples = [couple for couple in itertools.combinations(range(d), 2) if rng.random() < 0.5]
        shape = [(self.sizes[i], self.sizes[j], kinds) for i, j in couples]
        self.pairs = [
            Pair(i, j, rng.integers(-4, 9, size).astype(float)) for (i, j), size in zip(couples, shape, strict=True)
        ]
        # Earlier dimensions silence later ones, which silence nothing themselves.
        gates = [i for i in range(d // 2) if self.sizes[i] > 1]
        self.silences = [
            Silence(i, int(rng.integers(1, self.sizes[i])), j)
            for i in gates
            for j in range(d // 2, d)
            if rng.random() < 0.5
        ]
        self.limits = np.quantile([self.spent(x) for x in self.everything()], 0.3, axis=0).round()

    def everything(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(size) for size in self.sizes)))

    def gone(self, x: tuple[int, ...]) -> set[int]:
        return {s.silenced for s in self.silences if x[s.dimension] == s.option}

    def spent(self, x: tuple[int, ...]) -> np.ndarray:
        """Costs of a choice by their definition."""
        gone = self.gone(x)
        found = sum(self.costs[j][i] for j, i in enumerate(x) if j not in gone)
        return found + sum(
            (p.costs[x[p.first], x[p.second]] for p in self.pairs if p.first not in gone and p.second not in gone),
            np.zeros(len(self.costs[0][0])),
        )

    def loss(self, x: tuple[int, ...]) -> float:
        return sum(float(self.losses[j][i]) for j, i in enumerate(x) if j not in self.gone(x))

    def best(self) -> float:
        return min((self.loss(x) for x in self.everything() if (self.spent(x) <= self.limits).all()), default=np.inf)

    def solve(self, **options: float) -> Choice | None:
        return choose_coupled(self.losses, self.costs, self.limits, self.pairs, self.silences, **options)


@pytest.mark.parametrize("seed", [*range(20), *(pytest.param(s, marks=pytest.mark.slow) for s in range(20, 200))])
def test_it_equals_enumeration_with_pairs_silences_and_several_limits(seed):
    instance = Instance(seed)
    best = instance.best()
    if not np.isfinite(best):
        with pytest.raises(InfeasibleBudgetError):
            instance.solve()
        return
    choice = instance.solve()
    assert choice is not None
    assert choice.options is not None
    chosen = tuple(choice.options.tolist())
    assert all(chosen[j] == 0 for j in instance.gone(chosen))
    assert (instance.spent(chosen) <= instance.limits).all()
    assert choice.loss == pytest.approx(instance.loss(chosen), abs=1e-12)
    assert choice.loss == pytest.approx(best, abs=1e-9)
    assert choice.bound == choice.loss
    assert choice.gap == 0


@pytest.mark.parametrize("seed", range(10))
def test_without_pairs_it_is_never_worse_than_the_knapsack(seed):
    rng = np.random.default_rng(seed)
    losses = [np.sort(rng.random(8)) for _ in range(20)]
    costs = [np.sort(rng.random(8))[::-1] for _ in range(20)]
    budget = 0.5 * sum(row[0] for row in costs)
    knapsack = choose_options(losses, costs, [budget], bins=200)
    choice = choose_coupled(losses, costs, budget)
    assert choice is not None
    assert choice.options is not None
    assert choice.loss <= total(losses, knapsack)[0] + 1e-12
    assert total(costs, choice.options[None])[0] <= budget


def chain(layers: int, options: int, seed: int) -> tuple[list[np.ndarray], list[Pair]]:
    """Losses, and a latency of each layer in steps of its input and its output width."""
    rng = np.random.default_rng(seed)
    width = np.linspace(1, 1 / options, options)
    losses = [rng.lognormal() * (1 - width) ** rng.uniform(1, 3) for _ in range(layers)]
    units = rng.integers(16, 128, layers)
    steps = [np.ceil(width * count / 8) for count in units]
    return losses, [Pair(i, i + 1, np.outer(steps[i], steps[i + 1])[..., None] ** 0.9) for i in range(layers - 1)]


def test_few_nodes_give_a_bound_that_holds():
    losses, pairs = chain(20, 8, seed=1)
    costs = [np.zeros(8)] * 20
    limit = 0.4 * sum(pair.costs[0, 0, 0] for pair in pairs)
    exact = choose_coupled(losses, costs, limit, pairs)
    early = choose_coupled(losses, costs, limit, pairs, nodes=1)
    assert exact is not None
    assert early is not None
    assert exact.gap == 0
    assert early.bound <= exact.loss + 1e-9
    assert early.loss >= exact.loss - 1e-9


def test_a_known_loss_cuts_off_what_is_not_below_it():
    instance = Instance(3)
    best = instance.best()
    assert instance.solve(most_loss=best - 1e-3) is None
    found = instance.solve(most_loss=best + 1e-6)
    assert found is not None
    assert found.loss == pytest.approx(best)


PROBLEMS = {
    "additive": lambda seed: additive_problem([4, 3, 5, 2], seed),
    "product": lambda seed: product_problem([4, 3, 5, 3], seed),
    "staircase": lambda seed: staircase_problem([6, 4, 5], seed, budget=0.7),
    "table": lambda seed: table_problem([5, 4, 5], seed, budget=0.7),
    "blocks": lambda seed: blocks_problem(2, seed, budget=0.8),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_front_of_a_problem_is_the_best_of_all_candidates(name, seed):
    known = PROBLEMS[name](seed)
    problem = known.problem
    budgets = spread_budgets(problem, 4)
    everything = problem.canonical(problem.enumerate())
    losses, costs = known.loss(everything), problem.costs(everything)
    front = coupled_front(problem, known.losses, budgets)
    for candidate, gap, budget in zip(front.candidates, front.gaps, budgets, strict=True):
        assert problem.feasible(candidate[None], budget)[0]
        assert known.loss(candidate[None])[0] == pytest.approx(losses[(costs <= budget).all(axis=1)].min(), abs=1e-9)
        assert gap == pytest.approx(0, abs=1e-6)


def test_blocks_that_may_be_dropped_silence_their_widths():
    problem = blocks_problem(2, seed=0).problem
    assert silences_of(problem) == tuple(Silence(i, 1, j) for i in (0, 3) for j in (i + 1, i + 2))
    assert silences_of(product_problem([3, 3, 3], seed=0).problem) == ()


def test_parts_of_the_cost_add_up_where_two_widths_meet_in_a_product():
    problem = blocks_problem(2, seed=1).problem
    parts = coupling_of(problem, silences_of(problem))
    assert parts is not None
    for candidate in problem.canonical(problem.enumerate())[::7].tolist():
        silent = {s.silenced for s in parts.silences if candidate[s.dimension] == s.option}
        summed = parts.base + sum(parts.costs[j][option] for j, option in enumerate(candidate) if j not in silent)
        for pair in parts.pairs:
            if not {pair.first, pair.second} & silent:
                summed = summed + pair.costs[candidate[pair.first], candidate[pair.second]]
        np.testing.assert_allclose(summed, problem.costs(np.array([candidate]))[0], rtol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_on_larger_problems_it_is_never_below_the_knapsack(seed):
    known = product_problem([6] * 12, seed)
    budgets = spread_budgets(known.problem, 3)
    front = coupled_front(known.problem, known.losses, budgets)
    knapsack = front_of(known.problem, known.losses, budgets)
    assert (known.loss(front.candidates) <= known.loss(knapsack) + 1e-12).all()
    assert known.problem.feasible(front.candidates).all()
    assert (front.gaps <= 1e-6).all()


def test_a_program_that_is_too_large_is_not_made():
    problem = product_problem([4, 4, 4], seed=0).problem
    assert coupling_of(problem, (), most=10) is None


class TestRefusals:
    def test_limits_that_nothing_meets(self):
        with pytest.raises(InfeasibleBudgetError, match="limits must allow at least one choice"):
            choose_coupled([[0, 1]], [[3, 2]], 1)

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"costs": [[1, 2, 3]]}, "costs must have shapes"),
            ({"costs": [[1, np.nan]]}, "must be finite"),
            ({"limits": np.nan}, "limits must be numbers"),
            ({"pairs": [Pair(0, 0, np.zeros((2, 2, 1)))]}, "pairs must be of two dimensions"),
            ({"silences": [Silence(0, 1, 0)]}, "silences must name an option"),
        ],
    )
    def test_what_does_not_fit(self, changed, said):
        arguments = {"losses": [[0, 1]], "costs": [[2, 1]], "limits": 2.0, **changed}
        with pytest.raises(ValueError, match=said):
            choose_coupled(**arguments)
