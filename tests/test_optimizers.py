import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from autoprune.optimizers import (
    NSGA2,
    OPTIMIZERS,
    Auto,
    Bayes,
    Knapsack,
    LevelSwitch,
    RandomSearch,
    find_optimizer,
    milp,
    uniform_seeds,
)
from autoprune.optimizers.history import Archive
from autoprune.pareto import hypervolume
from autoprune.protocols import FAILED, OK, RACED
from autoprune.testing.contracts import OptimizerContract
from autoprune.testing.problems import (
    additive_problem,
    blocks_problem,
    product_problem,
    staircase_problem,
    table_problem,
)

LARGE_AND_TINY = {
    "additive": (
        lambda: additive_problem([6, 4, 5, 3, 6, 4], seed=0),
        lambda: additive_problem([3, 3, 4], seed=0, budget=0.7),
    ),
    "product": (lambda: product_problem([16] * 20, seed=0), lambda: product_problem([3, 3, 4], seed=0, budget=0.8)),
    "staircase": (
        lambda: staircase_problem([8] * 12, seed=0),
        lambda: staircase_problem([9, 1, 5], seed=0, budget=0.7),
    ),
    "table": (lambda: table_problem([7] * 20, seed=0, budget=0.6), lambda: table_problem([5, 5], seed=0, budget=0.7)),
    "blocks": (lambda: blocks_problem(4, seed=0), lambda: blocks_problem(1, seed=0, budget=0.8)),
}


def knapsack(problem, seed):
    """A scan of 16 probes, so that the contract tests see what comes after it; only that depends on the seed."""
    return Knapsack(dataclasses.replace(problem, trials=40), seed)


def exact(problem, seed):
    """As `knapsack`, with five budgets solved exactly."""
    return milp(dataclasses.replace(problem, trials=10), seed)


def auto(problem, seed):
    """A scan and a front of at most 21 candidates, so that the contract tests see the refinement too."""
    return Auto(dataclasses.replace(problem, trials=40), seed)


NAMED = {
    "random": RandomSearch,
    "nsga2": NSGA2,
    "level_switch": LevelSwitch,
    "bayes": Bayes,
    "knapsack": knapsack,
    "milp": exact,
    "auto": auto,
}
MAKERS = [pytest.param(maker, id=name) for name, maker in NAMED.items()]
CASES = [
    pytest.param(maker, kind, id=f"{name}-{kind}")
    for name, maker in NAMED.items()
    for kind in LARGE_AND_TINY
    # Those that are slow see two kinds, without and with categories; "blocks" has products, too.
    if name not in ("bayes", "milp") or kind in ("additive", "blocks")
]


@pytest.mark.parametrize(("maker", "kind"), CASES, scope="class")
class TestEveryOptimizer(OptimizerContract):
    @pytest.fixture(autouse=True)
    def _case(self, maker, kind):
        self.make = maker
        self.make_problem, self.make_tiny_problem = LARGE_AND_TINY[kind]


