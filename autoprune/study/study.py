"""Study: one search, ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autoprune.budget import Budget
from autoprune.costs import CostFunction, Latency
from autoprune.costs.memory.peak import PeakMemory
from autoprune.early_stopping.racing import Rule
from autoprune.evaluators import Context, Evaluator
from autoprune.evaluators.scoring.untouched import Untouched
from autoprune.optimizers import Problem
from autoprune.protocols import FloatArray, IntArray, Measurement
from autoprune.structure.example import Example
from autoprune.study.calibration_check import Choice
from autoprune.study.convergence import Deadline
from autoprune.study.request import Request

TIMED = ("latency_ms", "ms_per_sample")
"""Costs that are predicted, and measured on the networks of the front."""


@dataclass(frozen=True)
class Study:
    """One search, ready to run; made by `autoprune.study.setup.set_up`.

    Attributes:
        request: The arguments that it was set up from.
        deadline: End of its time, if that is limited.
        context: Context of evaluators and workers.
        evaluator: Prepared on the context.
        fresh: The same evaluator before that, for workers.
        problem: Problem of the optimizer.
        costs: Every cost by name, of candidates (n, d).
        budget: As parsed.
        limits: The limited costs, absolute, in the order of the budget. A budget of score limits alone limits the
            minimised cost to that of the dense model.
        dense: Measurement of the dense model on the validation samples.
        worst_score: The worst score that the budget allows, in the metric's direction; None if it limits costs alone.
        racing: Rule by which candidates are stopped early; None if none is.
        notes: Decisions, in plain words.
        untouched: Sees whether an evaluator of the user's writes to the dense model.
        priced: The call that latencies and memory are measured on, if they are: a batch of the size that costs are
            stated at, without the copy of it that the forward of the context makes.
        latency: Predicts latencies; None if they are not limited, or the user gives a function for them.
        memory: Predicts the peak of memory; None if it is not limited, or cannot be measured.
        choice: Choice of the calibration check, to be written once the search begins; None without one.
    """

    request: Request
    deadline: Deadline
    context: Context
    evaluator: Evaluator
    fresh: Evaluator
    problem: Problem
    costs: Mapping[str, CostFunction]
    budget: Budget
    limits: Mapping[str, float]
    dense: Measurement
    worst_score: float | None
    racing: Rule | None
    notes: tuple[str, ...]
    untouched: Untouched
    priced: Example
    latency: Latency | None
    memory: PeakMemory | None
    choice: Choice | None

    def costs_of(self, candidates: IntArray) -> dict[str, FloatArray]:
        """Every cost of candidates (n, d) by name, shape (n,) each."""
        canonical = self.problem.canonical(candidates)
        return {name: cost(canonical) for name, cost in self.costs.items()}
