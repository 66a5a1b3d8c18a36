"""Measure the networks that a search offers under limits on latency or memory, and correct what was predicted."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from autoprune.costs.timing import note_of_noise
from autoprune.measured import Measured
from autoprune.result.trials import Trial, within
from autoprune.study import TIMED, Study

log = logging.getLogger(__name__)

_DRIFT = 0.1  # a dense network that is slower or faster by more than this is worth a word


def verify(study: Study, found: Sequence[Trial], measured: Measured) -> tuple[list[Trial], tuple[str, ...]]:
    """Measure every trial on the front against the dense network, until the front holds measured trials only.

    What is measured replaces what was predicted: the peak of memory where the budget limits it, and latencies wherever
    there is a table of them, so that `SearchResult.best` finds measured networks under a limit that comes later, too.
    The latency model is fitted again with the new evidence, and predicts the rest again; where a trial misses a limit,
    the next one takes its place on the front, and is measured too. What was measured on the way is measured once more.

    Args:
        study: The search.
        found: Its trials.
        measured: What was measured of them before.

    Returns:
        The trials with corrected costs, and notes that say what was measured.
    """
    trials, notes = list(found), list[str]()
    if measured.elsewhere:
        notes.append(f"latencies are predictions, not verified here: measured with {measured.elsewhere}")
    try:
        trials = measured.complete(study, trials, anew=True)
    except KeyboardInterrupt:
        log.warning("interrupted; some costs on the front are predictions")
        trials = measured.corrected(study, trials)
        names = ["latencies"] * measured.timing + ["peaks of memory"] * (study.memory is not None)
        notes.append(f"interrupted: some {' and '.join(names)} on the front are predictions")
    if measured.untimed:
        notes.append(f"some latencies on the front are predictions: {measured.untimed}")
    said = (*_notes_on_latency(study, trials, measured), *_notes_on_memory(study, trials))
    return trials, (*said, *notes)


def _notes_on_latency(study: Study, trials: Sequence[Trial], measured: Measured) -> list[str]:
    """How predictions compare with what was measured, in plain words."""
    known, latency = [trial for trial in trials if "latency_ms" in trial.predicted], measured.latency
    if not known or latency is None:
        return []
    notes = [f"latency: {_comparison(study, known, TIMED)}"]
    now = float(np.median([timing.ms / timing.ratio for timing in measured.timings.values()]))
    if abs(now / latency.dense_ms - 1) > _DRIFT:
        notes.append(
            f"the dense network takes {now:.4g} ms now and took {latency.dense_ms:.4g} ms when the table was measured; "
            "latencies are stated at the speed that the machine had then"
        )
    noise = note_of_noise(list(measured.timings.values()))
    return [*notes, *([noise] if noise else [])]


def _notes_on_memory(study: Study, trials: Sequence[Trial]) -> list[str]:
    measured = [trial for trial in trials if "memory_bytes" in trial.predicted]
    return [f"memory_bytes: {_comparison(study, measured, ('memory_bytes',))}"] if measured else []


def _comparison(study: Study, measured: Sequence[Trial], names: Sequence[str]) -> str:
    """How far predictions of the first of some costs were off, and how many trials missed a limit on any of them."""
    cost, limits = names[0], {name: limit for name, limit in study.limits.items() if name in names}
    errors = np.array([abs(trial.predicted[cost] / trial.costs[cost] - 1) for trial in measured])
    missed = sum(not within(trial.upper_costs, limits) for trial in measured)
    dense = " against the dense one" if cost in TIMED else ""
    return (
        f"{len(measured)} networks were measured{dense}; predictions were off by {np.median(errors):.1%} on the "
        f"median, {errors.max():.1%} at most; "
        + (f"{missed} missed a limit and gave way to the next" if missed else "none missed a limit")
    )
