"""Candidates that are changed one entry at a time, under their true costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np

from autoprune.costs.changes import Counted, LimitedCosts
from autoprune.protocols import FloatArray, IntArray

if TYPE_CHECKING:
    from autoprune.optimizers.problem import Problem

_ENTRIES_AT_ONCE = 2**18  # of one cost call: bounds its memory to a few megabytes, which also stay in the cache


def position_of(problem: Problem, candidates: IntArray) -> Counted | Recounted:
    """Make candidates (n, d) to change one entry at a time, in the fastest way that the costs allow."""
    return counted(problem, candidates) or Recounted(problem, candidates)


def counted(problem: Problem, candidates: IntArray) -> Counted | None:
    """Make them with updated costs, if the cost function can compute single changes; else None."""
    costs = problem.cost_function
    return costs.at(candidates) if isinstance(costs, LimitedCosts) else None


def adding_up(problem: Problem, candidates: IntArray) -> Counted | None:
    """Make them so where no entry makes another irrelevant, too: what single entries lose is then lost together."""
    costs = problem.cost_function
    return counted(problem, candidates) if isinstance(costs, LimitedCosts) and costs.adds_up else None


@final
class Recounted:
    """Candidates whose costs are computed from scratch after each change, which is right for any cost.

    Args:
        problem: Gives the costs and the canonical form.
        candidates: Shape (n, d); copied.

    Attributes:
        candidates: The candidates after all moves so far, shape (n, d).
    """

    def __init__(self, problem: Problem, candidates: IntArray) -> None:
        self._problem = problem
        self.candidates = candidates.copy()

    def after(self, row: IntArray, dim: IntArray, option: IntArray) -> FloatArray:
        """Costs of candidate ``row[i]`` with entry ``dim[i]`` at ``option[i]``, shape (k, c)."""
        costs = np.empty((len(row), len(self._problem.limits)))
        chunk = max(1, _ENTRIES_AT_ONCE // self.candidates.shape[1])
        for start in range(0, len(row), chunk):
            part = slice(start, start + chunk)
            changed = self.candidates[row[part]]
            changed[np.arange(len(changed)), dim[part]] = option[part]
            costs[part] = self._problem.costs(changed)
        return costs

    def move(self, row: IntArray, dim: IntArray, option: IntArray) -> None:
        """Apply such changes, at most one in each candidate."""
        self.candidates[row, dim] = option
