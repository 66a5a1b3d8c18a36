"""Rows of a journal, checked when they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from autoprune.files.access import parse_json
from autoprune.files.schema import require_form
from autoprune.metrics.statistics import EVALUATION_FORM, Evaluation
from autoprune.protocols import FAILED, OK, PENDING, RACED, FloatArray


@dataclass(frozen=True)
class EvaluationRow:
    """One row of ``evaluations``, without the values per sample.

    Attributes:
        worker: The worker that ran it.
        started: Unix time.
        reason: Reason why the evaluation failed or was stopped early, else empty.
        measured: Its means over samples.
    """

    id: int
    trial: int
    worker: str
    started: float
    reason: str
    measured: Evaluation


@dataclass(frozen=True)
class TrialRow:
    """One row of ``trials`` with its evaluations in order of arrival; `status` is pending, ok, raced or failed."""

    id: int
    ask: int
    candidate: tuple[int, ...]
    costs: dict[str, float]
    status: str
    reason: str
    rows: tuple[EvaluationRow, ...]

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Measurements in its rows of ``evaluations``."""
        return tuple(row.measured for row in self.rows)


_OWN_FORM = {"id": int, "trial": int, "worker": str, "started": float, "reason": str}
_MEASURED = tuple(name.removesuffix("?") for name in EVALUATION_FORM)
_EVALUATION_FORM = _OWN_FORM | EVALUATION_FORM
_NAMES = (*_OWN_FORM, *_MEASURED)
EVALUATION_COLUMNS = ", ".join(_NAMES)
_TRIAL_FORM = {"id": int, "ask": int, "candidate": [int], "costs": {str: float}, "reason": str} | {
    "status": frozenset({OK, RACED, FAILED, PENDING})
}


def evaluation_row(row: tuple[Any, ...]) -> EvaluationRow:
    """Make a row from `EVALUATION_COLUMNS` and check its form: SQLite keeps text in columns of numbers."""
    found = dict(zip(_NAMES, row, strict=True))
    require_form(found, _EVALUATION_FORM, "an evaluation")
    return EvaluationRow(**{name: found[name] for name in _OWN_FORM}, measured=Evaluation.from_json(found))


def trial_row(row: tuple[Any, ...], evaluations: tuple[EvaluationRow, ...]) -> TrialRow:
    """Make a row from id, ask, candidate, costs, status and reason, and check its form."""
    names = ("id", "ask", "candidate", "costs", "status", "reason")
    found = dict(zip(names, row, strict=True))
    found |= {name: parse_json(found[name]) for name in ("candidate", "costs")}
    require_form(found, _TRIAL_FORM, f"trial {str(row[0])[:20]}")
    return TrialRow(**{**found, "candidate": tuple(found["candidate"])}, rows=evaluations)


def values_of(blob: bytes | None) -> FloatArray:
    """Values of samples, float32, shape (n,); empty for NULL."""
    if not isinstance(blob, bytes | None):
        raise ValueError(f"values of samples must be a blob, got {type(blob).__name__}")
    return np.frombuffer(blob or b"", "<f4")
