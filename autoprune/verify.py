"""Measure the networks that a search offers under a latency budget, and correct what was predicted of the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from autoprune.costs import Latency, make_costs
from autoprune.costs.profile import setting_of, time_networks
from autoprune.costs.runtimes import runtime_of
from autoprune.costs.timing import Timing, clock_for, note_of_noise
from autoprune.errors import UnsupportedModelError
from autoprune.protocols import IntArray
from autoprune.result.trials import Trial, find_front, within
from autoprune.structure.slicing import Edit, build
from autoprune.study import TIMED, Study

log = logging.getLogger(__name__)

_AT_ONCE = 12  # networks that exist, and are compared, at once
_DRIFT = 0.1  # a dense network that is slower or faster by more than this is worth a word


def verify(study: Study, found: Sequence[Trial]) -> tuple[list[Trial], tuple[str, ...]]:
    """Measure every trial on the front against the dense network, until the front holds measured trials only.

    What is measured replaces what was predicted. The model is fitted again with the new evidence, and predicts the rest
    again; where a trial misses a limit, the next one takes its place on the front, and is measured too.

    Args:
        study: The search.
        found: Its trials.

    Returns:
        The trials with corrected costs, and notes that say what was measured.
    """
    trials, latency = list(found), study.latency
    limited = [name for name in TIMED if name in study.limits]
    if latency is None or not limited:
        return trials, ()
    context = study.context
    try:
        runtime = runtime_of(latency.setting.runtime)
    except (ImportError, ValueError) as error:
        why = f"measured with runtime {latency.setting.runtime} {latency.setting.runtime_version}; {error}"
        return trials, (f"latencies are predictions, not verified here: {why}",)
    setting = setting_of(context.model, (study.latency_batch,), {}, latency.setting.batch, runtime)
    if differing := latency.setting.elsewhere(setting):
        return trials, (f"latencies are predictions, not verified here: measured with {'; '.join(differing)}",)

    def call(module: nn.Module) -> Callable[[], Any]:
        return runtime.network(module.eval(), context.forward, (study.latency_batch,), {})

    clock = clock_for(next(context.model.parameters()).device, runtime.elsewhere)
    timings: dict[int, Timing] = {}
    try:
        dense = call(build(context.model, Edit({}, {})))
        while todo := _unmeasured(study, trials, timings):
            calls = [call(study.evaluator.build(np.array(trial.candidate, dtype=np.int64))) for trial in todo]
            measured = time_networks(calls, dense, clock)
            timings.update(zip((trial.id for trial in todo), measured, strict=True))
            widths = context.space.widths(_candidates(todo)).astype(np.int64)
            ratio, uncertainty = np.array([(timing.ratio, timing.uncertainty) for timing in measured]).T
            latency = latency.refitted(widths, ratio, uncertainty)
            trials = _corrected(study, trials, latency, timings)
    except KeyboardInterrupt:
        log.warning("interrupted; some latencies on the front are predictions")
        return trials, (*_notes(trials, timings, latency), "interrupted: some latencies on the front are predictions")
    except UnsupportedModelError as error:
        return trials, (*_notes(trials, timings, latency), f"some latencies on the front are predictions: {error}")
    return trials, tuple(_notes(trials, timings, latency))


def _unmeasured(study: Study, trials: Sequence[Trial], timings: Mapping[int, Timing]) -> list[Trial]:
    """Trials on the front that are still to be measured, as many as are compared at once."""
    front = find_front(trials, tuple(study.limits), study.context.judge.higher_is_better)
    return [trial for trial in front if trial.id not in timings][:_AT_ONCE]


def _candidates(trials: Sequence[Trial]) -> IntArray:
    return np.array([trial.candidate for trial in trials], dtype=np.int64)


def _corrected(study: Study, trials: Sequence[Trial], latency: Latency, timings: Mapping[int, Timing]) -> list[Trial]:
    """Trials with measured latencies where there are some, and with those of the refitted model elsewhere."""
    batch = latency.setting.batch
    costs = make_costs(study.context.structure, study.context.space, None, batch, latency)
    again = costs["latency_ms"](_candidates(trials)).tolist()
    corrected = []
    for trial, ms in zip(trials, again, strict=True):
        timing = timings.get(trial.id)
        predicted, intervals = trial.predicted, trial.cost_intervals
        if timing is not None:
            ms = timing.ratio * latency.dense_ms
            predicted = predicted or {name: trial.costs[name] for name in TIMED}
            ends = (timing.low * latency.dense_ms, timing.high * latency.dense_ms)
            intervals = {"latency_ms": ends, "ms_per_sample": (ends[0] / batch, ends[1] / batch)}
        own = {**trial.costs, "latency_ms": ms, "ms_per_sample": ms / batch}
        feasible = within(own, study.limits)
        corrected.append(replace(trial, costs=own, predicted=predicted, cost_intervals=intervals, feasible=feasible))
    return corrected


def _notes(trials: Sequence[Trial], timings: Mapping[int, Timing], latency: Latency) -> list[str]:
    """How predictions compare with what was measured, in plain words."""
    measured = [trial for trial in trials if trial.predicted]
    if not measured:
        return []
    errors = np.array([abs(trial.predicted["latency_ms"] / trial.costs["latency_ms"] - 1) for trial in measured])
    missed = sum(not trial.feasible for trial in measured)
    notes = [
        f"latency: {len(measured)} networks were measured against the dense one; predictions were off by "
        f"{np.median(errors):.1%} on the median, {errors.max():.1%} at most; "
        + (f"{missed} missed a limit and gave way to the next" if missed else "none missed a limit")
    ]
    now = float(np.median([timing.ms / timing.ratio for timing in timings.values()]))
    if abs(now / latency.dense_ms - 1) > _DRIFT:
        notes.append(
            f"the dense network takes {now:.4g} ms now and took {latency.dense_ms:.4g} ms when the table was measured; "
            "latencies are stated at the speed that the machine had then"
        )
    noise = note_of_noise(list(timings.values()))
    return [*notes, *([noise] if noise else [])]