def search(optimizer, known, trials, batch=8):
    """Objectives of all trials, shape (trials, m)."""
    objectives = []
    for _ in range(trials // batch):
        evaluations = known.evaluate(optimizer.ask(batch))
        optimizer.tell(evaluations)
        objectives.append(evaluations.objectives)
    return np.concatenate(objectives)


@pytest.mark.slow
def test_nsga2_finds_a_better_front_and_a_better_optimum_than_random_search():
    volumes, losses = {RandomSearch: [], NSGA2: []}, {RandomSearch: [], NSGA2: []}
    for seed in range(7):
        known = additive_problem([16] * 20, seed=seed)
        worst = sum(table[-1] for table in known.losses)
        for maker in (RandomSearch, NSGA2):
            scaled = search(maker(known.problem, seed), known, trials=200) / [worst, known.problem.limits[0]]
            volumes[maker].append(hypervolume(np.maximum(scaled, [0, 0.5]), [0.5, 1.001]))
            losses[maker].append(scaled[:, 0].min())
    assert np.median(volumes[NSGA2]) > 1.2 * np.median(volumes[RandomSearch])
    assert np.median(losses[NSGA2]) < 0.9 * np.median(losses[RandomSearch])


@pytest.mark.parametrize("maker", MAKERS)
def test_seeds_are_proposed_first_repaired_and_never_twice(maker):
    plain = product_problem([8] * 6, seed=0).problem
    dense = np.zeros((1, 6), dtype=np.int64)
    problem = dataclasses.replace(plain, seeds=np.concatenate([uniform_seeds(plain, (1.0, 0.75)), dense]))
    expected = np.concatenate([problem.seeds[:2], problem.repair(dense)])
    optimizer = maker(problem, 0)
    first = np.concatenate([optimizer.ask(2), optimizer.ask(4)])
    np.testing.assert_array_equal(first[:2], expected[:2])
    assert expected[2].tolist() in first.tolist()
    assert len(np.unique(first, axis=0)) == 6


def test_random_search_spreads_over_the_budget_range_up_to_the_limit():
    problem = additive_problem([16] * 20, seed=0).problem
    candidates = RandomSearch(problem, 0).ask(400)
    used = problem.costs(candidates)[:, 0] / problem.limits[0]
    assert used.min() > 0.45
    np.testing.assert_allclose(np.quantile(used, [0.25, 0.5, 0.75]), [0.625, 0.75, 0.875], atol=0.05)


def test_only_ok_rows_with_finite_objectives_become_parents():
    known = additive_problem([9] * 12, seed=0)
    plain, told = NSGA2(known.problem, 0), NSGA2(known.problem, 0)
    batch = plain.ask(24)
    np.testing.assert_array_equal(told.ask(24), batch)
    plain.tell(known.evaluate(batch, FAILED))
    broken = known.evaluate(batch)
    broken.objectives[:, 0] = np.nan
    told.tell(known.evaluate(batch[:12], RACED))
    told.tell(dataclasses.replace(broken, status=(OK,) * 24))
    np.testing.assert_array_equal(told.ask(8), plain.ask(8))  # nobody to breed from: both draw at random


def test_a_raced_row_told_again_in_full_counts_once_whatever_the_order():
    known = additive_problem([9] * 12, seed=0)
    a, b = NSGA2(known.problem, 0), NSGA2(known.problem, 0)
    batch = a.ask(24)
    for optimizer, statuses in ((a, (RACED, OK)), (b, (OK, RACED))):
        for status in statuses:
            optimizer.tell(known.evaluate(batch, status))
    proposal = a.ask(8)
    np.testing.assert_array_equal(proposal, b.ask(8))
    alone = NSGA2(known.problem, 0)
    alone.tell(known.evaluate(batch))
    np.testing.assert_array_equal(proposal, alone.ask(8))


def test_an_archive_shows_the_same_rows_however_often_it_was_looked_at_in_between():
    known, rng = additive_problem([9] * 4, seed=0), np.random.default_rng(0)
    watched, told = Archive(known.problem, 0), []
    for status in (OK, FAILED, OK, RACED, OK, OK):
        told.append(known.evaluate(rng.integers(5, 9, size=(12, 4)), status))
        told.append(dataclasses.replace(told[-1], samples=told[-1].samples + 1, objectives=told[-1].objectives + 1))
        at_once = Archive(known.problem, 0)
        for evaluations in told[-2:]:
            watched.tell(evaluations)
        for evaluations in reversed(told):
            at_once.tell(evaluations)
        for seen, expected in zip(
            (*watched.ok(), watched.acceptable()), (*at_once.ok(), at_once.acceptable()), strict=True
        ):
            np.testing.assert_array_equal(seen, expected)
    assert len(watched.ok()[0]) > 24


def test_a_search_without_a_binding_limit_still_proposes_different_candidates():
    known = additive_problem([4] * 10, seed=0, budget=5.0)
    assert len(np.unique(RandomSearch(known.problem, 0).ask(200), axis=0)) == 200


def test_a_large_space_with_few_feasible_candidates_ends_and_repeats_nothing():
    known = staircase_problem([4] * 20, seed=0, budget=0.2501)  # nothing but the narrowest options is feasible
    optimizer = NSGA2(known.problem, 0)
    proposed = np.concatenate([optimizer.ask(8) for _ in range(3)])
    assert proposed.tolist() == [[3] * 20]


def test_names_classes_functions_and_instances_make_an_optimizer():
    problem = additive_problem([3, 3], seed=0).problem
    assert all(find_optimizer(name)(problem, 0).ask(2).shape == (2, 2) for name in OPTIMIZERS)
    assert isinstance(find_optimizer(RandomSearch)(problem, 0), RandomSearch)
    assert isinstance(find_optimizer(lambda p, s: NSGA2(p, s, population=8))(problem, 0), NSGA2)
    ready = RandomSearch(problem, 0)
    assert find_optimizer(ready)(problem, 1) is ready


def test_an_unknown_optimizer_is_refused_with_the_names_there_are():
    problem = additive_problem([3, 3], seed=0).problem
    with pytest.raises(
        ValueError,
        match=r"must be one of \['auto', 'bayes', 'knapsack', 'level_switch', 'milp', 'nsga2', 'random'\], got 'nsga3'",
    ):
        find_optimizer("nsga3")(problem, 0)
    with pytest.raises(TypeError, match=r"have ask and tell, got 3"):
        find_optimizer(3)(problem, 0)
    with pytest.raises(ValueError, match="population must be at least 4, got 1"):
        NSGA2(problem, 0, population=1)
    with pytest.raises(ValueError, match="population and niches must be at least 1, got 1 and 0"):
        LevelSwitch(problem, 0, niches=0)
    with pytest.raises(ValueError, match=r"sampler must be one of \['tpe', 'gp'\], got 'cmaes'"):
        Bayes(problem, 0, sampler="cmaes")


@pytest.mark.slow
def test_importing_the_optimizers_does_not_import_the_libraries_behind_them():
    code = (
        "import sys, autoprune.optimizers.surrogate, autoprune.budget, autoprune.pareto; "
        "sys.exit(len({'pymoo', 'optuna', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
