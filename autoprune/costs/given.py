"""Costs that the user gives as functions of candidates, checked before the search."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from autoprune.arguments import shown, why_no_function
from autoprune.budget import ALIASES, THROUGHPUT
from autoprune.costs.candidates import GivenCost
from autoprune.costs.latency.model import Latency
from autoprune.costs.structural import CostFunction
from autoprune.protocols import SearchSpace


def require_costs(costs: Mapping[str, GivenCost | Latency | str | Path]) -> None:
    """Check that costs are functions by name, under names that no other cost has; latencies may be a table instead.

    Raises:
        ValueError: Names the cost.
    """
    if not isinstance(costs, Mapping):
        raise ValueError(f"costs must be functions by name, such as {{'energy_mj': function}}, got {shown(costs)}")
    for name, function in costs.items():
        if not isinstance(name, str):
            raise ValueError(f"costs must have names of text, such as 'energy_mj', got {shown(name)}")
        table = name == "latency_ms" and isinstance(function, Latency | str | Path)
        if not table and (why := why_no_function(function, 1)):
            or_table = ", a table of autoprune.profile or its file" if name == "latency_ms" else ""
            raise ValueError(f"costs[{name!r}] must be a function of n candidates giving (n,){or_table}, {why}")
        if name in (*ALIASES, THROUGHPUT, "ms_per_sample"):
            raise ValueError(
                f"costs must not hold {name!r}, which budgets take for another cost; call a latency 'latency_ms', in "
                "milliseconds of cost_batch samples, which limits on throughput follow, and choose another name else"
            )


def require_steady(costs: Mapping[str, CostFunction], space: SearchSpace) -> None:
    """Check that a user's cost depends on the candidate alone, and neither on the call nor on the other candidates.

    Raises:
        ValueError: Names the cost, and its value.
    """
    ends = np.concatenate([np.zeros((1, len(space.sizes)), dtype=np.int64), space.canonical(space.sizes[None] - 1)])
    for name, cost in costs.items():
        seen = [np.concatenate([cost(ends[:1]), cost(ends[1:])]), cost(ends), cost(ends)]
        for other in seen[1:]:
            if not np.allclose(seen[0], other, rtol=1e-6, atol=0):
                raise ValueError(
                    f"costs[{name!r}] must give the same for the same candidate, got {shown(seen[0].tolist())} and "
                    f"then {shown(other.tolist())} for {shown(ends.tolist())}; leave out what is random or counts calls"
                )
