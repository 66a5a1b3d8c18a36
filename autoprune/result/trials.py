"""Trials: candidates with their measurements, and the front among them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from autoprune.metrics.statistics import Evaluation
from autoprune.pareto import Direction, non_dominated
from autoprune.protocols import FAILED, OK, PENDING, FloatArray, SearchSpace


@dataclass(frozen=True)
class Trial:
    """Candidate with all of its measurements: `proposed` first, then `finished`.

    Attributes:
        id: Number in the order proposed; -1 for the dense model.
        candidate: Option indices, length d.
        decoded: Their meaning: dimension name to option.
        costs: Every cost by name, limited or not.
        score: The metric on the validation samples, in its own direction; NaN if the trial failed.
        interval: 95 % interval of the score over samples; NaN where it is unknown.
        signal: The signal that steered the search, lower is better; breaks ties between equal scores.
        status: ``"ok"``, ``"raced"``, ``"failed"`` or ``"pending"``.
        reason: Reason why it failed or was dropped.
        test_score: The metric on held-out samples; None off the front. Reported, never used to choose.
        test_interval: 95 % interval of `test_score` over samples; None where it is unknown.
        evaluations: The measurements in order; the last one gave the score.
        feasible: Whether the `upper_costs` are within the limits of the search. Otherwise it is a probe, which measures
            the loss of one dimension, or was predicted to be within and measured to be over; never on the front.
        predicted: Predicted values of costs that were measured on the built network; empty where none was.
        cost_intervals: 95 % intervals of the costs that were measured.
    """

    id: int
    candidate: tuple[int, ...]
    decoded: Mapping[str, Any]
    costs: Mapping[str, float]
    score: float
    interval: tuple[float, float]
    signal: float
    status: str = OK
    reason: str = ""
    test_score: float | None = None
    test_interval: tuple[float, float] | None = None
    evaluations: tuple[Evaluation, ...] = ()
    feasible: bool = True
    predicted: Mapping[str, float] = field(default_factory=dict)
    cost_intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def proposed(
        cls,
        number: int,
        candidate: Sequence[int],
        space: SearchSpace,
        costs: Mapping[str, float],
        limits: Mapping[str, float],
    ) -> Trial:
        """Make the trial of a candidate, shape (d,), that is still to be scored."""
        return cls(
            id=number,
            candidate=tuple(candidate),
            decoded=space.decode(candidate),
            costs=costs,
            score=math.nan,
            interval=(math.nan, math.nan),
            signal=math.nan,
            status=PENDING,
            feasible=within(costs, limits),
        )

    def finished(
        self,
        evaluations: Sequence[Evaluation],
        status: str,
        reason: str,
        interval: tuple[float, float] = (math.nan, math.nan),
    ) -> Trial:
        """Add the measurements, of which the last one gives the score."""
        last = evaluations[-1]
        return replace(
            self,
            score=or_nan(last.metric),
            interval=interval,
            signal=or_nan(last.signal),
            status=status,
            reason=reason,
            evaluations=tuple(evaluations),
        )

    @property
    def upper_costs(self) -> Mapping[str, float]:
        """Every cost by name, with the upper end of the interval if it was measured; limits are compared with these.

        Of many measured networks, those with a favourable error meet a limit: medians just below it were over it when
        measured again.
        """
        return {**self.costs, **{name: high for name, (_, high) in self.cost_intervals.items()}}

    @property
    def distortion(self) -> float:
        """Distance of the outputs to the dense model's, by the last evaluation; NaN if it was not measured."""
        return or_nan(self.evaluations[-1].distortion) if self.evaluations else math.nan

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary; NaN becomes null."""
        return {
            **{name: getattr(self, name) for name in ("id", "status", "reason", "test_score", "feasible")},
            "candidate": list(self.candidate),
            "decoded": dict(self.decoded),
            "costs": dict(self.costs),
            "predicted": dict(self.predicted),
            "cost_intervals": {name: list(ends) for name, ends in self.cost_intervals.items()},
            "score": none_if_nan(self.score),
            "interval": [none_if_nan(end) for end in self.interval],
            "test_interval": None if self.test_interval is None else list(self.test_interval),
            "signal": none_if_nan(self.signal),
            "evaluations": [evaluation.to_json() for evaluation in self.evaluations],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """Restore what `to_json` wrote."""
        low, high = (or_nan(end) for end in data["interval"])
        tested = data.get("test_interval")
        return cls(
            **{name: data[name] for name in ("id", "status", "reason", "test_score", "decoded", "costs")},
            candidate=tuple(data["candidate"]),
            score=or_nan(data["score"]),
            interval=(low, high),
            test_interval=None if tested is None else (tested[0], tested[1]),
            signal=or_nan(data["signal"]),
            evaluations=tuple(Evaluation.from_json(evaluation) for evaluation in data["evaluations"]),
            feasible=data.get("feasible", True),  # results saved before there were probes
            predicted=data.get("predicted", {}),
            cost_intervals={name: (low, high) for name, (low, high) in data.get("cost_intervals", {}).items()},
        )


def none_if_nan(value: float) -> float | None:
    """Convert NaN to None, which JSON and SQLite can hold."""
    return None if math.isnan(value) else value


def or_nan(value: float | None) -> float:
    """Convert None to NaN: the inverse of `none_if_nan`."""
    return math.nan if value is None else float(value)


def within(costs: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Return whether no cost is over its limit."""
    return all(costs[name] <= limit for name, limit in limits.items())


def costs_of(trials: Sequence[Trial], names: Sequence[str]) -> FloatArray:
    """Costs of n trials by c names, shape (n, c)."""
    rows = [[trial.costs[name] for name in names] for trial in trials]
    return np.array(rows, dtype=np.float64).reshape(len(trials), len(names))


def note_of_failures(trials: Sequence[Trial]) -> str:
    """Note on the number of failed trials, with the commonest reason; empty if none failed."""
    reasons = Counter(trial.reason for trial in trials if trial.status == FAILED)
    if not reasons:
        return ""
    ((reason, count),) = reasons.most_common(1)
    often = f", {count} of them with" if count < reasons.total() else " with"
    return f"{reasons.total()} of {len(trials)} trials failed{often} {reason}"


def note_of_probes(trials: Sequence[Trial]) -> tuple[str, ...]:
    """Note on the number of probes, in plain words; empty if there are none."""
    # Latencies that are predicted again may put others over a limit too.
    probes = sum(not t.feasible and not t.predicted and np.count_nonzero(t.candidate) <= 1 for t in trials)
    why = "over a limit, to learn what one dimension costs; they are never on the front"
    return (f"{probes} of {len(trials)} trials are probes: {why}",) if probes else ()


def find_front(trials: Sequence[Trial], limited: Sequence[str], direction: Direction) -> tuple[Trial, ...]:
    """Find the feasible trials that no other dominates, by the first limited cost.

    Scores compare by the metric and, where that ties, as it often does on a few hundred samples, by the signal.
    """
    done = [trial for trial in trials if trial.status == OK and trial.feasible]
    if not done:
        return ()
    score = np.array([(direction.key(t.score), t.signal) for t in done])
    _, rank = np.unique(score, axis=0, return_inverse=True)
    keep = non_dominated(np.column_stack([rank.reshape(-1), costs_of(done, limited)]))
    front = [trial for trial, kept in zip(done, keep, strict=True) if kept]
    return tuple(sorted(front, key=lambda trial: (*(trial.costs[name] for name in limited), trial.id)))
