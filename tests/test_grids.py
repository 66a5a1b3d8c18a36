"""Grids of sizes that operations are timed at: around what layers can have, and no further."""

from itertools import product

import numpy as np
import pytest

from autoprune.costs.latency.grids import Bench, measure_tables
from autoprune.costs.latency.tables import interpolate, place
from autoprune.costs.latency.timing import Timing
from autoprune.costs.operations.parts import Family

STEP = 16


def seconds_of(values) -> float:
    """Time of an operation whose cost rises in steps of 16 of either variable."""
    return 1e-5 + 1e-8 * float(np.prod([-(-value // STEP) * STEP for value in values]))


class Simulated(Bench):
    """Takes the times of `seconds_of`, and remembers what it was asked for."""

    def __init__(self):
        super().__init__(clock=None, reference=lambda: None, reference_ms=1.0)
        self.asked = []

    def compare(self, calls, effort):
        self.asked += [call() for call in calls]
        ratios = [1e3 * seconds_of(call()) for call in calls]
        return [Timing(ratio, ratio, ratio, ratio, 6, 0) for ratio in ratios]


def family(*dense, aligned=1) -> Family:
    least = (1,) * len(dense[0])
    return Family("a family", "convolution", dense, least, least, aligned, make=lambda values: lambda: tuple(values))


def errors(table, values):
    columns = np.array(values, dtype=np.float64).T
    places = [place(axis, table.aligned, own) for axis, own in zip(table.axes, columns, strict=True)]
    return np.abs(interpolate(table, places) / [1e3 * seconds_of(v) for v in values] - 1)


@pytest.mark.parametrize("aligned", [1, 8])
class TestGridsOfBottlenecks:
    """Convolutions of 24 to 144 channels and back: no layer has 144 of both."""

    DENSE = ((24, 144), (144, 24), (16, 96))

    def test_what_no_layer_can_have_is_not_run(self, aligned):
        bench = Simulated()
        measure_tables([family(*self.DENSE, aligned=aligned)], bench)
        assert max(min(values) for values in bench.asked) <= 2 * 24
        assert {144} <= {max(values) for values in bench.asked}

    def test_predictions_are_no_worse_than_on_a_grid_of_all_combinations(self, aligned):
        values = [v for most in self.DENSE for v in product(*(range(1, top + 1) for top in most))]
        (table,) = measure_tables([family(*self.DENSE, aligned=aligned)], Simulated())
        (whole,) = measure_tables([family((144, 144), aligned=aligned)], Simulated())
        own, other = errors(table, values), errors(whole, values)
        assert np.median(own) <= np.median(other) < 0.1
        assert np.quantile(own, 0.95) <= np.quantile(other, 0.95)

    def test_the_grid_is_whole(self, aligned):
        (table,) = measure_tables([family(*self.DENSE, aligned=aligned)], Simulated())
        for grid in (table.ms, table.low, table.high):
            assert grid.shape == tuple(map(len, table.axes))
            assert np.isfinite(grid).all()
            assert (grid > 0).all()


def test_steps_are_looked_for_along_lines_of_the_grid():
    (table,) = measure_tables([family((24, 144), (144, 40))], Simulated())
    assert 24 in table.axes[0]
    assert 40 in table.axes[1]


def test_an_operation_of_constant_size_is_one_number():
    (table,) = measure_tables([family((), ())], Simulated())
    assert table.axes == ()
    assert table.ms == pytest.approx(1e3 * seconds_of(()))
    assert interpolate(table, []) == pytest.approx(1e3 * seconds_of(()))


def test_families_of_three_sizes_are_whole_and_right_where_layers_are():
    dense = ((8, 8, 96), (96, 8, 8))
    (table,) = measure_tables([family(*dense)], Simulated())
    assert np.isfinite(table.ms).all()
    values = [v for most in dense for v in product(*(range(1, top + 1, 3) for top in most))]
    assert np.median(errors(table, values)) < 0.05
