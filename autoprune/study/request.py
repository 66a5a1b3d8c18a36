"""Request: the arguments of a search, checked before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.arguments import MOST_SEED, flag, positive, shown, whole_number
from autoprune.budget import Budget
from autoprune.costs import GivenCost, Latency
from autoprune.costs.given import require_functions
from autoprune.data.batch import Forward
from autoprune.data.subsets import Data
from autoprune.early_stopping.racing import Racing
from autoprune.early_stopping.successive_halving import Rungs
from autoprune.evaluators import Evaluator
from autoprune.execution import Executor
from autoprune.files.access import as_path
from autoprune.importance.expected_loss import PRIORS
from autoprune.metrics.metric import Metric
from autoprune.optimizers import Problem
from autoprune.protocols import Optimizer
from autoprune.search_spaces import Settings
from autoprune.structure.outputs import require_selecting
from autoprune.study.convergence import most
from autoprune.study.start import Start

ANYWAY = "anyway"
"""Value of ``resume`` that continues in spite of differences; also the key in the journal of these."""


@dataclass(frozen=True)
class Request:
    """Arguments of `autoprune.search`, which documents them.

    Numbers, flags and paths are converted to their plain types here, and refused if they are out of range; what a name
    stands for is made by the set-up.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If it is out of range.
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
    start: Start | Sequence[Start]
    forward: Forward | None
    example_inputs: Any
    outputs: Any
    executor: str | Executor
    run_dir: str | Path | None
    resume: bool | str
    progress: bool
    checks: str
    rewrite: str
    costs: Mapping[str, GivenCost] | None
    cost_batch: int
    prior: str
    racing: bool | Racing | Rungs
    latency: Latency | str | Path | None
    labels: str | None

    def __post_init__(self) -> None:
        total = most(self.trials)
        self._fill("trials", self.trials if isinstance(self.trials, str) else total)
        self._fill("seed", whole_number("seed", self.seed, 0, MOST_SEED))
        if self.max_seconds is not None:
            self._fill("max_seconds", positive("max_seconds", self.max_seconds, " or None"))
        anyway = isinstance(self.resume, str) and self.resume == ANYWAY
        self._fill("resume", ANYWAY if anyway else flag("resume", self.resume, "or 'anyway'"))
        self._fill("progress", flag("progress", self.progress))
        if not isinstance(self.run_dir, str | os.PathLike | None):
            raise TypeError(f"run_dir must be the path of a folder or None, got {shown(self.run_dir)}")
        self._fill("run_dir", None if self.run_dir is None else str(as_path(self.run_dir, "run_dir")))
        if self.resume and self.run_dir is None:
            raise ValueError("resume=True needs the run_dir of an earlier search, got run_dir=None")
        if self.labels is not None and self.data is not None:
            data = self.data if isinstance(self.data, Data) else Data(validation=self.data)
            self._fill("data", replace(data, labels=self.labels))
        self._fill("cost_batch", whole_number("cost_batch", self.cost_batch, 1))
        require_functions({} if self.costs is None else self.costs)
        require_selecting(self.forward, self.outputs)
        if not isinstance(self.prior, str) or self.prior not in PRIORS:
            raise ValueError(f"prior must be one of {list(PRIORS)}, got {shown(self.prior)}")

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
    def functions(self) -> dict[str, Any]:
        """The arguments that run and judge models, by name."""
        given = {"metric": self.metric, "forward": self.forward, "outputs": self.outputs}
        return given | {f"costs[{name!r}]": function for name, function in (self.costs or {}).items()}
