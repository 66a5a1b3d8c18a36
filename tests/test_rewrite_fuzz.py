"""Random networks whose code takes sizes from shapes: what is built is right, at other input sizes too."""

import pytest
from hypothesis import HealthCheck, given, settings

from tests.rewriting import TOKEN_SPECS, Attend, ClassToken, Plain, Rewritten, TokenSpec, Windows, check_tokens

NETWORKS = 12  # benchmarks.structure.fuzz_rewriting runs more


@pytest.mark.slow
def test_random_networks_with_rewritten_modules_are_built_right():
    total = Rewritten()

    @settings(
        max_examples=NETWORKS,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(TOKEN_SPECS)
    def run(spec: TokenSpec) -> None:
        total.add(check_tokens(spec, candidates=1))

    run()
    assert total.networks >= NETWORKS
    assert total.graphs >= total.networks / 2
    assert total.stuck == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        TokenSpec((Windows(Attend(2, "convolved", "fused"), shift=1), Plain("gate"))),
        TokenSpec((Attend(2, "reduced", "temperature", "contiguous"), ClassToken(4)), width=16),
        TokenSpec((Attend(2, "chunked", "talking"),), tied=True),
    ],
    ids=repr,
)
def test_small_networks_are_built_right_and_their_residual_width_is_free(spec: TokenSpec):
    assert check_tokens(spec).stuck == 0
