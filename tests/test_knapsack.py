"""The knapsack under true costs, the scan that feeds it, and the search that both make."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from autoprune.costs import make_costs
from autoprune.errors import InfeasibleBudgetError
from autoprune.optimizers import Knapsack, Problem
from autoprune.optimizers.history import Archive
from autoprune.optimizers.knapsack.relinearise import front_of, spread_budgets
from autoprune.optimizers.knapsack.sensitivity import SHARE, cost_shares, next_probes, table_of
from autoprune.protocols import FAILED, OK, Evaluations
from autoprune.search_spaces import Channels
from autoprune.structure.analysis import best_choices
from autoprune.structure.example import Example
from autoprune.structure.structure import assemble
from autoprune.structure.tracing.trace import trace
from autoprune.testing.problems import (
    PROBLEMS,
    additive_problem,
    blocks_problem,
    product_problem,
    staircase_problem,
    table_problem,
)
from zoo.concat import densenet
from zoo.mobile import mobilenet_v2
from zoo.resnet import resnet


def assert_within_and_full(problem, candidates, budgets, losses):
    """No candidate exceeds its budget, and no single option can be raised within it: all tried, one by one."""
    assert (problem.costs(candidates) <= budgets).all()
    np.testing.assert_array_equal(candidates, problem.canonical(candidates))
    for candidate, budget in zip(candidates, budgets, strict=True):
        raised = [
            [*candidate[:j], other, *candidate[j + 1 :]]
            for j, option in enumerate(candidate)
            for other in range(option if problem.ordered[j] else problem.sizes[j])
            if problem.ordered[j] or losses[j][other] < losses[j][option] - 1e-9
        ]
        assert not raised or not problem.feasible(np.array(raised), budget).any(), candidate


def channel_problem(model, names):
    record = trace(Example(model.eval(), (torch.zeros(2, 3, 32, 32),)))
    structure = assemble(*best_choices(record))  # what the network is; whether its checks pass is tested elsewhere
    space = Channels().bind(structure, {group.name: range(group.size) for group in structure.groups})
    costs = make_costs(structure, space)
    dense = np.zeros((1, len(space.sizes)), dtype=np.int64)
    limits = np.array([0.6 * costs[name](dense)[0] for name in names])
    return Problem(space.sizes, names, limits, lambda c: np.column_stack([costs[name](c) for name in names]))


NETWORKS = {
    "resnet56": lambda: resnet(56),
    "mobilenet_v2": mobilenet_v2,
    "densenet": lambda: densenet(growth=12, blocks=(4, 4, 4)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network_problem(request):
    return channel_problem(NETWORKS[request.param](), ("flops", "params"))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sum", "minimax"])
def test_on_real_structures_no_budget_is_exceeded_and_no_option_can_be_raised(network_problem, objective):
    problem = network_problem
    rng = np.random.default_rng(0)
    weights = rng.lognormal(0.0, 1.0, len(problem.sizes))
    losses = [w * np.linspace(0, 1, size) ** 2 for w, size in zip(weights, problem.sizes, strict=True)]
    fractions = rng.uniform(0.3, 1.0, (12, 2))  # either limit binds somewhere
    budgets = np.maximum(fractions * problem.limits, problem.costs(problem.sizes[None] - 1))
    assert_within_and_full(problem, front_of(problem, losses, budgets, objective), budgets, losses)


def regrets(known, budgets, **settings):
    """Relative regret of each row of the front against the best of all candidates, shape (m,)."""
    every = known.feasible_candidates()
    costs, losses = known.problem.costs(every), known.loss(every)
    found = known.loss(front_of(known.problem, known.losses, budgets, **settings))
    best = np.array([losses[(costs <= budget).all(axis=1)].min() for budget in budgets])
    return found / best - 1


KINDS = {kind: (lambda seed, make=make: make((6, 4, 5, 3, 6, 4), seed, 0.6)) for kind, make in PROBLEMS.items()}
KINDS["blocks"] = lambda seed: blocks_problem(2, seed, 0.6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [*((kind, 0.01) for kind in PROBLEMS), ("blocks", 0.05)])
def test_fronts_are_near_the_optimum_of_full_enumeration_and_cannot_be_raised(kind, most):
    found = []
    for seed in range(5):
        known = KINDS[kind](seed)
        budgets = np.linspace(1.0, 0.55, 8)[:, None] * known.problem.limits
        budgets = np.maximum(budgets, known.problem.costs(known.problem.cheapest[None]))
        found.append(regrets(known, budgets))
        assert_within_and_full(known.problem, front_of(known.problem, known.losses, budgets), budgets, known.losses)
    assert np.mean(found) < most
    assert np.median(found) < 1e-9


@pytest.mark.slow
def test_relinearising_is_better_than_one_linearisation():
    once, again = [], []
    for seed in range(8):
        known = product_problem([8] * 12, seed)
        budgets = spread_budgets(known.problem, 5) * [1, 10]  # only the limit on products binds
        for results, rounds in ((once, 1), (again, 6)):
            results.append(known.loss(front_of(known.problem, known.losses, budgets, rounds=rounds)))
    assert np.mean(np.array(again) / np.array(once)) < 0.99


def test_the_least_largest_loss_is_found_under_additive_costs():
    known = additive_problem((6, 4, 5, 3, 6, 4), seed=0)
    budgets = spread_budgets(known.problem, 9)
    every = known.feasible_candidates()
    costs = known.problem.costs(every)

    def largest(candidates):
        return np.max([row[candidates[:, j]] for j, row in enumerate(known.losses)], axis=0)

    best = [largest(every[(costs <= budget).all(axis=1)]).min() for budget in budgets]
    np.testing.assert_allclose(largest(front_of(known.problem, known.losses, budgets, "minimax")), best)


def test_a_front_out_of_reach_or_of_another_shape_is_refused():
    known = additive_problem((4, 4), seed=0)
    with pytest.raises(InfeasibleBudgetError, match="params must be at least"):
        front_of(known.problem, known.losses, known.problem.limits[None] * [[1.0], [1e-3]])
    with pytest.raises(ValueError, match=r"losses must have \[4, 4\] entries and budgets shape \(m, 1\), got \[3, 4\]"):
        front_of(known.problem, [known.losses[0][:3], known.losses[1]], known.problem.limits[None])


def test_budgets_start_at_the_top_and_halve_the_gaps():
    problem = additive_problem([9] * 6, seed=0).problem
    low, high = problem.budget_range[0]
    relative = (spread_budgets(problem, 9)[:, 0] - low) / (high - low)
    np.testing.assert_allclose(relative, [1, 0, 0.5, 0.75, 0.25, 0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(spread_budgets(problem, 1)[0], high)


def single(problem, j, option):
    candidate = np.zeros(len(problem.sizes), dtype=np.int64)
    candidate[j] = option
    return candidate


def singles(problem, options):
    return np.array([single(problem, j, option) for j, option in options])


NONE = np.zeros((0, 6), dtype=np.int64)


def never():
    raise AssertionError("the front is not needed yet")


def test_a_scan_is_coarse_then_fine_and_starts_where_most_cost_is():
    problem = replace(additive_problem([9] * 6, seed=0).problem, trials=100)
    coarse = next_probes(problem, NONE, 100, never)
    order = np.argsort(-cost_shares(problem)).tolist()
    assert coarse.tolist() == singles(problem, [(j, k) for k in (4, 8) for j in order]).tolist()
    chosen = np.array([[2, 4, 0, 0, 0, 0], [2, 8, 0, 0, 0, 0]])
    fine = next_probes(problem, coarse, 10, lambda: chosen)
    picked, beside, once = fine[:1], fine[1:7], fine[7:]  # twice; next to what is picked twice; next to the others
    assert picked.tolist() == [[2, 0, 0, 0, 0, 0]]
    assert sorted(beside.tolist()) == sorted(
        singles(problem, [(0, 1), (0, 3), *((j, 1) for j in range(2, 6))]).tolist()
    )
    assert once.tolist() == singles(problem, [(1, 3), (1, 5), (1, 7)]).tolist()


def test_pending_and_known_probes_together_never_exceed_the_share():
    for trials in (1, 2, 3, 10, 37, 1000):
        problem = replace(product_problem([5] * 6, seed=0).problem, trials=trials)
        known = NONE
        while len(new := next_probes(problem, known, 4, lambda: np.array([[1, 2, 3, 4, 1, 2]]))):
            known = np.concatenate([known, new])
        assert len(known) <= SHARE * trials
        assert len(np.unique(known, axis=0)) == len(known)
        if trials == 10:
            dims = set(known.argmax(axis=1).tolist())
            assert dims == set(np.argsort(-cost_shares(problem))[:4].tolist())


def test_every_option_without_an_order_is_measured_and_irrelevant_changes_are_not():
    known = blocks_problem(2, seed=0)
    problem = replace(known.problem, canonical=lambda c: c * np.array([1, 0, 1, 1, 1, 1, 1]))
    probes = next_probes(replace(problem, trials=100), np.zeros((0, 7), dtype=np.int64), 100, never)
    assert sorted(probes[probes[:, 6] > 0, 6].tolist()) == [1, 2, 3]
    assert not probes[:, 1].any()


def measured(known, options, status=OK):
    return known.evaluate(singles(known.problem, options), status)


def join(*parts):
    return Evaluations(
        *(
            np.concatenate([getattr(p, name) for p in parts])
            for name in ("candidates", "objectives", "stderr", "samples")
        ),
        *(sum((getattr(p, name) for p in parts), ()) for name in ("status", "reasons")),
        np.concatenate([part.distortion for part in parts]),
    )


def test_the_table_holds_what_was_measured_and_rises_in_between():
    known = additive_problem([9] * 6, seed=0)
    told = join(measured(known, [(j, k) for j in range(6) for k in (4, 8)]), measured(known, [(0, 2)], FAILED))
    table = table_of(known.problem, told)
    for j, (row, true) in enumerate(zip(table.losses, known.losses, strict=True)):
        np.testing.assert_allclose(row[[0, 4, 8]], true[[0, 4, 8]])
        assert table.measured[j].tolist() == [k in (0, 4, 8) for k in range(9)]
        assert (np.diff(row) >= 0).all()
        np.testing.assert_allclose(row, true, atol=0.12 * true[-1])


def test_noise_that_falls_along_the_options_is_evened_out():
    known = additive_problem([5] * 2, seed=0)
    told = measured(known, [(0, k) for k in (1, 2, 3, 4)])
    told = replace(told, distortion=np.array([0.1, 0.4, 0.2, 0.9]))
    np.testing.assert_allclose(table_of(known.problem, told).losses[0], [0, 0.1, 0.3, 0.3, 0.9])


def test_without_distortion_the_signal_above_the_dense_one_counts_with_its_error():
    known = additive_problem([5] * 2, seed=0)
    told = measured(known, [(0, 0), (0, 2), (1, 4), (1, 2)])
    told.objectives[:, 0] = [1.0, 1.5, 3.0, 0.9]
    told.stderr[:, 0] = [0.1, 0.2, 0.3, 0.4]
    table = table_of(known.problem, replace(told, distortion=np.full(4, np.nan)))
    assert table.losses[0][2] == pytest.approx(0.5)
    assert table.losses[1][[2, 4]].tolist() == pytest.approx([0, 2])
    assert [table.stderr[0][2], table.stderr[1][2], table.stderr[1][4]] == [0.2, 0.4, 0.3]


def test_dimensions_not_measured_take_their_prior_in_the_measured_unit_or_the_average_curve():
    known = additive_problem([5] * 4, seed=0)
    told = measured(known, [(j, k) for j in (0, 1) for k in (2, 4)])
    hundredths = tuple(row / 100 for row in known.losses)
    table = table_of(replace(known.problem, prior=hundredths), told)
    for row, true in zip(table.losses, known.losses, strict=True):
        np.testing.assert_allclose(row, true, rtol=0.02)
    average = table_of(known.problem, told).losses
    assert average[2][-1] == pytest.approx((known.losses[0][-1] + known.losses[1][-1]) / 2)
    np.testing.assert_array_equal(average[2], average[3])


def test_with_nothing_known_the_knapsack_prunes_every_dimension():
    problem = additive_problem([17] * 6, seed=0, budget=0.5).problem
    nothing = Archive(problem, 0).probes()
    (candidate,) = front_of(problem, table_of(problem, nothing).losses, problem.limits[None])
    assert (np.abs(candidate - 8.5) <= 5).all()
    assert candidate[_weights_of(problem).argmax()] == candidate.max(), "the dearest loses most, for the same loss"


def _weights_of(problem):
    """Cost that the last option of each dimension alone saves, shape (d,)."""
    alone = np.diag(problem.sizes - 1)
    return problem.costs(np.zeros_like(alone))[:, 0] - problem.costs(alone)[:, 0]


def test_probes_over_the_limit_are_nobodys_parents():
    known = additive_problem([9] * 6, seed=0, budget=0.5)
    archive = Archive(known.problem, 0)
    whole = known.problem.repair(np.zeros((1, 6), dtype=np.int64))
    told = join(measured(known, [(0, 1), (1, 1)]), measured(known, [(2, 1)], FAILED), known.evaluate(whole))
    archive.tell(told)
    assert archive.ok()[0].tolist() == whole.tolist()
    probes = archive.probes()
    assert probes.candidates.tolist() == sorted(told.candidates[:3].tolist())
    assert sorted(probes.status) == [FAILED, OK, OK]
    np.testing.assert_allclose(
        sorted(probes.distortion[np.isfinite(probes.distortion)]), sorted(known.loss(told.candidates[:2]))
    )


def run(optimizer, known, trials, batch=8):
    proposed = []
    while sum(map(len, proposed)) < trials:
        proposed.append(optimizer.ask(batch))
        optimizer.tell(known.evaluate(proposed[-1]))
    return np.concatenate(proposed)[:trials]


@pytest.mark.slow
@pytest.mark.parametrize("make", [additive_problem, product_problem, staircase_problem, table_problem])
def test_a_scan_and_one_front_come_within_three_percent_of_the_true_tables_front(make):
    known = make([9] * 10, 0, 0.6)
    problem = replace(known.problem, trials=100)
    candidates = run(Knapsack(problem, 0), known, 100)
    assert problem.probes(candidates).sum() <= SHARE * 100
    budgets = spread_budgets(problem, 5)
    losses, costs = known.loss(candidates), problem.costs(candidates)
    found = np.array([losses[(costs <= budget).all(axis=1)].min() for budget in budgets])
    assert (found <= 1.03 * known.loss(front_of(problem, known.losses, budgets))).all()


@pytest.mark.slow
def test_a_prior_table_spends_nothing_on_probes_and_meets_the_largest_budget_first():
    known = product_problem([9] * 10, seed=0)
    problem = replace(known.problem, prior=known.losses, trials=40)
    first = Knapsack(problem, 0, table="prior").ask(17)
    assert problem.feasible(first).all()
    assert not problem.probes(first).any()
    np.testing.assert_array_equal(first[:1], front_of(problem, known.losses, spread_budgets(problem, 17))[:1])


@pytest.mark.parametrize("trials", [1, 2, 3])
def test_few_trials_go_to_the_front(trials):
    known = product_problem([5] * 6, seed=0)
    problem = replace(known.problem, trials=trials)
    candidates = run(Knapsack(problem, 0), known, trials, batch=1)
    assert problem.feasible(candidates[-1:]).all()
    assert (~problem.probes(candidates)).sum() >= (1 - SHARE) * trials


@pytest.mark.slow
def test_a_search_told_nothing_yet_goes_on_to_the_front_and_never_waits():
    known = product_problem([9] * 10, seed=0)
    optimizer = Knapsack(replace(known.problem, trials=50), 0)
    batches = [optimizer.ask(10) for _ in range(5)]
    assert [len(batch) for batch in batches] == [10] * 5
    probing = known.problem.probes(np.concatenate(batches))
    assert probing[:20].all()
    assert not probing[20:].any()


def test_failed_probes_leave_a_search_that_beats_nothing_known():
    known = product_problem([9] * 10, seed=0)
    optimizer = Knapsack(replace(known.problem, trials=50), 0)
    probes = optimizer.ask(20)
    optimizer.tell(known.evaluate(probes[:6], FAILED))
    optimizer.tell(known.evaluate(probes[6:]))
    blind = Knapsack(replace(known.problem, trials=1), 0)
    seen, unseen = optimizer.ask(1), blind.ask(1)
    assert known.loss(seen)[0] < known.loss(unseen)[0]


def test_the_largest_loss_can_be_minimised_instead():
    known = additive_problem([9] * 10, seed=0)
    problem = replace(known.problem, prior=known.losses)
    largest = {}
    for objective in ("sum", "minimax"):
        (best,) = Knapsack(problem, 0, "prior", objective).ask(1)
        largest[objective] = max(row[i] for row, i in zip(known.losses, best, strict=True))
    assert largest["minimax"] < largest["sum"]


def test_unknown_tables_objectives_and_a_missing_prior_are_refused():
    problem = additive_problem([3, 3], seed=0).problem
    with pytest.raises(ValueError, match=r"table='prior' needs a problem with a prior, .* use table='scan'"):
        Knapsack(problem, 0, table="prior")
    with pytest.raises(ValueError, match="table must be 'scan' or 'prior', got 'guess'"):
        Knapsack(problem, 0, table="guess")
    with pytest.raises(ValueError, match="objective must be 'sum' or 'minimax', got 'mean'"):
        Knapsack(problem, 0, objective="mean")
