"""What was measured of the networks that a search found, and its trials as they are by that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, replace
from typing import Any, final

import numpy as np
from torch import nn

from autoprune.batches import closing
from autoprune.costs import Latency, make_costs
from autoprune.costs.profile import time_networks
from autoprune.costs.runtimes import runtime_of
from autoprune.costs.setting import setting_of
from autoprune.costs.timing import Timing, clock_for
from autoprune.errors import UnsupportedModelError
from autoprune.protocols import IntArray
from autoprune.result.trials import Trial, find_front, within
from autoprune.sources import seeded
from autoprune.structure.slicing import Edit, build
from autoprune.study import Study

_AT_ONCE = 12  # networks that exist, and are compared, at once


@final
class Measured:
    """Times and peaks of memory of trials, by their ids, and the latency model, fitted to them too.

    Args:
        study: The search.

    Attributes:
        latency: What predicts latencies by now; None if there is nothing to predict them.
        elsewhere: What differs here from where the latency table was measured, so that no trial is timed; or empty.
        untimed: Why trials could not be timed, or no further ones; empty as long as all can be.
        timings: Times against the dense network, the latest of each.
        peaks: Bytes at the peak of memory.
    """

    def __init__(self, study: Study) -> None:
        self.latency = study.latency
        self.elsewhere = "" if study.latency is None else _elsewhere(study, study.latency)
        self.untimed = ""
        self.timings: dict[int, Timing] = {}
        self.peaks: dict[int, float] = {}

    @property
    def timing(self) -> bool:
        """Whether trials are timed."""
        return self.latency is not None and not self.elsewhere and not self.untimed

    @seeded(0)  # a model may draw noise
    def complete(self, study: Study, found: Sequence[Trial], anew: bool = False) -> list[Trial]:
        """Measure trials on the front, and put them right, until the front holds measured trials only.

        Those that were measured before are not measured again, unless all are to be measured `anew`: of those just
        within a limit, some are there by luck, and the more often one looks, the more of them.
        """
        trials = list(found)
        done = set[int]() if anew else {*self.timings, *self.peaks}
        while todo := self._left(study, trials, done):
            modules = [study.evaluator.build(np.array(trial.candidate, dtype=np.int64)).eval() for trial in todo]
            self._measure(study, todo, modules)
            done.update(trial.id for trial in todo)
            trials = self.corrected(study, trials)
        return trials

    def corrected(self, study: Study, found: Sequence[Trial]) -> list[Trial]:
        """Trials with measured costs where there are some, and with latencies of the refitted model elsewhere."""
        if not self.timings and not self.peaks:
            return list(found)
        latency, again = self.latency, [0.0] * len(found)
        if latency is not None and self.timings:
            costs = make_costs(study.context.structure, study.context.space, None, latency.setting.batch, latency)
            again = costs["latency_ms"](_candidates(found)).tolist()
        corrected = []
        for trial, ms in zip(found, again, strict=True):
            measured: dict[str, float] = {}
            own, intervals = dict(trial.costs), dict(trial.cost_intervals)
            if (peak := self.peaks.get(trial.id)) is not None:
                measured["memory_bytes"] = peak
            if latency is not None and self.timings:
                batch, timing = latency.setting.batch, self.timings.get(trial.id)
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

    def to_json(self) -> dict[str, Any]:
        """JSON-ready times."""
        return {str(trial): asdict(timing) for trial, timing in self.timings.items()}

    def restore(self, study: Study, timings: Mapping[str, Any], candidates: Mapping[int, Sequence[int]]) -> None:
        """Take up the times of an earlier process, from `to_json`; of `candidates`, by trial."""
        self.timings = {int(trial): Timing(**timing) for trial, timing in timings.items()}
        self._fit(study, np.array([candidates[trial] for trial in self.timings], dtype=np.int64), self.timings)

    def _left(self, study: Study, trials: Sequence[Trial], done: AbstractSet[int]) -> list[Trial]:
        """Trials on the front that are still to be measured, as many as are compared at once."""
        if not self.timing and study.memory is None:
            return []
        front = find_front(trials, tuple(study.limits), study.context.judge.higher_is_better)
        return [trial for trial in front if trial.id not in done][:_AT_ONCE]

    def _measure(self, study: Study, trials: Sequence[Trial], modules: Sequence[nn.Module]) -> None:
        """Measure trials, given as built."""
        if study.memory is not None:
            forward = closing(study.context.forward)
            peaks = [study.memory.measure(module, forward, study.priced, {}) for module in modules]
            self.peaks.update(zip((trial.id for trial in trials), peaks, strict=True))
        if self.latency is not None and self.timing:
            try:
                timings = _time(study, self.latency, modules)
            except (UnsupportedModelError, RuntimeError) as error:  # out of memory, say: the search must not be lost
                self.untimed = str(error).partition("\n")[0]  # exporters print whole graphs behind it
                return
            new = dict(zip((trial.id for trial in trials), timings, strict=True))
            self.timings |= new
            self._fit(study, _candidates(trials), new)

    def _fit(self, study: Study, candidates: IntArray, timings: Mapping[int, Timing]) -> None:
        """Fit the latency model to these candidates (n, d), too."""
        if self.latency is None or not timings:
            return
        widths = study.context.space.widths(candidates).astype(np.int64)
        ratio, uncertainty = np.array([(timing.ratio, timing.uncertainty) for timing in timings.values()]).T
        self.latency = self.latency.refitted(widths, ratio, uncertainty)


def _elsewhere(study: Study, latency: Latency) -> str:
    """What differs here from where the table was measured; empty if nothing does."""
    setting = latency.setting
    try:
        runtime = runtime_of(setting.runtime)
    except (ImportError, ValueError) as error:
        return f"runtime {setting.runtime} {setting.runtime_version}; {error}"
    here = setting_of(study.context.model, study.priced, {}, setting.batch, runtime)
    return "; ".join(setting.elsewhere(here))


def _time(study: Study, latency: Latency, modules: Sequence[nn.Module]) -> list[Timing]:
    """Time networks against the dense one in one interleaved run."""
    context, forward = study.context, closing(study.context.forward)
    runtime = runtime_of(latency.setting.runtime)
    dense = runtime.network(build(context.model, Edit({}, {})).eval(), forward, study.priced, {})
    calls = [runtime.network(module, forward, study.priced, {}) for module in modules]
    return time_networks(calls, dense, clock_for(next(context.model.parameters()).device, runtime.elsewhere))


def _candidates(trials: Sequence[Trial]) -> IntArray:
    return np.array([trial.candidate for trial in trials], dtype=np.int64)
