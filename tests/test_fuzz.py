"""Random networks: what is built from any of them is right, and little of them stays without need."""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzzing import (
    MOST_FROZEN,
    SPECS,
    Attention,
    Conv,
    Halves,
    Norm,
    PixelShuffle,
    Shuffle,
    Spec,
    Tally,
    Transposed,
    check,
)

NETWORKS = 200


@pytest.mark.slow
def test_two_hundred_random_networks_are_built_right_and_at_most_a_tenth_of_their_layers_stays():
    total = Tally()

    @settings(
        max_examples=NETWORKS,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(SPECS)
    def run(spec: Spec) -> None:
        total.add(check(spec))

    run()
    assert total.networks >= NETWORKS
    assert total.frozen <= MOST_FROZEN * total.producers


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        Spec((Attention(4, "module"), Attention(2, "stacked"), Attention(2, "separate"), Attention(2)), width=16),
        Spec((PixelShuffle(up=False), Halves("gate"), Transposed(8, groups=2), Conv(12, 3, groups=4), Norm("group"))),
        Spec((Conv(16, groups=2), Shuffle(2), Conv(12, groups=2), Halves("inner")), width=12),
        Spec((Norm("layer"), Conv(8)), head="flatten"),
        Spec((Shuffle(2),)),
        Spec((Conv(16), Shuffle(2), Conv(12))),
    ],
    ids=repr,
)
def test_small_networks_are_built_right_and_nothing_of_them_stays(spec: Spec):
    assert check(spec, candidates=6).frozen == 0
