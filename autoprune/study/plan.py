"""Plan of a search before its first trial: its size, its time and memory, and what the prior expects at the budget."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from torch import nn

from autoprune.arguments import pointing
from autoprune.evaluators import AdaptiveBN, Compensated
from autoprune.evaluators.activation_cache.limits import room_beside
from autoprune.evaluators.adaptive_bn import statistics
from autoprune.execution import evaluate_one, execution_of
from autoprune.optimizers import Problem, uniform_seeds
from autoprune.optimizers.history import Archive
from autoprune.optimizers.knapsack.relinearise import front_of
from autoprune.optimizers.knapsack.sensitivity import table_of
from autoprune.protocols import IntArray, Measurement
from autoprune.structure.call import call_of
from autoprune.study.convergence import Deadline
from autoprune.study.request import PLACES, Request
from autoprune.study.setup import set_up
from autoprune.study.start import start_of
from autoprune.study.study import Study

_FAR = 100 * 365 * 86_400.0  # seconds that no date is told of

DEFAULTS: dict[str, Any] = {
    "metric": "auto",
    "space": "channels",
    "evaluator": "auto",
    "optimizer": "auto",
    "trials": 200,
    "max_seconds": None,
    "seed": 0,
    "start": (),
    "example": None,
    "costs": None,
    "early_stopping": "auto",
    "execution": "local",
}
"""The further arguments of `autoprune.search` with their defaults."""

_MINUTE, _HOUR, _DAY = 60, 3600, 86_400


@dataclass(frozen=True)
class Plan:
    """Plan of a search: what `autoprune.plan` found without it.

    Attributes:
        space: Description of the dimensions, with the number of candidates.
        dimensions: Number of dimensions that have a choice.
        trials: Candidates that the search would evaluate, the most if it is to stop where it has converged.
        seconds_set_up: Time that analysis, ranking and preparation took here.
        seconds_per_trial: Time of one evaluation in this process, mean of the candidates that were timed.
        seconds: Time of the whole search in one process, without the calibration check of ``evaluator="auto"``; no more
            than ``max_seconds``.
        memory_bytes: Most memory that this process has taken so far; None where the system does not say.
        shared_bytes: Most memory that shared computation may add.
        metric: Name of the metric.
        dense_score: Score of the dense model on the validation samples.
        uniform_score: The same of uniform pruning at the budget; NaN if that failed.
        expected_score: The same of the candidate that the prior chooses at the budget; NaN if that failed.
        expected_loss: Loss that the prior expects of that candidate, as a share of what it expects of uniform pruning;
            None without a prior.
        notes: Decisions of the set-up, in plain words.
    """

    space: str
    dimensions: int
    trials: int
    seconds_set_up: float
    seconds_per_trial: float
    seconds: float
    memory_bytes: int | None
    shared_bytes: int
    metric: str
    dense_score: float
    uniform_score: float
    expected_score: float
    expected_loss: float | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"search over {self.space}",
            f"{self.trials} trials of {lasting(self.seconds_per_trial)} after a set-up of "
            f"{lasting(self.seconds_set_up)}: {lasting(self.seconds)} in one process, "
            f"until {_end(self.seconds)} if begun now",
            _memory(self.memory_bytes, self.shared_bytes),
            f"{self.metric} at the budget: {self.expected_score:.4f} as the prior chooses, {self.uniform_score:.4f} "
            f"pruned uniformly, {self.dense_score:.4f} dense",
        ]
        if self.expected_loss is not None:
            lines.append(_expected(self.expected_loss))
        return "\n".join((*lines, *(f"- {note}" for note in self.notes)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON, which has no NaN: None in its place."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()
        }


@pointing(PLACES)
def plan(model: nn.Module, budget: Any, data: Any = None, **options: Any) -> Plan:
    """Plan a search: dimensions, seconds a trial, when it would be done, memory, and what to expect at the budget.

    The search is set up as `autoprune.search` does it, but for the calibration check of ``evaluator="auto"``, in place
    of which ``"compensated"`` is taken. Then two candidates at the budget are evaluated and timed: uniform pruning, and
    the one of least expected loss by the prior. Under a limit on latency the table is measured first, as in the search.

    Args:
        model: As in `autoprune.search`; it comes back unchanged.
        budget: As there.
        data: As there.
        options: Its other arguments, with the same defaults.

    Returns:
        The plan, which prints as text.

    Raises:
        TypeError: If `options` names an argument that a search does not have.
        ValueError: And the other errors that `autoprune.search` raises before its first trial.

    Example:
        >>> print(autoprune.plan(model, "flops <= 50%", (images, labels), trials=100))  # doctest: +SKIP
    """
    began = time.monotonic()
    if unknown := options.keys() - DEFAULTS.keys():
        raise TypeError(f"plan() takes the arguments of autoprune.search, {sorted(DEFAULTS)}, got {sorted(unknown)}")
    given = {**DEFAULTS, **options}
    groups = {
        "start": start_of(given["start"]),
        "example": call_of(given["example"]),
        "execution": execution_of(given["execution"]),
        "evaluator": "compensated" if given["evaluator"] == "auto" else given["evaluator"],
    }
    request = Request(**{**given, **groups, "model": model, "budget": budget, "data": data})
    study = set_up(request, Deadline(began, request.max_seconds))
    set_up_seconds = time.monotonic() - began
    outcomes = [evaluate_one(study.evaluator, row) for row in (uniform_at(study.problem), expected_at(study.problem))]
    measured = [outcome for outcome in outcomes if isinstance(outcome, Measurement)]
    each = float(np.mean([outcome.seconds for outcome in measured or [study.dense]]))
    scores = [float(o.metric.mean()) if isinstance(o, Measurement) else float("nan") for o in outcomes]
    whole = set_up_seconds + request.most * each
    return Plan(
        space=study.context.space.describe(),
        dimensions=int(np.count_nonzero(study.problem.sizes > 1)),
        trials=request.most,
        seconds_set_up=set_up_seconds,
        seconds_per_trial=each,
        seconds=whole if request.max_seconds is None else min(whole, request.max_seconds),
        memory_bytes=peak_memory(),
        shared_bytes=room_beside(study.context.model),
        metric=study.context.judge.name,
        dense_score=float(study.dense.metric.mean()),
        uniform_score=scores[0],
        expected_score=scores[1],
        expected_loss=expected_loss(study.problem),
        notes=study.notes,
    )


def line_of(study: Study) -> str:
    """Plan of a search that is set up, in a line; from the time of the dense model, so that nothing is evaluated."""
    request = study.request
    samples = study.context.subsets.samples
    adapts = isinstance(study.evaluator, AdaptiveBN | Compensated) and statistics(study.context.model)
    each = study.dense.seconds * (1 + (samples["calibration"] / samples["validation"] if adapts else 0.0))
    whole = each * request.most if request.max_seconds is None else min(each * request.most, request.max_seconds)
    most = "up to " if request.adaptive else ""
    share = expected_loss(study.problem)
    told = [
        f"{np.count_nonzero(study.problem.sizes > 1)} dimensions, {most}{request.most} trials of at most about "
        f"{lasting(each)}, done by about {_end(whole)} ({lasting(whole)}) in one process",
        _memory(peak_memory(), room_beside(study.context.model)),
        *([] if share is None else [_expected(share)]),
    ]
    return "plan: " + "; ".join(told)


def _end(seconds: float) -> str:
    """Time of day at which this many seconds from now are over, with the date if that is another day."""
    if seconds >= _FAR:
        return "more than a hundred years from now"
    now = datetime.now()
    end = now + timedelta(seconds=seconds)
    return f"{end:%H:%M}" if end.date() == now.date() else f"{end:%Y-%m-%d %H:%M}"


def uniform_at(problem: Problem) -> IntArray:
    """Uniform pruning at the budget, shape (d,)."""
    candidate: IntArray = uniform_seeds(problem, (1.0,))[-1]
    return candidate


def expected_at(problem: Problem) -> IntArray:
    """Candidate of least expected loss at the budget, by the prior, or by shares of the cost without one; (d,)."""
    table = table_of(problem, Archive(problem, 0).probes())
    candidate: IntArray = front_of(problem, table.losses, problem.limits[None])[0]
    return candidate


def expected_loss(problem: Problem) -> float | None:
    """Loss that the prior expects of its choice at the budget, as a share of that of uniform pruning."""
    if problem.prior is None:
        return None
    sums = [
        sum(float(problem.prior[j][option]) for j, option in enumerate(candidate))
        for candidate in (expected_at(problem), uniform_at(problem))
    ]
    return sums[0] / sums[1] if sums[1] > 0 else None


def peak_memory() -> int | None:
    """Most memory that this process has taken, in bytes; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def lasting(seconds: float) -> str:
    """A time in words, to two digits."""
    if seconds < 2 * _MINUTE:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    for unit, name, below in ((_MINUTE, "min", 2 * _HOUR), (_HOUR, "h", 2 * _DAY)):
        if seconds < below:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / _DAY:.0f} days"


def _memory(taken: int | None, shared: int) -> str:
    so_far = "memory" if taken is None else f"memory {taken / 1e6:.0f} MB so far"
    return f"{so_far}, and up to {shared / 1e6:.0f} MB for what candidates share"


def _expected(share: float) -> str:
    return f"the prior expects its choice at the budget to lose {share:.0%} of what uniform pruning loses there"
