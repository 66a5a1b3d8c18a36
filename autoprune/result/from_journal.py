"""Result read from the journal alone: of a search that still runs, was killed, or was never saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoprune.files.access import shortened, sound
from autoprune.files.schema import require_form
from autoprune.journal.journal import Journal
from autoprune.journal.rows import TrialRow
from autoprune.journal.sqlite_file import FILE_NAME
from autoprune.pareto import Direction
from autoprune.protocols import FAILED, OK, RACED, SearchSpace
from autoprune.result.builders import FromJournal
from autoprune.result.form import TRIAL_FORM
from autoprune.result.outline import OUTLINE_FORM, Outline
from autoprune.result.saving import require_consistent
from autoprune.result.trials import Trial, find_front, note_of_probes
from autoprune.search_spaces import space_from_json

_UNMEASURED = (
    "costs are those that trials were proposed with; what the search measured of its front in the end is in its saved "
    "result alone"
)

_FORM = {
    "space": {str: object},
    "limits": {str: float},
    "dense": TRIAL_FORM,
    "budget": str,
    "metric": str,
    "higher_is_better": bool,
    "notes": [str],
    "trials": (int, frozenset({"auto"})),
    "seed": int,
    "outline?": (OUTLINE_FORM, None),
}


def fields_from_journal(run_dir: str | Path, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Read the fields of a result from a journal, see `SearchResult.from_journal`.

    Args:
        run_dir: The ``run_dir`` of a search.
        notes: First notes of the result.

    Raises:
        FileNotFoundError: If `run_dir` holds no journal.
        FileFormatError: If the journal is corrupted, foreign, or of a newer version.
    """
    with Journal.open(run_dir) as journal:
        meta, rows = journal.meta(), journal.trials()
    told = f"run_dir must hold a journal of autoprune, but {shortened(Path(run_dir) / FILE_NAME)} is damaged"
    with sound(told, "name another run_dir"):
        require_form(meta, _FORM)
        return _fields(meta, rows, notes)


def _fields(meta: Mapping[str, Any], rows: Sequence[TrialRow], notes: Sequence[str]) -> dict[str, Any]:
    """Make the fields from rows of any journal whose form fits; raises errors in `DAMAGE`."""
    space = space_from_json(meta["space"])
    trials = tuple(trial_from(row, space, meta["limits"]) for row in rows)
    total = "" if meta["trials"] == "auto" else f" of {meta['trials']}"
    dense = Trial.from_json(meta["dense"])
    require_consistent(trials, dense, space.sizes.tolist(), meta)
    done = sum(trial.status in (OK, RACED, FAILED) for trial in trials)
    plain = ("limits", "budget", "metric", "higher_is_better", "seed")
    return {
        "trials": trials,
        "front": find_front(trials, tuple(meta["limits"]), Direction(meta["higher_is_better"])),
        "dense": dense,
        "space": space,
        "notes": (
            *notes,
            f"from the journal: {done}{total} trials finished, {len(trials) - done} pending",
            *meta["notes"],
            *note_of_probes(trials),
            *([_UNMEASURED] if {"latency_ms", "ms_per_sample", "memory_bytes"} & meta["limits"].keys() else []),
        ),
        "stopped": "unfinished" if meta["trials"] == "auto" or done < meta["trials"] else "trials",
        "seconds": _seconds(rows),
        "outline": Outline.from_json(meta["outline"]) if meta.get("outline") else None,
        "_builder": FromJournal(),
        **{name: meta[name] for name in plain},
    }


def trial_from(row: TrialRow, space: SearchSpace, limits: Mapping[str, float]) -> Trial:
    """Make a trial from its row in the journal: without an interval."""
    trial = Trial.proposed(row.id, row.candidate, space, row.costs, limits)
    return trial.finished(row.evaluations, row.status, row.reason) if row.rows else trial


def _seconds(rows: Sequence[TrialRow]) -> float:
    """Seconds from the start of the first evaluation to the end of the last."""
    evaluations = [evaluation for row in rows for evaluation in row.rows]
    if not evaluations:
        return 0.0
    return max(e.started + e.measured.seconds for e in evaluations) - min(e.started for e in evaluations)
