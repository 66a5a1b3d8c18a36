"""Checks of the values that a user's optimizer or evaluator returns, made once before anything relies on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from autoprune.arguments import MOST_SAID, is_number, shown
from autoprune.protocols import Failure, FloatArray, IntArray, Measurement, Optimizer

Outcome = Measurement | Failure


def proposals(optimizer: Optimizer, returned: Any, asked: int, sizes: IntArray) -> IntArray:
    """Check the proposals of an optimizer: int64, shape (<= asked, d); without rows if it has no more.

    Args:
        optimizer: The optimizer, for messages.
        returned: What ``optimizer.ask(asked)`` returned.
        asked: The most rows allowed.
        sizes: Number of options of each dimension, shape (d,).

    Raises:
        TypeError: If it is no array of integers; names the optimizer.
        ValueError: If it has the wrong shape, too many rows, or entries that are no options.
    """
    rule = f"{type(optimizer).__name__}.ask({asked}) must return an int64 array of shape (<= {asked}, {len(sizes)})"
    if not isinstance(returned, np.ndarray):
        raise TypeError(f"{rule}, got {shown(returned)} ({type(returned).__name__}); return np.array(..., np.int64)")
    if returned.size == 0 and returned.ndim in (1, 2):
        return np.zeros((0, len(sizes)), dtype=np.int64)
    if not np.issubdtype(returned.dtype, np.integer):
        raise TypeError(f"{rule}, got {shown(returned)} of dtype {returned.dtype}; round to options and convert")
    if returned.ndim != 2 or returned.shape[1] != len(sizes) or len(returned) > asked:
        raise ValueError(f"{rule}, one row for each candidate, got shape {returned.shape}")
    outside = np.flatnonzero(((returned < 0) | (returned >= sizes)).any(axis=1))
    if outside.size:
        row = shown(returned[outside[0]].tolist())
        raise ValueError(
            f"{rule} of option indices from 0 to below {shown(sizes.tolist())}, got {row} in row {outside[0]}; "
            "clip them before you return them"
        )
    return returned.astype(np.int64)


def only(evaluator: Any, returned: Any) -> Outcome:
    """Take the outcome of a single candidate from the return value of ``evaluator.evaluate``.

    Raises:
        TypeError: If it is no list of one outcome, or the outcome is damaged; names the evaluator.
        ValueError: As in `checked`.
    """
    if not isinstance(returned, list | tuple) or len(returned) != 1:
        raise TypeError(
            f"{_name(evaluator)}.evaluate must return a list with one Measurement or Failure for each candidate, here "
            f"1, got {shown(returned)}"
        )
    return checked(evaluator, returned[0], "evaluate")


def checked(evaluator: Any, returned: Any, method: str) -> Outcome:
    """Check the outcome of one candidate, and convert its values to float64.

    Raises:
        TypeError: If it is neither a Measurement nor a Failure, or a field has another type; names the evaluator.
        ValueError: If a field has the wrong shape or seconds are no number.
    """
    who = f"{_name(evaluator)}.{method}"
    if not isinstance(returned, Measurement | Failure):
        raise TypeError(f"{who} must give a Measurement or a Failure, got {shown(returned)}")
    if not is_number(returned.seconds) or returned.seconds < 0:
        raise ValueError(f"{who} must give seconds as a finite number of at least 0, got {shown(returned.seconds)}")
    if isinstance(returned, Failure):
        reason = returned.reason if isinstance(returned.reason, str) else shown(returned.reason)
        return Failure(reason[: 2 * MOST_SAID], float(returned.seconds))
    signal, metric, distortion = (_values(who, returned, name) for name in ("signal", "metric", "distortion"))
    if not len(signal) or metric.shape != signal.shape:
        raise ValueError(
            f"{who} must give as many values of the signal as of the metric, one for each sample or one for the whole "
            f"set, got shapes {signal.shape} and {metric.shape}"
        )
    if not isinstance(returned.raced, str):
        raise TypeError(f"{who} must give raced as text, got {shown(returned.raced)}")
    if not isinstance(returned.rungs, tuple):
        raise TypeError(f"{who} must give rungs as a tuple of Measurements, got {shown(returned.rungs)}")
    rungs = tuple(_rung(evaluator, rung, method) for rung in returned.rungs)
    seconds = float(returned.seconds)
    return replace(returned, signal=signal, metric=metric, distortion=distortion, seconds=seconds, rungs=rungs)


def _rung(evaluator: Any, returned: Any, method: str) -> Measurement:
    found = checked(evaluator, returned, method)
    if isinstance(found, Failure):
        raise TypeError(f"{_name(evaluator)}.{method} must give rungs as Measurements, got {shown(returned)}")
    return found


def _values(who: str, measured: Measurement, name: str) -> FloatArray:
    values = getattr(measured, name)
    real = isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "fiub"
    if not real:
        raise TypeError(f"{who} must give its {name} as an array of real numbers of shape (n,), got {shown(values)}")
    return np.asarray(values, dtype=np.float64)


def same_samples(evaluator: Any, measured: Outcome, dense: Measurement) -> Outcome:
    """Return the outcome, or a failure that names the evaluator if the dense model was scored on other samples.

    The trial fails, because its mean could not be compared with that of any other.
    """
    if isinstance(measured, Failure) or measured.raced or len(measured.signal) == len(dense.signal):
        return measured
    return Failure(
        f"{_name(evaluator)} must score every candidate on the same samples, got {len(measured.signal)} values and "
        f"{len(dense.signal)} of the dense model",
        measured.seconds,
    )


def _name(evaluator: Any) -> str:
    return type(evaluator).__name__
