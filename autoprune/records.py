"""Conversion of measurements to evaluations for the optimizer, trials and the result."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from autoprune.border import checked
from autoprune.errors import InfeasibleBudgetError
from autoprune.execution import Outcome, attempt
from autoprune.metrics import summary
from autoprune.protocols import FAILED, Evaluations, FloatArray, IntArray, Measurement
from autoprune.result import SearchResult
from autoprune.result.builders import FromEvaluator
from autoprune.result.held_out import note_of_held_out
from autoprune.result.trials import Evaluation, Trial, find_front, meets, note_of_probes, or_nan, within
from autoprune.statistics import Statistics, fidelity_of, reason_of, stages_of, statistics_of, status_of
from autoprune.stopping import Deadline
from autoprune.study import Study

log = logging.getLogger(__name__)


def evaluations_of(
    study: Study,
    candidates: IntArray,
    measured: Sequence[Statistics],
    status: Sequence[str],
    reasons: Sequence[str],
) -> Evaluations:
    """Make rows for the optimizer, one for each of the candidates (n, d): the signal, then the limited costs."""
    costs = study.problem.costs(candidates)
    failed = np.array([fate == FAILED for fate in status])
    worst, higher_is_better = study.worst_score, study.context.judge.higher_is_better
    return Evaluations(
        candidates=candidates,
        objectives=np.column_stack([_column(measured, "signal"), np.where(failed[:, None], np.nan, costs)]),
        stderr=np.column_stack(
            [np.where(failed, np.nan, _column(measured, "signal_stderr", 0.0)), np.zeros_like(costs)]
        ),
        samples=np.array([row.samples for row in measured], dtype=np.int64),
        status=tuple(status),
        reasons=tuple(reasons),
        distortion=_column(measured, "distortion"),
        acceptable=np.array([meets(or_nan(row.metric), worst, higher_is_better) for row in measured], dtype=np.bool_),
    )


def _column(measured: Sequence[Statistics], name: str, missing: float = math.nan) -> FloatArray:
    values = [getattr(row, name) for row in measured]
    return np.array([missing if value is None else value for value in values], dtype=np.float64)


def trial_of(
    study: Study, number: int, candidate: IntArray, outcome: Outcome, dense: Measurement | None = None
) -> Trial:
    """Make a trial from a candidate and its outcome; `dense` is the measurement of the dense model."""
    interval = (math.nan, math.nan)
    if isinstance(outcome, Measurement) and not outcome.raced:
        interval = summary(outcome.metric, study.context.judge.proportion, outcome.weights).interval
    measured = statistics_of(outcome, dense)
    costs = {name: float(cost(candidate[None])[0]) for name, cost in study.costs.items()}
    return Trial(
        id=number,
        candidate=tuple(candidate.tolist()),
        decoded=study.context.space.decode(candidate.tolist()),
        costs=costs,
        score=or_nan(measured.metric),
        interval=interval,
        signal=or_nan(measured.signal),
        status=status_of(outcome),
        reason=reason_of(outcome),
        evaluations=tuple(
            Evaluation(fidelity=fidelity_of(one), seconds=one.seconds, **statistics_of(one, dense)._asdict())
            for one in stages_of(outcome)
        ),
        feasible=within(costs, study.limits),
    )


def result_of(
    study: Study,
    found: list[Trial],
    dense: Trial,
    stopped: str,
    deadline: Deadline,
    seed: int,
    explained: Sequence[str] = (),
) -> SearchResult:
    """Score the front once on held-out samples, as far as there is time, and make the result."""
    judge = study.context.judge
    front = find_front(found, tuple(study.limits), judge.higher_is_better)
    tests: dict[int, Measurement] = {}
    try:
        for trial in _best_first(dense, front, judge.higher_is_better):
            if deadline.passed:
                break
            outcome = attempt(partial(_tested_outcome, study, trial))
            if isinstance(outcome, Measurement):
                tests[trial.id] = outcome
    except KeyboardInterrupt:
        log.warning(
            "interrupted; only %d of %d trials on the front have a test score", max(len(tests) - 1, 0), len(front)
        )
        stopped = "interrupted"
    missing = len(front) - sum(trial.id in tests for trial in front)
    if missing and deadline.passed and stopped != "interrupted":
        told = f"{missing} of {len(front)} networks on the front were not scored on held-out data: max_seconds was over"
        explained = (*explained, told)
    result = SearchResult(
        trials=tuple(_tested(trial, tests) for trial in sorted(found, key=lambda trial: trial.id)),
        front=tuple(_tested(trial, tests) for trial in front),
        dense=_tested(dense, tests),
        space=study.context.space,
        limits=dict(study.limits),
        budget=str(study.budget),
        metric=judge.name,
        higher_is_better=judge.higher_is_better,
        notes=(*study.notes, *note_of_probes(found), *explained),
        stopped=stopped,
        seconds=deadline.spent,
        seed=seed,
        _builder=FromEvaluator(study.evaluator, study.context, study.fresh, study.costs),
    )
    notes = (*result.notes, *_notes_of_score(study, result, tests))
    return replace(result, notes=notes, seconds=deadline.spent)


def _best_first(dense: Trial, front: Sequence[Trial], higher_is_better: bool) -> list[Trial]:
    """Order the trials to test: the dense model, then the front by falling score, which `SearchResult.best` takes."""
    sign = -1.0 if higher_is_better else 1.0
    return [dense, *sorted(front, key=lambda trial: (sign * trial.score, trial.signal))]


def _tested_outcome(study: Study, trial: Trial) -> Outcome:
    measured = study.evaluator.test(np.array(trial.candidate, dtype=np.int64))
    return checked(study.evaluator, measured, "test")


def _tested(trial: Trial, tests: Mapping[int, Measurement]) -> Trial:
    return replace(trial, test_score=float(tests[trial.id].metric.mean())) if trial.id in tests else trial


def _notes_of_score(study: Study, result: SearchResult, tests: Mapping[int, Measurement]) -> list[str]:
    """Note whether the best trial meets the limits on the score on validation and on held-out data."""
    if study.worst_score is None:
        return []
    try:
        best, dense = result.best(), result.dense
    except InfeasibleBudgetError as error:
        return [str(error)]
    if not {best.id, dense.id} <= tests.keys():
        return []
    return [
        note_of_held_out(limit, study.context.judge, best, dense, tests[best.id], tests[dense.id])
        for limit in study.budget.score_limits
    ]
