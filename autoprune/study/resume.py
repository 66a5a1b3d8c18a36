"""Resume of an earlier search: its journal gives the trials that the loop begins with."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoprune.errors import FileFormatError
from autoprune.execution import ANYWAY
from autoprune.journal.journal import Journal
from autoprune.journal.rows import TrialRow
from autoprune.journal.sqlite_file import FILE_NAME
from autoprune.metrics.summary import summary
from autoprune.protocols import OK, Optimizer, Pends
from autoprune.result.trials import Trial
from autoprune.study.fingerprint import cost_differences, require_same
from autoprune.study.study import Study
from autoprune.study.trials import proposed, rows_of

log = logging.getLogger(__name__)

_COMPARED = 64  # trials whose costs are computed again


@dataclass(frozen=True)
class History:
    """Trials known when a search begins; none, unless it is resumed.

    Attributes:
        found: Finished trials in the order in which their results came.
        pending: Those that were asked for and never scored.
    """

    found: tuple[Trial, ...]
    pending: tuple[Trial, ...]

    def __len__(self) -> int:
        return len(self.found) + len(self.pending)


def open_journal(study: Study, identity: Mapping[str, Any]) -> Journal:
    """Open the journal to write: a new one, also if the search to resume was killed before it had one.

    Args:
        study: The search. Its costs are compared with those in the journal; differences in spite of which it is resumed
            are kept there.
        identity: Identity of the search, see `autoprune.study.fingerprint`.

    Raises:
        ValueError: If the search in `run_dir` is another one; names what differs.
        OSError: If `run_dir` cannot be written or is in use, or holds a journal and `resume` is false.
        FileFormatError: If the journal is corrupted, foreign, or of a newer version.
    """
    run_dir = study.request.execution.run_dir
    resume = study.request.execution.resume
    if not resume or run_dir is None or not (Path(run_dir) / FILE_NAME).exists():
        return Journal.create(run_dir, identity)
    journal = Journal.resume(run_dir)
    try:
        recorded = journal.meta()
        others = _cost_differences(journal, recorded, identity, study)
        differing = require_same(recorded, identity, others, anyway=resume == ANYWAY)
        journal.record_meta("trials", identity["trials"])
        if differing:
            told = [*recorded.get(ANYWAY, []), f"resumed although it differed in {', '.join(differing)}"]
            for key, value in {**identity, ANYWAY: told}.items():
                journal.record_meta(key, value)
    except BaseException:  # raised again: nothing is left open, not even after Ctrl-C
        journal.close()
        raise
    return journal


def _cost_differences(
    journal: Journal, recorded: Mapping[str, Any], identity: Mapping[str, Any], study: Study
) -> list[str]:
    """Costs that differ for the first candidates of the journal; none in another space, which cannot be compared."""
    rows = journal.trials()[:_COMPARED]
    if not rows or recorded.get("space") != identity["space"]:
        return []
    _require_candidates(rows, study)
    candidates = np.array([row.candidate for row in rows], dtype=np.int64)
    return cost_differences(study.costs, candidates, [row.costs for row in rows])


def recall(journal: Journal, study: Study, optimizer: Optimizer) -> History:
    """Tell an optimizer the whole journal at once, and return the finished and the pending trials."""
    rows = journal.trials()
    if not rows:
        return History((), ())
    _require_candidates(rows, study)
    candidates = np.array([row.candidate for row in rows], dtype=np.int64)
    trials = proposed(study, [row.id for row in rows], candidates, study.costs_of(candidates))
    pairs = list(zip(trials, rows, strict=True))
    done = sorted((pair for pair in pairs if pair[1].rows), key=lambda pair: pair[1].rows[-1].id)
    found = [_finished(journal, study, trial, row) for trial, row in done]
    waiting = [trial for trial, row in pairs if not row.rows]
    if found:
        optimizer.tell(rows_of(study, found))
        told = journal.told()
        journal.record_tell([trial.id for trial in found if trial.id not in told])
    if waiting and isinstance(optimizer, Pends):
        optimizer.pend(np.array([trial.candidate for trial in waiting], dtype=np.int64))
    log.info("resumed: %d trials from the journal, and %d that were never scored again", len(found), len(waiting))
    return History(tuple(found), tuple(waiting))


def _require_candidates(rows: Sequence[TrialRow], study: Study) -> None:
    """Refuse trials outside of the space, or with other costs than the search."""
    sizes = study.problem.sizes.tolist()
    for row in rows:
        ends = zip(row.candidate, sizes, strict=False)
        if len(row.candidate) != len(sizes) or not all(0 <= option < size for option, size in ends):
            raise FileFormatError(
                f"run_dir must hold a journal of this search, but trial {row.id} in it is no candidate of the space; "
                "name another run_dir"
            )


def _finished(journal: Journal, study: Study, trial: Trial, row: TrialRow) -> Trial:
    """Finish a trial by its row, with an interval computed from the values of its samples in the journal."""
    interval = (math.nan, math.nan)
    if row.status == OK:
        metrics = journal.metrics(row.rows[-1].id)
        interval = summary(metrics, study.context.judge.proportion, study.dense.weights).interval
    return trial.finished(row.evaluations, row.status, row.reason, interval)
