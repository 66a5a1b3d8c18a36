"""Measure the networks of a front under limits on latency or memory, and correct the predictions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from autoprune.costs import Latency, make_costs
from autoprune.costs.latency.profile import time_networks
from autoprune.costs.latency.setting import setting_of
from autoprune.costs.latency.timing import Timing, clock_for, note_of_noise
from autoprune.costs.operations.runtimes import runtime_of
from autoprune.costs.structural import predicted_widths
from autoprune.data.sampling import seeded
from autoprune.errors import UnsupportedModelError
from autoprune.protocols import IntArray
from autoprune.result.trials import Trial, find_front, within
from autoprune.structure.slicing.slicing import Edit, build
from autoprune.study.study import TIMED, Study

log = logging.getLogger(__name__)

_AT_ONCE = 12  # networks that exist, and are compared, at once
_DRIFT = 0.1  # a dense network that is slower or faster by more than this is noted


@seeded(0)  # a model may draw noise
def verify(study: Study, found: Sequence[Trial]) -> tuple[list[Trial], tuple[str, ...]]:
    """Measure every trial on the front against the dense network, until the front holds measured trials only.

    Measurements replace predictions: the peak of memory if the budget limits it, and latencies if there is a table of
    them, so that `SearchResult.best` finds measured networks under a later limit, too. The latency model is fitted
    again with the new evidence, and predicts the rest again; where a trial misses a limit, the next one takes its place
    on the front, and is measured too.

    Args:
        study: The search. Its deadline ends the measurements; a note then names the costs that stay predicted.
        found: Its trials.

    Returns:
        The trials with corrected costs, and notes on the measurements.
    """
    trials = list(found)
    latency = study.latency
    notes = list[str]()
    if latency is not None and (why := _why_not_here(study, latency)):
        notes.append(f"latencies are predictions, not verified here: measured with {why}")
        latency = None
    if latency is None and study.memory is None:
        return trials, tuple(notes)
    seen = _Seen(latency)
    try:
        while todo := _unmeasured(study, trials, seen):
            if study.deadline.passed:
                notes.append(f"max_seconds was over: {_predicted(latency, study)} on the front are predictions")
                break
            modules = [study.evaluator.build(np.array(trial.candidate, dtype=np.int64)).eval() for trial in todo]
            seen.measure(study, todo, modules)
            trials = _corrected(study, trials, seen)
    except KeyboardInterrupt:
        log.warning("interrupted; some costs on the front are predictions")
        notes.append(f"interrupted: {_predicted(latency, study)} on the front are predictions")
    if seen.untimed:
        notes.append(f"some latencies on the front are predictions: {seen.untimed}")
    said = (*_notes_on_latency(study, trials, seen), *_notes_on_memory(study, trials))
    return trials, (*said, *notes)


def _predicted(latency: Latency | None, study: Study) -> str:
    names = ["latencies"] * (latency is not None) + ["peaks of memory"] * (study.memory is not None)
    return f"some {' and '.join(names)}"


def _why_not_here(study: Study, latency: Latency) -> str:
    """Differences between this machine and that of the table; empty if there are none."""
    setting = latency.setting
    try:
        runtime = runtime_of(setting.runtime)
    except (ImportError, ValueError) as error:
        return f"runtime {setting.runtime} {setting.runtime_version}; {error}"
    here = setting_of(study.priced, runtime)
    return "; ".join(setting.elsewhere(here))


class _Seen:
    """Measurements of trials, by their ids.

    Attributes:
        latency: The model, fitted to all measurements; None if latencies are not measured.
        timings: Times against the dense network.
        peaks: Bytes at the peak of memory.
        untimed: Reason why no further trials are timed; empty as long as all can be.
    """

    def __init__(self, latency: Latency | None) -> None:
        self.latency = latency
        self.timings: dict[int, Timing] = {}
        self.peaks: dict[int, float] = {}
        self.untimed = ""

    def __contains__(self, trial: int) -> bool:
        return trial in self.timings or trial in self.peaks

    def measure(self, study: Study, trials: Sequence[Trial], modules: Sequence[nn.Module]) -> None:
        """Measure trials, given with their built modules."""
        if study.memory is not None:
            peaks = [study.memory.measure(study.priced.of(module)) for module in modules]
            self.peaks.update(zip((trial.id for trial in trials), peaks, strict=True))
        if self.latency is not None and not self.untimed:
            try:
                self.latency = self._timed(self.latency, study, trials, modules)
            except (UnsupportedModelError, RuntimeError) as error:  # out of memory, say: the search must not be lost
                self.untimed = str(error).partition("\n")[0]  # exporters print whole graphs after it

    def _timed(self, latency: Latency, study: Study, trials: Sequence[Trial], modules: Sequence[nn.Module]) -> Latency:
        """Time trials, and fit the model to them, too."""
        context = study.context
        runtime = runtime_of(latency.setting.runtime)
        dense = runtime.network(study.priced.of(build(context.model, Edit({}, {})).eval()))
        calls = [runtime.network(study.priced.of(module)) for module in modules]
        clock = clock_for(next(context.model.parameters()).device, runtime.elsewhere)
        timings = time_networks(calls, dense, clock)
        self.timings.update(zip((trial.id for trial in trials), timings, strict=True))
        widths = predicted_widths(context.structure.presence, context.space, _candidates(trials)).astype(np.int64)
        ratio, uncertainty = np.array([(timing.ratio, timing.uncertainty) for timing in timings]).T
        return latency.refitted(widths, ratio, uncertainty)


def _unmeasured(study: Study, trials: Sequence[Trial], seen: _Seen) -> list[Trial]:
    """Trials on the front that are still to be measured, as many as are compared at once."""
    if seen.untimed and study.memory is None:
        return []
    front = find_front(trials, tuple(study.limits), study.context.judge.direction)
    return [trial for trial in front if trial.id not in seen][:_AT_ONCE]


def _candidates(trials: Sequence[Trial]) -> IntArray:
    return np.array([trial.candidate for trial in trials], dtype=np.int64)


def _corrected(study: Study, trials: Sequence[Trial], seen: _Seen) -> list[Trial]:
    """Trials with measured costs where there are some, and with latencies of the refitted model elsewhere."""
    latency = seen.latency
    again = [0.0] * len(trials)
    if latency is not None:
        costs = make_costs(study.context.structure, study.context.space, None, latency.setting.batch, latency)
        again = costs["latency_ms"](_candidates(trials)).tolist()
    corrected = []
    for trial, ms in zip(trials, again, strict=True):
        measured: dict[str, float] = {}
        own, intervals = dict(trial.costs), dict(trial.cost_intervals)
        if (peak := seen.peaks.get(trial.id)) is not None:
            measured["memory_bytes"] = peak
        if latency is not None:
            batch = latency.setting.batch
            timing = seen.timings.get(trial.id)
            own |= {"latency_ms": ms, "ms_per_sample": ms / batch}
            if timing is not None:
                unit = latency.dense_ms
                measured |= {"latency_ms": timing.ratio * unit, "ms_per_sample": timing.ratio * unit / batch}
                ends = (timing.low * unit, timing.high * unit)
                intervals |= {"latency_ms": ends, "ms_per_sample": (ends[0] / batch, ends[1] / batch)}
        own |= measured
        predicted = trial.predicted or {name: trial.costs[name] for name in measured}
        now = replace(trial, costs=own, predicted=predicted, cost_intervals=intervals)
        corrected.append(replace(now, feasible=within(now.upper_costs, study.limits)))
    return corrected


def _notes_on_latency(study: Study, trials: Sequence[Trial], seen: _Seen) -> list[str]:
    """Notes that compare predictions with measurements, in plain words."""
    measured = [trial for trial in trials if "latency_ms" in trial.predicted]
    latency = seen.latency
    if not measured or latency is None:
        return []
    notes = [f"latency: {_comparison(study, measured, TIMED)}"]
    now = float(np.median([timing.ms / timing.ratio for timing in seen.timings.values()]))
    if abs(now / latency.dense_ms - 1) > _DRIFT:
        notes.append(
            f"the dense network takes {now:.4g} ms now and took {latency.dense_ms:.4g} ms when the table was measured; "
            "latencies are stated at the speed that the machine had then"
        )
    noise = note_of_noise(list(seen.timings.values()))
    return [*notes, *([noise] if noise else [])]


def _notes_on_memory(study: Study, trials: Sequence[Trial]) -> list[str]:
    measured = [trial for trial in trials if "memory_bytes" in trial.predicted]
    return [f"memory_bytes: {_comparison(study, measured, ('memory_bytes',))}"] if measured else []


def _comparison(study: Study, measured: Sequence[Trial], names: Sequence[str]) -> str:
    """Error of the predictions of the first of some costs, and the number of trials that missed a limit on any."""
    cost = names[0]
    limits = {name: limit for name, limit in study.limits.items() if name in names}
    errors = np.array([abs(trial.predicted[cost] / trial.costs[cost] - 1) for trial in measured])
    missed = sum(not within(trial.upper_costs, limits) for trial in measured)
    dense = " against the dense one" if cost in TIMED else ""
    return (
        f"{len(measured)} networks were measured{dense}; predictions were off by {np.median(errors):.1%} on the "
        f"median, {errors.max():.1%} at most; "
        + (f"{missed} missed a limit and gave way to the next" if missed else "none missed a limit")
    )
