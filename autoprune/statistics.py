"""Statistics of the values per sample of an evaluation: means and their standard errors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autoprune.protocols import FAILED, OK, RACED, Failure, FloatArray, Measurement


class Statistics(NamedTuple):
    """Means over samples and their standard errors; None where undefined, for JSON and SQLite.

    Means of an evaluation that was stopped early are estimates for all samples: the mean of the dense model on all of
    them plus the mean difference to it on those scored, which does not depend on the difficulty of these.

    Attributes:
        samples: Samples scored; 0 if the evaluation failed.
        signal: Mean of the signal that steers the search, lower is better.
        signal_stderr: Its standard error.
        signal_change_stderr: Standard error of the mean difference to the dense model on the same samples. Both find
            the same samples hard, so it is smaller than that of either mean.
        metric: Mean of the metric, in its own direction.
        metric_change_stderr: The same for the metric.
        distortion: Mean distance to the outputs of the dense model.
        distortion_stderr: Its standard error.
    """

    samples: int = 0
    signal: float | None = None
    signal_stderr: float | None = None
    signal_change_stderr: float | None = None
    metric: float | None = None
    metric_change_stderr: float | None = None
    distortion: float | None = None
    distortion_stderr: float | None = None


def statistics_of(outcome: Measurement | Failure, dense: Measurement | None = None) -> Statistics:
    """Summarise an evaluation; `dense` is the measurement of the dense model on the same samples."""
    if isinstance(outcome, Failure):
        return Statistics()
    if outcome.raced and not outcome.steps:
        return _estimated(outcome, dense)
    weights = outcome.weights
    return Statistics(
        samples=len(outcome.signal),
        signal=_mean(outcome.signal),
        signal_stderr=_stderr(outcome.signal, weights),
        signal_change_stderr=_change_stderr(outcome.signal, None if dense is None else dense.signal, weights),
        metric=_mean(outcome.metric),
        metric_change_stderr=_change_stderr(outcome.metric, None if dense is None else dense.metric, weights),
        distortion=_mean(outcome.distortion),
        distortion_stderr=_stderr(outcome.distortion),
    )


def status_of(outcome: Measurement | Failure) -> str:
    """Status of a trial with this outcome."""
    return FAILED if isinstance(outcome, Failure) else RACED if outcome.raced else OK


def reason_of(outcome: Measurement | Failure) -> str:
    """Reason why it failed or was dropped; empty if neither."""
    return outcome.reason if isinstance(outcome, Failure) else outcome.raced


def fidelity_of(outcome: Measurement | Failure) -> str:
    """Fidelity of an outcome: ``"full"``, ``"part"`` of the data because it was dropped, or `after` some steps."""
    if isinstance(outcome, Measurement) and outcome.steps:
        return after(outcome.steps)
    return "part" if status_of(outcome) == RACED else "full"


def stages_of(outcome: Measurement | Failure) -> tuple[Measurement | Failure, ...]:
    """All measurements of a candidate, in order: at the rungs of its training, and at the end."""
    return (outcome,) if isinstance(outcome, Failure) else (*outcome.rungs, outcome)


def after(steps: int) -> str:
    """Fidelity of a score after this number of steps of a longer training."""
    return f"{steps} steps"


def steps_before(fidelity: str) -> int:
    """Inverse of `after`; 0 for the score of a built module."""
    number, _, unit = fidelity.partition(" ")
    return int(number) if unit == "steps" else 0


def _estimated(outcome: Measurement, dense: Measurement | None) -> Statistics:
    if dense is None:
        raise ValueError("statistics of an evaluation that was stopped early need the dense model's")
    values: dict[str, float | None] = {}
    for name in ("signal", "metric"):
        seen, whole = getattr(outcome, name), getattr(dense, name)
        change = seen - whole[: len(seen)]
        weights = outcome.weights if outcome.weights.shape == change.shape else np.ones(len(change))
        # Samples not scored count by their weights; where all count the same this is the mean change.
        per_weight = float(change.sum() / weights.sum()) if weights.any() else 0.0
        values[name] = float(whole.mean() + per_weight)
        spread = _stderr(change, weights)
        values[f"{name}_change_stderr"] = spread and spread * (1 - len(seen) / len(whole)) ** 0.5
    return Statistics(samples=len(outcome.signal), signal_stderr=values["signal_change_stderr"], **values)


def _mean(values: FloatArray) -> float | None:
    return float(values.mean()) if len(values) and np.isfinite(values).all() else None


def _stderr(values: FloatArray, weights: FloatArray | None = None) -> float | None:
    return standard_error(values, weights) if len(values) > 1 and np.isfinite(values).all() else None


def standard_error(values: FloatArray, weights: FloatArray | None = None) -> float:
    """Standard error of the mean of values (n,), n > 1; with weights (n,), which are drawn with them, of the quotient.

    Args:
        values: The numerators, over the mean of the denominators.
        weights: The denominators, over their mean; None or empty where all are the same.

    Reference:
        Cochran, "Sampling Techniques", 1977, section 2.11: the variance of each value less its share of the quotient.
    """
    if weights is not None and weights.shape == values.shape and weights.any():
        ratio = float(values.sum() / weights.sum())
        return float((values - ratio * weights).std(ddof=1) / weights.mean() / np.sqrt(len(values)))
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _change_stderr(values: FloatArray, dense: FloatArray | None, weights: FloatArray) -> float | None:
    return None if dense is None or dense.shape != values.shape else _stderr(values - dense, weights)
