import numpy as np
import pytest

from autoprune.pareto import hypervolume, non_dominated


def dominated_by_definition(points):
    return [any((q <= p).all() and (q < p).any() for q in points) for p in points]


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_the_front_is_what_the_definition_of_dominance_says(m):
    rng = np.random.default_rng(m)
    for n in (1, 2, 7, 60):
        points = rng.integers(0, 6, size=(n, m)).astype(float)  # few values, so that there are ties and duplicates
        np.testing.assert_array_equal(non_dominated(points), ~np.array(dominated_by_definition(points)))


@pytest.mark.slow
@pytest.mark.parametrize("m", [2, 3])
def test_a_front_of_ten_thousand_points_is_found_whole(m):
    directions = np.random.default_rng(0).random((10_000, m))
    points = directions / np.linalg.norm(directions, axis=1, keepdims=True)  # a sphere: nothing dominates anything
    points = np.concatenate([points, points + 0.01])
    found = non_dominated(points)
    assert found[:10_000].all()
    assert not found[10_000:].all()


def test_infinite_objectives_are_compared_as_numbers():
    assert non_dominated([[0, np.inf], [1, np.inf], [2, 0]]).tolist() == [True, False, True]


def test_duplicates_on_the_front_are_all_kept():
    assert non_dominated([[1, 2], [1, 2], [0, 3], [1, 3]]).tolist() == [True, True, True, False]


def test_a_point_with_nan_is_never_on_the_front_and_dominates_nothing():
    assert non_dominated([[np.nan, 0], [1, 1], [np.inf, 0.5]]).tolist() == [False, True, True]


def test_no_points_have_an_empty_front():
    assert non_dominated(np.zeros((0, 2))).shape == (0,)


def test_objectives_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(n, m\), got \(3,\)"):
        non_dominated([1, 2, 3])


def test_hypervolume_is_the_area_between_the_front_and_the_reference():
    assert hypervolume([[1, 2], [2, 1], [2, 2], [5, 0]], reference=[3, 3]) == pytest.approx(3.0)
    assert hypervolume([[3, 0]], reference=[3, 3]) == 0.0
