"""Rows of a journal, checked when they are read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from autoprune.files import parse_json
from autoprune.protocols import FAILED, OK, RACED, FloatArray
from autoprune.schema import require_form


@dataclass(frozen=True)
class EvaluationRow:
    """One row of ``evaluations``, without the values per sample.

    Attributes:
        started: Unix time.
        samples: Number of samples that `signal` is the mean of; 0 if the evaluation failed.
        signal: Lower is better; None if the evaluation failed.
        signal_change_stderr: Standard error of the mean difference to the dense model on the same samples.
        metric: In the metric's own direction; None if the evaluation failed.
        distortion: Mean distance to the outputs of the dense model; None if it was not measured.
        reason: Reason why the evaluation failed or was stopped early, else empty.
    """

    id: int
    trial: int
    fidelity: str
    worker: str
    started: float
    seconds: float
    samples: int
    signal: float | None
    signal_stderr: float | None
    signal_change_stderr: float | None
    metric: float | None
    metric_change_stderr: float | None
    distortion: float | None
    distortion_stderr: float | None
    reason: str


@dataclass(frozen=True)
class TrialRow:
    """One row of ``trials`` with its evaluations in order of arrival; `status` is pending, ok, raced or failed."""

    id: int
    ask: int
    candidate: tuple[int, ...]
    costs: dict[str, float]
    status: str
    reason: str
    evaluations: tuple[EvaluationRow, ...]


EVALUATION_COLUMNS = ", ".join(field.name for field in fields(EvaluationRow))
_FORMS = {"int": int, "str": str, "float": float, "float | None": (float, None)}
_EVALUATION_FORM = {field.name: _FORMS[str(field.type)] for field in fields(EvaluationRow)}
_TRIAL_FORM = {"id": int, "ask": int, "candidate": [int], "costs": {str: float}, "reason": str} | {
    "status": frozenset({OK, RACED, FAILED, "pending"})
}


def evaluation_row(row: tuple[Any, ...]) -> EvaluationRow:
    """Make a row from `EVALUATION_COLUMNS` and check its form: SQLite keeps text in columns of numbers."""
    require_form(dict(zip(_EVALUATION_FORM, row, strict=True)), _EVALUATION_FORM, "an evaluation")
    return EvaluationRow(*row)


def trial_row(row: tuple[Any, ...], evaluations: tuple[EvaluationRow, ...]) -> TrialRow:
    """Make a row from id, ask, candidate, costs, status and reason, and check its form."""
    names = ("id", "ask", "candidate", "costs", "status", "reason")
    found = dict(zip(names, row, strict=True))
    found |= {name: parse_json(found[name]) for name in ("candidate", "costs")}
    require_form(found, _TRIAL_FORM, f"trial {str(row[0])[:20]}")
    return TrialRow(**{**found, "candidate": tuple(found["candidate"])}, evaluations=evaluations)


def values_of(blob: bytes | None) -> FloatArray:
    """Values of samples, float32, shape (n,); empty for NULL."""
    if not isinstance(blob, bytes | None):
        raise ValueError(f"values of samples must be a blob, got {type(blob).__name__}")
    return np.frombuffer(blob or b"", "<f4")
