"""Promises of the landscapes of the known problems, checked by enumeration and in large spaces."""

import numpy as np
import pytest

from autoprune.optimizers.knapsack.relinearise import front_of
from autoprune.optimizers.random import draw
from autoprune.protocols import FAILED, RACED
from autoprune.testing.problems import LANDSCAPES, PROBLEMS, blocks_problem, deceptive, interacting, noisy

SMALL = [4, 3, 5, 3, 4, 4]
COSTS = {kind: (lambda seed, make=make: make(SMALL, seed, 0.6)) for kind, make in PROBLEMS.items()}
COSTS["blocks"] = lambda seed: blocks_problem(2, seed, 0.6)


def singles(problem):
    """Every candidate that changes one dimension, shape (m, d)."""
    every = problem.enumerate()
    return every[np.count_nonzero(every, axis=1) == 1]


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("landscape", LANDSCAPES)
def test_single_changes_lose_what_the_tables_say_and_dense_loses_nothing(landscape, kind):
    known = LANDSCAPES[landscape](COSTS[kind](0), 0)
    alone = singles(known.problem)
    alone = alone[(known.problem.canonical(alone) == alone).all(axis=1)]
    rows = [known.losses[row.argmax()][row.max()] for row in alone]
    np.testing.assert_allclose(known.loss(alone), rows)
    assert known.loss(np.zeros((1, len(known.losses)), dtype=np.int64))[0] == 0


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize("landscape", LANDSCAPES)
def test_a_landscape_changes_no_cost_and_no_loss_is_negative(landscape, kind):
    plain = COSTS[kind](0)
    known = LANDSCAPES[landscape](plain, 0)
    every = known.problem.enumerate()
    np.testing.assert_array_equal(known.problem.costs(every), plain.problem.costs(every))
    assert (known.loss(every) >= -1e-12).all()


@pytest.mark.parametrize("kind", COSTS)
def test_neighbours_interact_both_ways_within_the_strength_and_others_do_not(kind):
    plain = COSTS[kind](1)
    known = interacting(plain, 1, strength=0.8)
    every = plain.feasible_candidates()
    summed, joint = plain.loss(every), known.loss(every)
    assert (np.abs(joint - summed) <= 0.8 * summed + 1e-12).all()
    d, changes = len(plain.losses), []
    for a in range(d):
        for b in range(a + 1, d):
            pair = np.zeros((1, d), dtype=np.int64)
            pair[0, [a, b]] = known.problem.sizes[[a, b]] - 1
            if (known.problem.canonical(pair) == pair).all():
                change = known.loss(pair)[0] - plain.loss(pair)[0]
                assert (abs(change) > 1e-9) == (b == a + 1)
                changes.append(change)
    assert min(changes) < 0 < max(changes)


def test_stronger_interactions_leave_less_to_the_sum_of_single_losses():
    plain = PROBLEMS["product"]([16] * 24, 0)
    drawn = draw(plain.problem, 300, np.random.default_rng(0))
    summed = plain.loss(drawn)
    r2 = [np.corrcoef(summed, interacting(plain, 0, s).loss(drawn))[0, 1] ** 2 for s in (0.0, 0.4, 0.8)]
    assert r2[0] == pytest.approx(1)
    assert r2[0] > r2[1] > r2[2]


@pytest.mark.parametrize("kind", PROBLEMS)
def test_the_additive_optimum_of_a_deceptive_problem_is_not_its_optimum(kind):
    ratios = []
    for seed in range(5):
        known = deceptive(COSTS[kind](seed), seed)
        (additive,) = front_of(known.problem, known.losses, known.problem.limits[None])
        best = known.best()
        assert known.problem.feasible(best[None]).all()
        ratios.append(known.loss(best[None])[0] / known.loss(additive[None])[0])
    assert max(ratios) <= 1
    assert np.median(ratios) < 0.8


def test_every_step_into_a_trap_but_the_last_misleads():
    known = deceptive(PROBLEMS["additive"]([6, 6], 0, 0.9), 0)
    last = known.problem.sizes - 1
    path = np.array([[i, j] for i in range(6) for j in range(6) if (i, j) != tuple(last)])
    losses = known.loss(path)
    steps = [[losses[(path == p).all(axis=1)][0] for p in ([k, 5], [5, k], [k, k])] for k in range(5)]
    assert (np.diff(steps, axis=0) > 0).all()
    assert known.loss(last[None])[0] < 0.1 * losses.max()


def test_the_best_is_the_least_loss_of_all_that_fit():
    known = interacting(COSTS["product"](3), 3)
    limits = 0.8 * known.problem.limits
    every = known.problem.enumerate()
    fits = (known.problem.costs(every) <= limits).all(axis=1)
    assert known.loss(known.best(limits)[None])[0] == known.loss(every[fits]).min()
    assert known.loss(known.best()[None])[0] <= known.loss(known.best(limits)[None])[0]


def test_noise_is_a_property_of_the_candidate_and_of_the_seed():
    known = noisy(PROBLEMS["staircase"]([8] * 12, 0), 5)
    drawn = draw(known.problem, 40, np.random.default_rng(0))
    first, again = known.evaluate(drawn), known.evaluate(drawn[::-1])
    np.testing.assert_array_equal(first.objectives, again.objectives[::-1])
    np.testing.assert_array_equal(first.distortion, first.objectives[:, 0])
    np.testing.assert_array_equal(first.objectives[:, 1:], known.problem.costs(drawn))
    other = noisy(PROBLEMS["staircase"]([8] * 12, 0), 6).evaluate(drawn)
    assert (other.objectives[:, 0] != first.objectives[:, 0]).all()


@pytest.mark.slow
def test_noise_is_unbiased_and_as_large_as_its_standard_error_says():
    known = noisy(PROBLEMS["product"]([16] * 24, 0), 0)
    drawn = draw(known.problem, 2000, np.random.default_rng(0))
    for status, more in (("ok", 1.0), (RACED, 10**0.5)):
        told = known.evaluate(drawn, status)
        assert told.stderr[:, 0] == pytest.approx(more * known.noise)
        assert not told.stderr[:, 1:].any()
        errors = (told.objectives[:, 0] - known.loss(drawn)) / told.stderr[:, 0]
        assert abs(errors.mean()) < 0.07  # three standard errors
        assert errors.std() == pytest.approx(1, abs=0.05)
    assert np.isnan(known.evaluate(drawn[:3], FAILED).objectives).all()


def test_without_noise_evaluations_are_exact():
    known = PROBLEMS["table"](SMALL, 0)
    every = known.feasible_candidates()
    told = known.evaluate(every)
    np.testing.assert_array_equal(told.objectives[:, 0], known.loss(every))
    assert not told.stderr.any()
