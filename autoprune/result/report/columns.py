"""Trials of a report by column, so that ten thousand of them stay small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from autoprune.protocols import FAILED, OK, PENDING, RACED
from autoprune.result.choosing import rank_of
from autoprune.result.report.packing import rounded
from autoprune.result.trials import Trial

if TYPE_CHECKING:
    from autoprune.result.search_result import SearchResult

STATUS = (OK, RACED, FAILED, PENDING)


@dataclass(frozen=True)
class Columns:
    """All trials; None stands for what is unknown.

    Attributes:
        id: Number of each trial.
        status: Place in ``STATUS``.
        score: Validation score.
        low: Lower end of its interval.
        high: Upper end.
        distortion: Distance of the outputs to those of the dense model.
        rank: Place of each trial among those that `SearchResult.best` may choose, 0 the best; None for others.
        uniform: Positions of trials that prune every dimension alike.
        costs: Values by the name of the cost, or the name of an earlier cost that has the same ones.
        upper: By cost and position, upper ends that limits are compared with, where they differ from the cost.
        lower: The same for lower ends.
        predicted: By cost and position, predictions of what was measured.
        held_out: By position: held-out score, lower and upper end.
        reason: By position: why a trial failed or was dropped.
    """

    id: list[int]
    status: list[int]
    score: list[float | None]
    low: list[float | None]
    high: list[float | None]
    distortion: list[float | None]
    rank: list[int | None]
    uniform: list[int]
    costs: dict[str, list[float] | str]
    upper: dict[str, dict[int, float]]
    lower: dict[str, dict[int, float]]
    predicted: dict[str, dict[int, float]]
    held_out: dict[int, list[float | None]]
    reason: dict[int, str]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)


def columns_of(result: SearchResult) -> Columns:
    """Sort the trials of a result by column."""
    trials = result.trials
    uniform = set() if result.outline is None else set(result.outline.uniform)
    names = list(dict.fromkeys((*result.limits, *result.dense.costs)))
    return Columns(
        id=[trial.id for trial in trials],
        status=[STATUS.index(trial.status) for trial in trials],
        score=[_exact(trial.score) for trial in trials],
        low=[rounded(trial.interval[0]) for trial in trials],
        high=[rounded(trial.interval[1]) for trial in trials],
        distortion=[rounded(trial.distortion, 4) for trial in trials],
        rank=_ranks(result),
        uniform=[i for i, trial in enumerate(trials) if trial.candidate in uniform],
        costs=_costs(trials, names),
        upper={name: _ends(trials, name, 1) for name in names},
        lower={name: _ends(trials, name, 0) for name in names},
        predicted={
            name: {i: trial.predicted[name] for i, trial in enumerate(trials) if name in trial.predicted}
            for name in names
        },
        held_out={
            i: [trial.test_score, *map(rounded, trial.test_interval or (None, None))]
            for i, trial in enumerate(trials)
            if trial.test_score is not None
        },
        reason={i: trial.reason for i, trial in enumerate(trials) if trial.reason},
    )


def _ranks(result: SearchResult) -> list[int | None]:
    """Rank the trials that can be the best; equal keys in the order proposed, as ``min`` takes the first."""
    done = [i for i, trial in enumerate(result.trials) if trial.status == OK and trial.feasible]
    key = {i: tuple(_last(x) for x in rank_of(result, result.trials[i])) for i in done}
    place = {i: rank for rank, i in enumerate(sorted(done, key=key.__getitem__))}
    return [place.get(i) for i in range(len(result.trials))]


def _last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _costs(trials: Sequence[Trial], names: Sequence[str]) -> dict[str, list[float] | str]:
    found: dict[str, list[float] | str] = {}
    for name in names:
        values = [_whole(float(trial.costs[name])) if name in trial.costs else math.nan for trial in trials]
        same = next((other for other, known in found.items() if known == values), None)
        found[name] = values if same is None else same
    return found


def _ends(trials: Sequence[Trial], name: str, end: int) -> dict[int, float]:
    return {i: trial.cost_intervals[name][end] for i, trial in enumerate(trials) if name in trial.cost_intervals}


def _whole(value: float) -> float:
    """Write a whole number as one, in fewer characters; others keep all digits, as limits are compared with them."""
    return int(value) if value.is_integer() else value


def _exact(value: float) -> float | None:
    return None if math.isnan(value) else value
