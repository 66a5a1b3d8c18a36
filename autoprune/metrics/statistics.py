"""Evaluations: means over the samples of a measurement, with their standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from autoprune.protocols import Failure, FloatArray, Measurement


@dataclass(frozen=True)
class Evaluation:
    """Measurement of one candidate: means over samples and their standard errors; None where undefined.

    Means of an evaluation that was stopped early are estimates for all samples: the mean of the dense model, or of its
    `control`, on all of them plus the mean difference to it on those scored, which does not depend on how hard these
    are.

    Attributes:
        samples: Samples scored; 0 if the evaluation failed.
        seconds: Wall time.
        signal: Mean of the signal that steers the search, lower is better; None if it failed.
        signal_stderr: Its standard error; None if there is only one value.
        signal_change_stderr: Standard error of the mean difference of signals to the dense model on the same samples;
            None if they were not both measured. Both find the same samples hard, so it is smaller than that of either
            mean.
        metric: Mean of the metric, in its own direction; None if it failed.
        metric_change_stderr: The same for the metric.
        distortion: Mean distance to the outputs of the dense model, lower is better: KL divergence in nats or relative
            squared difference; None if it was not measured.
        distortion_stderr: Its standard error.
        steps: Training steps after which it was made, at a rung of a training (see `autoprune.Rungs`); 0 for one of the
            module that is built.
        part: True if it was stopped after a part of the samples, so that means are estimates for all of them.
    """

    samples: int = 0
    seconds: float = 0.0
    signal: float | None = None
    signal_stderr: float | None = None
    signal_change_stderr: float | None = None
    metric: float | None = None
    metric_change_stderr: float | None = None
    distortion: float | None = None
    distortion_stderr: float | None = None
    steps: int = 0
    part: bool = False

    @classmethod
    def of(cls, outcome: Measurement | Failure, dense: Measurement | None = None) -> Evaluation:
        """Summarise an outcome.

        Args:
            outcome: Values per sample, or a failure.
            dense: Measurement of the dense model on the same samples.

        Raises:
            ValueError: If the evaluation was stopped early, and `dense` is missing.
        """
        if isinstance(outcome, Failure):
            return cls(seconds=outcome.seconds)
        if outcome.raced and not outcome.steps:
            return cls._estimated(outcome, dense)
        weights = outcome.weights
        return cls(
            samples=len(outcome.signal),
            seconds=outcome.seconds,
            signal=_mean(outcome.signal),
            signal_stderr=_stderr(outcome.signal, weights),
            signal_change_stderr=_change_stderr(outcome.signal, None if dense is None else dense.signal, weights),
            metric=_mean(outcome.metric),
            metric_change_stderr=_change_stderr(outcome.metric, None if dense is None else dense.metric, weights),
            distortion=_mean(outcome.distortion),
            distortion_stderr=_stderr(outcome.distortion),
            steps=outcome.steps,
        )

    @classmethod
    def _estimated(cls, outcome: Measurement, dense: Measurement | None) -> Evaluation:
        if dense is None:
            raise ValueError("statistics of an evaluation that was stopped early need the dense model's")
        control = outcome.control or dense
        signal, signal_error = _estimate(outcome.signal, control.signal, outcome.weights)
        metric, metric_error = _estimate(outcome.metric, control.metric, outcome.weights)
        return cls(
            samples=len(outcome.signal),
            seconds=outcome.seconds,
            signal=signal,
            signal_stderr=signal_error,  # all of the uncertainty, as the other one is known on all samples
            signal_change_stderr=signal_error,
            metric=metric,
            metric_change_stderr=metric_error,
            distortion=_mean(outcome.distortion),
            distortion_stderr=_stderr(outcome.distortion),
            part=True,
        )

    @property
    def fidelity(self) -> str:
        """Data or training of the score, as in files: ``"full"``, ``"part"`` of the data, or ``"89 steps"``."""
        if self.steps:
            return f"{self.steps} steps"
        return "part" if self.part else "full"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary; also the columns of a row in the journal."""
        return {"fidelity": self.fidelity} | {name: getattr(self, name) for name in _WRITTEN}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """Restore what `to_json` wrote; statistics that are missing are None.

        Raises:
            ValueError: If the fidelity is none that `to_json` writes.
        """
        known = {name: data[name] for name in _WRITTEN if name in data}
        if data["fidelity"] in ("full", "part"):
            return cls(**known, part=data["fidelity"] == "part")
        number, _, unit = data["fidelity"].partition(" ")
        if unit != "steps" or not number.isdecimal():
            raise ValueError(f"fidelity must be 'full', 'part' or a number of steps, got {data['fidelity']!r:.60}")
        return cls(**known, steps=int(number))


_WRITTEN = tuple(field.name for field in fields(Evaluation) if field.name not in ("steps", "part"))
_NUMBER = (float, None)

EVALUATION_FORM = {
    "fidelity": str,
    "samples": int,
    "seconds": float,
    "signal": _NUMBER,
    "metric": _NUMBER,
    "signal_stderr?": _NUMBER,
    "signal_change_stderr?": _NUMBER,
    "metric_change_stderr?": _NUMBER,
    "distortion?": _NUMBER,
    "distortion_stderr?": _NUMBER,
}
"""Form of `Evaluation.to_json` in files."""


def evaluations_of(outcome: Measurement | Failure, dense: Measurement | None = None) -> tuple[Evaluation, ...]:
    """Summarise all measurements of a candidate, in order: at the rungs of its training, and at the end."""
    return tuple(Evaluation.of(stage, dense) for stage in outcome.stages)


def _estimate(seen: FloatArray, whole: FloatArray, weights: FloatArray) -> tuple[float, float | None]:
    """Estimate the mean over all samples from the first n, shape (n,), and from the dense model on all, shape (N,).

    Returns:
        The estimate, and its standard error; None for one value.

    Reference:
        Cochran, "Sampling Techniques", 1977, section 2.6: samples drawn without replacement from N leave the share
        1 - n / N of the variance, none once all are seen.
    """
    change = seen - whole[: len(seen)]
    weights = weights if weights.shape == change.shape else np.ones(len(change))
    # Samples not scored count by their weights; where all count the same this is the mean change.
    per_weight = float(change.sum() / weights.sum()) if weights.any() else 0.0
    spread = _stderr(change, weights)
    return float(whole.mean() + per_weight), spread and spread * (1 - len(seen) / len(whole)) ** 0.5


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
