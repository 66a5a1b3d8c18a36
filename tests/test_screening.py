"""Choice of proposals by what they are expected to add to the front, against hypervolumes and drawn samples."""

import numpy as np
import pytest

from autoprune.optimizers.screening import choose_by_gain, expected_improvement
from autoprune.pareto import hypervolume


def front_and_proposals(seed):
    """Scores and costs in [0, 1] of 12 known points and of 30 proposals; budgets that are all their costs."""
    rng = np.random.default_rng(seed)
    known, proposed = rng.random((12, 2)), rng.random((30, 2))
    budgets = np.linspace(0, 1, 20_001)
    best = np.where(known[:, 1:] <= budgets, known[:, :1], 1.0).min(axis=0)
    return known, proposed, proposed[:, 1:] <= budgets, best


@pytest.mark.parametrize("seed", range(3))
def test_sure_predictions_are_chosen_by_the_hypervolume_that_they_add(seed):
    known, proposed, fits, best = front_and_proposals(seed)
    first, second = choose_by_gain(proposed[:, 0], 0.0, fits, best, 2)
    volumes = [hypervolume(np.vstack([known, row]), [1.0, 1.0]) for row in proposed]
    assert volumes[first] == pytest.approx(max(volumes), abs=1e-3)
    pairs = [hypervolume(np.vstack([known, proposed[first], row]), [1.0, 1.0]) for row in proposed]
    assert pairs[second] == pytest.approx(max(pairs), abs=1e-3)


def test_doubtful_predictions_gain_what_samples_gain_on_average():
    drawn = 0.6 + 0.2 * np.random.default_rng(0).standard_normal(200_000)
    for best in (0.3, 0.6, 0.9):
        expected = np.maximum(best - drawn, 0.0).mean()
        assert expected_improvement(np.array(0.6), 0.2, np.array(best)) == pytest.approx(expected, abs=2e-3)


def test_what_fits_no_budget_is_not_chosen_and_nothing_is_chosen_twice():
    fits = np.array([[True], [False], [True]])
    chosen = choose_by_gain(np.array([0.5, 0.0, 0.2]), 0.1, fits, np.array([1.0]), 5)
    assert chosen.tolist() == [2, 0]
