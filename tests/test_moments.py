"""Moments of what layers read, and what ridges are judged on."""

import numpy as np
import pytest
import torch

from autoprune.evaluators.refit.layers import Layer
from autoprune.evaluators.refit.ridges import _judges, _some_outputs
from autoprune.importance.moments import BLOCKED, Moments
from autoprune.importance.reading import Reader


@pytest.mark.parametrize("columns", [5, BLOCKED - 1, BLOCKED, 2 * BLOCKED + 7])
@pytest.mark.parametrize("centred", [True, False])
def test_products_are_those_of_all_rows_also_of_rows_that_come_later(columns: int, centred: bool):
    rows = 3 + torch.randn(300, columns, generator=torch.Generator().manual_seed(0))
    moments = Moments(columns, 0)
    for part in (rows[:100], rows[100:250]):
        moments.add(part)
    moments.products(centred)  # completes what is computed of them
    moments.add(rows[250:])
    exact = rows.double().numpy()
    expected = np.cov(exact, rowvar=False, bias=True) if centred else exact.T @ exact / len(exact)
    found = moments.products(centred).double()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, found.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outputs", [1, 128, 129, 1000])
def test_ridges_are_judged_on_few_outputs_spread_over_a_weight(outputs: int):
    some = _some_outputs(torch.arange(outputs)[:, None]).flatten()
    assert min(outputs, 64) <= len(some) <= 128
    assert some[0] == 0
    steps = some.diff().unique()
    assert len(steps) <= 1
    assert outputs - some[-1] <= (steps[0] if len(steps) else 1)


def judged(names: list[str], stay: list[int]) -> dict[str, str]:
    """For each layer of the same sizes, with this number of columns that stay, the one whose ridge it takes."""
    readers = [Reader(f"{name}.weight", 0, 4, 6, 1) for name in names]
    kept = {reader: torch.arange(many) for reader, many in zip(readers, stay, strict=True)}
    found = _judges({reader: [Layer(reader, Moments(6, 0))] for reader in readers}, kept, lambda _: False)
    return {first.name[:-7]: judge.name[:-7] for first, judge in found.items()}


def test_of_many_equal_blocks_some_judge_the_ridges_of_those_next_to_them():
    names = [f"blocks.{i}.{part}" for i in range(30) for part in ("up", "down")]
    found = judged(names, [3] * 60)
    assert found.keys() == set(names)
    assert len(set(found.values())) == 16
    for name, judge in found.items():
        (_, i, part), (_, j, other) = name.split("."), judge.split(".")
        assert part == other
        assert abs(int(i) - int(j)) <= 2
    assert all(found[judge] == judge for judge in found.values())


def test_ridges_of_few_or_of_differently_cut_layers_are_their_own():
    names = [f"blocks.{i}.up" for i in range(12)]
    assert judged(names[:8], [3] * 8) == {name: name for name in names[:8]}
    assert judged(names, [3, 4] * 6) == {name: name for name in names}
