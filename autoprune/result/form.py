"""Form of the JSON of a result: checked when it is read, before anything relies on the content."""

from __future__ import annotations

from autoprune.metrics.statistics import EVALUATION_FORM
from autoprune.protocols import FAILED, OK, PENDING, RACED
from autoprune.result.outline import OUTLINE_FORM

_NUMBER = (float, None)
TRIAL_FORM = {
    "id": int,
    "status": frozenset({OK, RACED, FAILED, PENDING}),
    "reason": str,
    "test_score": _NUMBER,
    "feasible?": bool,
    "candidate": [int],
    "decoded": {str: object},
    "costs": {str: float},
    "predicted?": {str: float},
    "cost_intervals?": {str: [float]},
    "score": _NUMBER,
    "interval": [_NUMBER],
    "test_interval?": ([float], None),
    "signal": _NUMBER,
    "evaluations": [EVALUATION_FORM],
}
_TRAINED = {"trial": int, "cost": float, "trained": _NUMBER, "reason": str} | {
    name: {str: _NUMBER} for name in ("scores", "signals")
}
_AUDIT = {
    "rows": [_TRAINED],
    "evaluators": [str],
    "notes": [str],
    "variants": {str: [(float, [float])]},  # what it costs, and the scores
    "metric": str,
    "higher_is_better": bool,
    "samples": int,
    "cost": str,
    "steps": (int, None),
    "winner": int,
    "seconds": float,
}
RESULT_FORM = {
    "budget": str,
    "metric": str,
    "higher_is_better": bool,
    "stopped": str,
    "seconds": float,
    "seed": int,
    "notes": [str],
    "limits": {str: float},
    "space": {str: object},
    "dense": TRIAL_FORM,
    "trials": [TRIAL_FORM],
    "front": [int],
    "audit?": (_AUDIT, None),
    "outline?": (OUTLINE_FORM, None),
    "weights?": {str: {"file": str, "sha256": str}},
}
