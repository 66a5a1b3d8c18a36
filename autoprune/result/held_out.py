"""Check of a limit on the score on held-out data, which did not choose the model."""

from __future__ import annotations

import math

from autoprune.budget import Budget, ScoreLimit
from autoprune.metrics.judge import Judge
from autoprune.metrics.statistics import Evaluation
from autoprune.metrics.summary import summary
from autoprune.protocols import Measurement
from autoprune.result.trials import Trial

_BIASED = (
    "; the cheapest of many that just meet a limit tends to be a lucky one: ask for a tighter limit, or give more "
    "validation samples"
)


def note_of_held_out(
    limit: ScoreLimit, judge: Judge, trial: Trial, dense: Trial, tested: Measurement, dense_tested: Measurement
) -> str:
    """Compare the chosen trial with a limit on validation and on held-out data, in plain words.

    Args:
        limit: The limit that it was chosen to meet.
        judge: The metric.
        trial: The trial chosen, with its validation score.
        dense: The unpruned model, with the same.
        tested: Measurement of the trial on the held-out samples.
        dense_tested: Measurement of the dense model there.
    """
    here = _change_on_validation(judge, trial, dense) if limit.drop else (trial.score, trial.interval)
    there = _change(judge, tested, dense_tested) if limit.drop else _score(judge, tested)
    worst = Budget(score_limits=(limit,)).worst_score(0.0, judge.direction)  # a drop limits changes from 0
    holds, *ends = (judge.direction.meets(value, worst) for value in (there[0], *there[1]))
    if holds:
        verdict = "it holds there too" + ("" if all(ends) else ", but not for sure")
    else:
        verdict = ("it is missed there, perhaps by chance" if any(ends) else "it does not hold there") + _BIASED
    what = f"trial {trial.id} is the cheapest with {limit}"
    return f"{what}: {_say(limit, judge, *here)} on validation, {_say(limit, judge, *there)} on test data; {verdict}"


def _score(judge: Judge, measured: Measurement) -> tuple[float, tuple[float, float]]:
    found = summary(measured.metric, judge.proportion, measured.weights)
    return found.mean, found.interval


def _change(judge: Judge, measured: Measurement, dense: Measurement) -> tuple[float, tuple[float, float]]:
    change = float(measured.metric.mean() - dense.metric.mean())
    return change, _interval(judge, change, Evaluation.of(measured, dense).metric_change_stderr, len(measured.metric))


def _change_on_validation(judge: Judge, trial: Trial, dense: Trial) -> tuple[float, tuple[float, float]]:
    last = trial.evaluations[-1]
    return trial.score - dense.score, _interval(
        judge, trial.score - dense.score, last.metric_change_stderr, last.samples
    )


def _interval(judge: Judge, change: float, stderr: float | None, samples: int) -> tuple[float, float]:
    """Compute the 95 % interval of a paired mean difference over samples; NaN for a single value.

    If samples are right or wrong, few or none may differ, and the usual interval then has no width. So one sample won
    and one lost are added, as by Agresti and Min, Statistics in Medicine 24(5), 2005.
    """
    if stderr is None:
        return math.nan, math.nan
    centre, n = change, samples
    if judge.proportion:
        squares = n * (n - 1) * stderr**2 + n * change**2 + 1
        n = n + 2
        centre = samples * change / (samples + 2)
        stderr = math.sqrt(squares - n * centre**2) / n
    return centre - 1.96 * stderr, centre + 1.96 * stderr


def _say(limit: ScoreLimit, judge: Judge, value: float, interval: tuple[float, float]) -> str:
    def number(x: float) -> str:
        if not limit.drop:
            return f"{x:.4f}"
        return f"{100 * x:+.2f}pp" if judge.proportion else f"{x:+.4g}"

    low, high = interval
    return number(value) + ("" if math.isnan(low) else f" (95 % interval {number(low)} to {number(high)})")
