"""Every trial within every limit, whatever is limited."""

import math

import numpy as np
import pytest

from autoprune import Channels
from tests.oracle import count_macs
from tests.searching import (
    WITH_AND_WITHOUT_PROBES,
    Watched,
    assert_costs_are_exact,
    assert_within_the_limits_or_probes,
    quick,
    undominated,
)

EIGHTHS = Channels(step=0.125, min_fraction=0.125)


@pytest.mark.slow
@WITH_AND_WITHOUT_PROBES
def test_no_candidate_over_the_budget_is_evaluated_but_probes(mlp, vectors, optimizer, probes):
    evaluator = Watched()
    result = quick(mlp, "flops <= 30%", vectors, trials=30, evaluator=evaluator, optimizer=optimizer)
    dense, *evaluated = evaluator.candidates
    assert dense == [0, 0, 0]
    assert [tuple(candidate) for candidate in evaluated] == [trial.candidate for trial in result.trials]
    assert [t.feasible for t in result.trials] == [
        count_macs(result.build(t), (vectors[0][:1],)) <= 0.3 * 5616 for t in result.trials
    ]
    assert_within_the_limits_or_probes(result, probes)


@pytest.mark.slow
@WITH_AND_WITHOUT_PROBES
def test_two_limits_hold_together_and_span_the_front(digits_model, digits, data, optimizer, probes):
    result = quick(digits_model, ["flops <= 60%", "params <= 40%"], data, trials=24, optimizer=optimizer)
    assert list(result.limits) == ["flops", "params"]
    assert_costs_are_exact(result, (digits.validation[0],))
    assert_within_the_limits_or_probes(result, probes)
    assert {trial.id for trial in result.front} == undominated(result)


@pytest.mark.slow
@WITH_AND_WITHOUT_PROBES
def test_memory_is_a_budget(digits_model, data, optimizer, probes):
    result = quick(digits_model, "memory_bytes <= 45KB", data, trials=16, cost_batch=2, optimizer=optimizer)
    assert result.limits == {"memory_bytes": 45_000}
    for trial in result.trials:
        state = sum(t.numel() * t.element_size() for t in result.build(trial).state_dict().values())
        assert state < trial.costs["memory_bytes"]
    assert_within_the_limits_or_probes(result, probes)


@pytest.mark.slow
@WITH_AND_WITHOUT_PROBES
def test_a_cost_of_the_users_that_is_a_staircase_is_a_budget(mlp, vectors, optimizer, probes):
    def energy(candidates):
        return 2.5 * np.ceil((24 - candidates.indices.sum(axis=1)) / 3)

    options = {"space": EIGHTHS, "costs": {"energy_mj": energy}, "optimizer": optimizer}
    result = quick(mlp, "energy_mj <= 50%", vectors, trials=20, **options)
    assert result.limits == {"energy_mj": 10.0}
    for trial in result.trials:
        assert trial.costs["energy_mj"] == 2.5 * math.ceil((24 - sum(trial.candidate)) / 3)
    assert_within_the_limits_or_probes(result, probes)
    assert {trial.id for trial in result.front} == undominated(result)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["auto", "nsga2", "knapsack", "level_switch"])
def test_a_cost_that_is_zero_for_the_dense_model_is_a_budget(mlp, vectors, tmp_path, optimizer):
    waste = {"waste": lambda candidates: (candidates.indices % 3).sum(axis=1)}
    result = quick(mlp, "waste <= 3", vectors, trials=20, costs=waste, optimizer=optimizer)
    assert all(trial.costs["waste"] <= 3 for trial in result.trials)
    assert "waste" in str(result)
    result.plot(tmp_path / "front.png")


def test_a_range_keeps_the_search_near_its_limit(mlp, vectors):
    result = quick(mlp, "45% <= params <= 50%", vectors, trials=12, optimizer="random")
    shares = [trial.costs["params"] / result.dense.costs["params"] for trial in result.trials]
    everywhere = quick(mlp, "params <= 50%", vectors, trials=12, optimizer="random")
    wide = [trial.costs["params"] / everywhere.dense.costs["params"] for trial in everywhere.trials]
    assert max(shares) <= 0.5
    assert min(shares) >= 0.38, "a step of a layer below the range"
    assert min(wide) < 0.3
