"""Prior check: choose the expected losses whose best candidate at the budget scores best.

Priors that are measured in different ways differ most in how they divide the budget between layers. Each proposes one
candidate at the budget, by the knapsack, and these are scored as the search would score them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from autoprune.evaluators import Evaluator
from autoprune.execution.local import evaluate_one
from autoprune.optimizers import Problem
from autoprune.optimizers.knapsack.relinearise import front_of, reachable
from autoprune.protocols import Failure, FloatArray, IntArray

log = logging.getLogger(__name__)

Losses = tuple[FloatArray, ...]
"""Expected loss of every option of every dimension."""

_SHARE = 0.7
"""Share of the dense costs that candidates keep where the limits hold no candidate back."""

_OF_BUDGET = (1.0, 0.75, 0.5)
"""Shares of the limits at which priors propose candidates, until two of them differ."""


@dataclass(frozen=True)
class ChosenPrior:
    """Outcome of a check.

    Attributes:
        losses: The prior; None where there is none.
        note: Figures; empty where there was nothing to choose.
    """

    losses: Losses | None
    note: str = ""


def choose_prior(evaluator: Evaluator, problem: Problem, priors: Mapping[str, Losses]) -> ChosenPrior:
    """Score the candidate of each prior at the budget, and take the prior with the lowest mean signal.

    Args:
        evaluator: Prepared.
        problem: Its own prior is ignored.
        priors: By name; the first wins a tie, and where no candidate can be scored. Where all propose the same at the
            limits, they propose at less.
    """
    if len(priors) < 2:
        return ChosenPrior(next(iter(priors.values()), None))
    for share in _OF_BUDGET:
        proposed = {name: _proposed(problem, losses, share) for name, losses in priors.items()}
        different = {candidate.tobytes(): candidate for candidate in proposed.values()}
        if len(different) > 1:
            break
    else:
        return ChosenPrior(next(iter(priors.values())), "prior check: all priors propose the same")
    signals = {}
    for key, candidate in different.items():
        outcome = evaluate_one(evaluator, candidate)
        signals[key] = np.inf if isinstance(outcome, Failure) else float(outcome.signal.mean())
    found = {name: signals[candidate.tobytes()] for name, candidate in proposed.items()}
    best = min(found, key=lambda name: found[name])
    figures = "; ".join(f"{name} {signal:.4g}" for name, signal in found.items())
    where = "the budget" if share == 1 else f"{share:.0%} of the budget, above which all propose the same"
    note = f"prior check, the knapsack's candidate at {where} (lower is better): {figures}; chosen: {best}"
    return ChosenPrior(priors[best], note)


def _proposed(problem: Problem, losses: Losses, share: float) -> IntArray:
    """Candidate with the least sum of expected losses at a share of the limits, shape (d,)."""
    dense = problem.costs(np.zeros((1, len(problem.sizes)), dtype=np.int64))
    binding = (dense > problem.limits).any()
    budgets = reachable(problem, share * (problem.limits[None] if binding else _SHARE * dense))
    front = front_of(replace(problem, prior=losses), losses, budgets)
    candidate: IntArray = front[0]
    return candidate
