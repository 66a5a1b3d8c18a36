"""Data of a report: the contract between Python and the page, versioned, without any markup."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autoprune import __version__
from autoprune.result.choosing import why_none
from autoprune.result.report.columns import Columns, columns_of
from autoprune.result.report.commands import Commands, commands_of
from autoprune.result.report.convergence import convergence_of
from autoprune.result.report.packing import as_json, packed, rounded
from autoprune.result.report.panels import audit_panel, racing_panel, sensitivity_panel, surrogate_notes
from autoprune.result.report.widths import options_of, width_effects

if TYPE_CHECKING:
    from autoprune.result.search_result import SearchResult
    from autoprune.result.trials import Trial

VERSION = 1
"""Version of the data; the page and the data come in one file, so it only tells other readers what to expect."""
UNITS = {
    "flops": "MACs",
    "params": "parameters",
    "nonzero_params": "parameters",
    "memory_bytes": "bytes",
    "latency_ms": "ms",
    "ms_per_sample": "ms",
}
PLAIN_OPTIONS = 200_000
"""Most options of the front that stand in the page uncompressed."""
_HALF = 4
"""Bits of half a byte."""


@dataclass(frozen=True)
class ReportData:
    """Content of a report; `to_json` gives the three parts of a page.

    Attributes:
        run: Budget, metric, direction, notes, seed, seconds, and the reason why the search ended.
        costs: Each cost by name: unit, value of the dense model, limit if there is one, and if it was measured.
        dense: The dense model: scores with intervals.
        front: Trials of the front by position in `columns`.
        options: Options of the front's candidates, one list each; None where they are too many to stand here.
        space: Names and options of the dimensions.
        commands: Shell command and Python lines that build a trial.
        columns: All trials, one list for each quantity.
        outline: Layers of the model; None if they are unknown.
        effects: Widths that options give to groups; None where a width depends on several dimensions.
        panels: Convergence, sensitivity, racing, surrogate and audit, each None where it does not apply.
        candidates: Option indices of all trials, shape (n, d); None to leave them out.
    """

    run: dict[str, Any]
    costs: list[dict[str, Any]]
    dense: dict[str, Any]
    front: list[int]
    options: list[list[int]] | None
    space: dict[str, Any]
    commands: Commands
    columns: Columns
    outline: dict[str, Any] | None
    effects: list[Any] | None
    panels: dict[str, Any]
    candidates: NDArray[np.uint8] | NDArray[np.uint16] | None

    def to_json(self) -> dict[str, Any]:
        """Three parts: ``head`` to draw the front, ``bulk`` and ``candidates`` compressed."""
        head = {
            "format": "autoprune-report",
            "version": VERSION,
            **{name: getattr(self, name) for name in ("run", "costs", "dense", "front", "options")},
            "commands": asdict(self.commands),
            "trials": len(self.columns.id),
        }
        bulk = {
            "columns": self.columns.to_json(),
            **{name: getattr(self, name) for name in ("space", "outline", "effects", "panels")},
        }
        return {"head": head, "bulk": packed(as_json(bulk).encode("ascii")), "candidates": self._packed()}

    def _packed(self) -> dict[str, Any] | None:
        """Candidates dimension by dimension, little-endian, in as many bits for each option as are smallest packed."""
        if self.candidates is None:
            return None
        columns = np.ascontiguousarray(self.candidates.T)  # a dimension's options repeat more than a candidate's
        little = columns.astype(columns.dtype.newbyteorder("<"))
        forms = {8 * columns.dtype.itemsize: packed(little.tobytes())}
        if columns.max(initial=0) < 1 << _HALF:
            forms[_HALF] = packed(_halves(columns.astype(np.uint8)).tobytes())
        bits = min(forms, key=lambda bits: len(forms[bits]))
        return {"bits": bits, "data": forms[bits]}


def _halves(columns: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Put two options below 16 into each byte, the first one low."""
    flat = np.append(columns.ravel(), np.zeros(columns.size % 2, np.uint8))
    both: NDArray[np.uint8] = flat[::2] | np.left_shift(flat[1::2], _HALF, dtype=np.uint8)
    return both


def data_of(
    result: SearchResult, run_dir: str | None = None, model: str | None = None, full: bool = True
) -> ReportData:
    """Collect the data of a report.

    Args:
        result: Finished, loaded, or read from a journal.
        run_dir: Folder that a shell command builds from; by default that of a loaded result.
        model: ``FILE.py:NAME`` for that command.
        full: Include the options of all trials.
    """
    trials = result.trials
    position = {trial.id: i for i, trial in enumerate(trials)}
    sizes = result.space.sizes
    wide = bool(sizes.max(initial=1) > 256)
    chosen = np.array([t.candidate for t in trials], dtype=np.int64).reshape(len(trials), len(sizes))
    candidates: NDArray[np.uint8] | NDArray[np.uint16] = chosen.astype(np.uint16) if wide else chosen.astype(np.uint8)
    front = [position[trial.id] for trial in result.front]
    plain = len(front) * len(sizes) <= PLAIN_OPTIONS or not full
    return ReportData(
        run=_run(result),
        costs=_costs(result),
        dense=_dense(result.dense),
        front=front,
        options=candidates[front].tolist() if plain else None,
        space=options_of(result.space),
        commands=commands_of(result, run_dir, model),
        columns=columns_of(result),
        outline=None if result.outline is None else result.outline.to_json(),
        effects=None if result.outline is None else width_effects(result.space, result.outline, candidates),
        panels={
            "convergence": convergence_of(result),
            "sensitivity": sensitivity_panel(result),
            "racing": racing_panel(result),
            "surrogate": surrogate_notes(result),
            "audit": audit_panel(result),
        },
        candidates=candidates if full else None,
    )


def _run(result: SearchResult) -> dict[str, Any]:
    status = [trial.status for trial in result.trials]
    return {
        "budget": result.budget,
        "metric": result.metric,
        "higher_is_better": result.higher_is_better,
        "worst_score": result.worst_score,
        "stopped": result.stopped,
        "seconds": round(result.seconds, 1),
        "seed": result.seed,
        "notes": list(result.notes),
        "counts": {name: status.count(name) for name in ("ok", "raced", "failed", "pending")},
        "model": "" if result.outline is None else result.outline.model,
        "space": result.space.describe(),
        "why_empty": "" if result.front else why_none(result),
        "autoprune": __version__,
    }


def _costs(result: SearchResult) -> list[dict[str, Any]]:
    """Limited costs first, in the order of the budget."""
    names = dict.fromkeys((*result.limits, *result.dense.costs))
    measured = {name for trial in result.trials for name in trial.predicted}
    return [
        {
            "name": name,
            "unit": UNITS.get(name, ""),
            "dense": result.dense.costs[name],
            "limit": result.limits.get(name),
            "measured": name in measured,
        }
        for name in names
    ]


def _dense(dense: Trial) -> dict[str, Any]:
    return {
        "score": dense.score,
        "interval": [rounded(end) for end in dense.interval],
        "test_score": dense.test_score,
        "test_interval": [rounded(end) for end in dense.test_interval or (None, None)],
        "costs": dict(dense.costs),
    }
