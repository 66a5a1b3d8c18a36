"""Request: the arguments of a search, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.arguments import MOST_SEED, positive, whole_number
from autoprune.budget import Budget
from autoprune.costs import GivenCost, Latency
from autoprune.costs.given import require_costs
from autoprune.early_stopping.racing import Racing
from autoprune.early_stopping.successive_halving import Rungs
from autoprune.evaluators import Evaluator
from autoprune.execution import Execution
from autoprune.metrics.metric import Metric
from autoprune.optimizers import Problem
from autoprune.protocols import Optimizer
from autoprune.search_spaces import Channels, Settings
from autoprune.structure import call
from autoprune.structure.call import Call
from autoprune.study.convergence import most
from autoprune.study.start import Start

PLACES = {
    **call.PLACES,
    **{field.name: f"execution=autoprune.Execution({field.name}=...)" for field in fields(Execution)},
    **{field.name: f"start=autoprune.Start({field.name}=...)" for field in fields(Start)},
    **{field.name: f"space=autoprune.search_spaces.Channels({field.name}=...)" for field in fields(Channels)},
    "racing": "early_stopping=...",
    "latency": "costs={'latency_ms': ...}",
    "labels": "data=autoprune.Data(labels=...)",
}
"""Places of what is part of an argument of `autoprune.search`, for messages."""


@dataclass(frozen=True)
class Request:
    """Arguments of `autoprune.search`, which documents them.

    Numbers are converted to their plain types here, and refused if they are out of range; groups of arguments have done
    the same for theirs. What a name stands for is made by the set-up.

    Raises:
        ValueError: If an argument is out of range.
    """

    model: nn.Module
    budget: str | Budget | Sequence[str | Budget]
    data: Any
    metric: str | Metric | Callable[..., Any]
    space: str | Settings
    evaluator: str | Evaluator
    optimizer: str | Optimizer | Callable[[Problem, int], Optimizer]
    trials: int | str
    max_seconds: float | None
    seed: int
    start: Start
    example: Call
    costs: Mapping[str, GivenCost | Latency | str | Path] | None
    early_stopping: bool | str | Racing | Rungs
    execution: Execution

    def __post_init__(self) -> None:
        total = most(self.trials)
        self._fill("trials", self.trials if isinstance(self.trials, str) else total)
        self._fill("seed", whole_number("seed", self.seed, 0, MOST_SEED))
        if self.max_seconds is not None:
            self._fill("max_seconds", positive("max_seconds", self.max_seconds, " or None"))
        require_costs({} if self.costs is None else self.costs)

    def _fill(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def most(self) -> int:
        """Most candidates to evaluate."""
        return most(self.trials)

    @property
    def adaptive(self) -> bool:
        """True if the search ends where it has converged."""
        return self.trials == "auto"

    @property
    def cost_functions(self) -> dict[str, GivenCost]:
        """The costs that are functions, by name."""
        return {name: cost for name, cost in (self.costs or {}).items() if not isinstance(cost, Latency | str | Path)}

    @property
    def latency(self) -> Latency | str | Path | None:
        """The table of latencies, or its file; None if there is none, or a function in its place."""
        given = (self.costs or {}).get("latency_ms")
        return given if isinstance(given, Latency | str | Path) else None

    @property
    def functions(self) -> dict[str, Any]:
        """The functions that run and judge models, by the names of their arguments."""
        given = {"metric": self.metric, "forward": self.example.forward, "outputs": self.example.outputs}
        return given | {f"costs[{name!r}]": function for name, function in self.cost_functions.items()}
