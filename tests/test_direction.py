"""Direction of a metric against a pair of metrics that are the negative of each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprune.pareto import Direction

UP, DOWN = Direction(higher_is_better=True), Direction(higher_is_better=False)
scores = st.floats(-1e6, 1e6)


@given(scores, scores)
def test_a_negated_metric_of_the_other_direction_ranks_alike(a, b):
    assert UP.better(a, b) == DOWN.better(-a, -b) == (a > b)
    assert UP.meets(a, b) == DOWN.meets(-a, -b) == (not UP.better(b, a))
    assert UP.worse_by(a, b) == DOWN.worse_by(-a, -b) == -UP.worse_by(b, a)
    assert (UP.worse_by(a, b) > 0) == UP.better(b, a)
    assert UP.best([a, b]) == -DOWN.best([-a, -b]) == max(a, b)


@given(st.lists(scores, min_size=1))
def test_the_key_sorts_from_the_best(values):
    assert sorted(values, key=UP.key)[0] == UP.best(values)
    assert sorted(values, key=DOWN.key)[0] == DOWN.best(values)
    np.testing.assert_array_equal(UP.key(np.array(values)), -np.array(values))
    assert torch.equal(DOWN.key(torch.tensor(values)), torch.tensor(values))


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_worsened_score_is_worse_by_that_much(direction):
    assert direction.worse_by(direction.worsened(0.75, 0.25), 0.75) == 0.25
    assert not direction.meets(direction.worsened(0.75, 0.25), 0.75)


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_nan_is_not_better_and_meets_nothing_but_no_limit(direction):
    assert not direction.better(math.nan, 0.0)
    assert not direction.better(0.0, math.nan)
    assert not direction.meets(math.nan, 0.0)
    assert direction.meets(math.nan, None)
