"""Panels of a report that not every search has: sensitivity, racing, surrogate and audit."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune.protocols import OK, RACED
from autoprune.result.ranking import Estimate
from autoprune.result.report.packing import rounded
from autoprune.result.sensitivity import TABLES, sensitivity_of

if TYPE_CHECKING:
    from autoprune.result.search_result import SearchResult


def sensitivity_panel(result: SearchResult) -> dict[str, Any] | None:
    """Losses of single options, of the first table with any: cells of dimension, option and loss; None without."""
    for table in TABLES:
        losses = sensitivity_of(result, table).losses
        known = np.isfinite(losses)
        known[:, 0] = False
        if known.any():
            rows, columns = np.nonzero(known)
            cells = [[int(i), int(j), rounded(float(losses[i, j]), 4)] for i, j in zip(rows, columns, strict=True)]
            return {"table": table, "cells": cells}
    return None


def racing_panel(result: SearchResult) -> dict[str, Any] | None:
    """Samples that early stopping saved; None where nothing was stopped."""
    raced = [trial for trial in result.trials if trial.status == RACED and trial.evaluations]
    full = max((t.evaluations[-1].samples for t in result.trials if t.status == OK and t.evaluations), default=0)
    if not raced or not full:
        return None
    last = [trial.evaluations[-1] for trial in raced]
    done = sum(trial.status == OK for trial in result.trials)
    used = sum(one.samples for one in last) + done * full
    return {
        "raced": len(raced),
        "scored": done,
        "samples": full,
        "share": used / ((len(raced) + done) * full),
        "at": sorted(one.steps or one.samples for one in last),
        "unit": "training steps" if any(one.steps for one in last) else "samples",
    }


def surrogate_notes(result: SearchResult) -> list[str] | None:
    """Notes of the optimizer on its surrogate and phases; None without."""
    told = ("surrogate:", "candidates by the phase")
    found = [note for note in result.notes if note.startswith(told)]
    return found or None


def audit_panel(result: SearchResult) -> dict[str, Any] | None:
    """Cheap and trained scores of the audited trials, with what they say; None without an audit."""
    audit = result.audit
    if audit is None:
        return None
    return {
        "metric": audit.metric,
        "cost": audit.cost,
        "verdict": audit.verdict(),
        "comparison": audit.comparison(),
        "origin": audit.origin(),
        "evaluators": [
            {
                "name": name,
                "tau": _estimate(audit.rankings[name].tau),
                "in_band": _estimate(audit.rankings[name].tau_in_band),
            }
            for name in audit.evaluators
        ],
        "rows": [asdict(row) for row in audit.rows],
        "variants": {
            name: {"cost": variant.cost, "trained": list(variant.trained)} for name, variant in audit.variants.items()
        },
        "notes": list(audit.notes),
    }


def _estimate(estimate: Estimate) -> list[float | None]:
    return [rounded(value, 4) for value in (estimate.value, estimate.low, estimate.high)]
