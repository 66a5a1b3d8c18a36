"""Stopping rules: convergence for ``trials="auto"``, and the deadline of a search."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoprune.arguments import whole_number
from autoprune.optimizers.problem import Problem
from autoprune.pareto import Direction, hypervolume, non_dominated
from autoprune.protocols import OK, RACED, FloatArray
from autoprune.result.trials import Trial, costs_of

MOST_TRIALS = 1_000
"""Most candidates that ``trials="auto"`` evaluates."""

_PLANNED = 200  # trials that optimizers plan for, or more in proportion to the dimensions
_PLANNED_A_DIMENSION = 8
_OPENING = (40, 200)  # assembled candidates before gains count, 4 for each dimension between these
_OPENING_A_DIMENSION = 4
_WINDOW = 40  # assembled candidates that gains are counted over, or this share of all
_WINDOW_SHARE = 0.25
_LEAST_GROWTH = 0.001  # of the hypervolume of the front
_LEAST_SAVING = 0.005  # of the cost of the cheapest acceptable candidate
_MARGIN = 0.1  # of the extent of the front: distance of its ends from the reference point


def most(trials: int | str) -> int:
    """Most candidates that a search evaluates.

    Raises:
        ValueError: If `trials` is neither a positive integer nor ``"auto"``.
    """
    if isinstance(trials, str) and trials == "auto":
        return MOST_TRIALS
    return whole_number("trials", trials, 1, why=", or 'auto'")


@dataclass(frozen=True)
class Deadline:
    """Deadline of a search: ``max_seconds`` after the call of `autoprune.search`.

    Attributes:
        began: Time of the call, by `time.monotonic`.
        seconds: Time that it may take; None for no limit.
    """

    began: float
    seconds: float | None = None

    @property
    def passed(self) -> bool:
        """True if the time is over."""
        return self.seconds is not None and self.spent > self.seconds

    @property
    def end(self) -> float:
        """Time by `time.monotonic` at which the time is over; infinite without a limit."""
        return math.inf if self.seconds is None else self.began + self.seconds

    @property
    def spent(self) -> float:
        """Seconds since the call."""
        return time.monotonic() - self.began

    def note_of_setup(self, setup: float, trials: int) -> tuple[str, ...]:
        """Note that the time was over before any trial, and the part that took it; otherwise empty."""
        if trials or not self.passed:
            return ()
        return (
            f"no candidate was scored within max_seconds={self.seconds:g}: tracing, measuring and scoring the dense "
            f"model took {setup:.0f} s; give more time, fewer samples with autoprune.Data(...), or a table of "
            "latencies measured once by autoprune.profile",
        )


def planned(trials: int | str, dimensions: int) -> int:
    """Number of candidates that an optimizer plans for."""
    if trials == "auto":
        return min(max(_PLANNED, _PLANNED_A_DIMENSION * dimensions), MOST_TRIALS)
    return most(trials)


def why_converged(found: Sequence[Trial], problem: Problem, worst_score: float | None, direction: Direction) -> str:
    """Give the evidence that further trials are not expected to gain anything; empty while they are.

    Gains are counted over the last quarter of the feasible candidates that change two dimensions or more, at least 40
    of them: single changes inform an optimizer, but rarely gain anything themselves. Before these come at least 40, or
    4 for each dimension up to 200, so that every optimizer is past its initial phase. The gain is that of the
    hypervolume of the front, within the budget range and scaled to its own extent; under a limit on the score, that of
    the cost of the cheapest candidate that meets it.

    Args:
        found: The trials so far, in order of arrival.
        problem: The problem searched.
        worst_score: The worst score allowed, if any.
        direction: Direction of the score.
    """
    done = [trial for trial in found if trial.status in (OK, RACED) and trial.feasible]
    assembled = [i for i, trial in enumerate(done) if np.count_nonzero(trial.candidate) > 1]
    window = max(_WINDOW, int(_WINDOW_SHARE * len(assembled)))
    if len(assembled) < window + np.clip(_OPENING_A_DIMENSION * len(problem.sizes), *_OPENING):
        return ""
    before = done[: assembled[-window]]
    name = problem.cost_names[0]
    costs = [
        min((t.costs[name] for t in part if direction.meets(t.score, worst_score)), default=np.inf)
        for part in (before, done)
    ]
    if worst_score is not None and np.isfinite(costs[1]):
        saved = 1 - costs[1] / costs[0]
        what = f"made the cheapest one that meets the score limit {saved:.2%} cheaper"
        least = _LEAST_SAVING
    else:
        saved = _growth(_points(before, problem), _points(done, problem))
        what = f"grew the front's hypervolume by {saved:.2%}"
        least = _LEAST_GROWTH
    if saved >= least:
        return ""
    return f"stopped after {len(found)} trials: the last {window} candidates {what}, less than {least:.1%}"


def why_not_converged(stopped: str, trials: int) -> str:
    """Say why a search under ``trials="auto"`` ended before it converged; empty where its user knows."""
    return {
        "exhausted": f"stopped after {trials} trials: the optimizer found no further candidate within the budget",
        "trials": f"stopped at {trials} trials, the most that trials='auto' takes, while there still were gains",
    }.get(stopped, "")


def _points(trials: Sequence[Trial], problem: Problem) -> FloatArray:
    """Signal and limited costs, where costs below the budget range count as its lower end, shape (n, 1 + c)."""
    trials = [trial for trial in trials if trial.status == OK]  # trials dropped early count as tried, without a gain
    costs = np.maximum(costs_of(trials, problem.cost_names), problem.budget_range[:, 0])
    return np.column_stack([[trial.signal for trial in trials], costs])


def _growth(before: FloatArray, after: FloatArray) -> float:
    """Growth of the hypervolume, as a share of its value before."""
    before, after = before[non_dominated(before)], after[non_dominated(after)]
    low = np.minimum(before.min(axis=0), after.min(axis=0))
    high = before.max(axis=0)
    extent = np.where(high > low, high - low, 1.0)
    volumes = [hypervolume((points - low) / extent, np.full(len(low), 1 + _MARGIN)) for points in (before, after)]
    return volumes[1] / volumes[0] - 1
