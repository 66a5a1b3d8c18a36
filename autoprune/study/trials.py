"""Trials from candidates and their outcomes, rows for the optimizer from trials, and the result."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from autoprune.border import checked
from autoprune.early_stopping.interim import Interim
from autoprune.errors import InfeasibleBudgetError
from autoprune.execution import Outcome, attempt
from autoprune.metrics.judge import Judge
from autoprune.metrics.statistics import Evaluation, evaluations_of
from autoprune.metrics.summary import summary
from autoprune.pareto import Direction
from autoprune.protocols import FAILED, OK, RACED, Evaluations, FloatArray, IntArray, Measurement
from autoprune.result import SearchResult
from autoprune.result.builders import FromEvaluator
from autoprune.result.held_out import note_of_held_out
from autoprune.result.trials import Trial, costs_of, find_front, note_of_probes
from autoprune.study.study import Study

log = logging.getLogger(__name__)


def proposed(
    study: Study, numbers: Sequence[int], candidates: IntArray, costs: Mapping[str, FloatArray]
) -> list[Trial]:
    """Make the trials of candidates (n, d), which are still to be scored, with their named costs (n,)."""
    rows = zip(numbers, candidates.tolist(), strict=True)
    return [
        Trial.proposed(number, row, study.context.space, {name: float(costs[name][i]) for name in costs}, study.limits)
        for i, (number, row) in enumerate(rows)
    ]


def finished(study: Study, trial: Trial, outcome: Outcome) -> Trial:
    """Add the statistics of an outcome to a trial, once and for all."""
    interval = (math.nan, math.nan)
    if isinstance(outcome, Measurement) and not outcome.raced:
        interval = summary(outcome.metric, study.context.judge.proportion, outcome.weights).interval
    return trial.finished(evaluations_of(outcome, study.dense), outcome.status, outcome.reason, interval)


def dense_of(study: Study) -> Trial:
    """Make the trial of the unpruned model, with the number -1."""
    candidate = np.zeros((1, len(study.problem.sizes)), dtype=np.int64)
    (trial,) = proposed(study, [-1], candidate, study.costs_of(candidate))
    return finished(study, trial, study.dense)


def rows_of(study: Study, trials: Sequence[Trial]) -> Evaluations:
    """Make rows for the optimizer from n finished trials: the signal, then the limited costs."""
    failed = np.array([trial.status == FAILED for trial in trials])
    measured = [trial.evaluations[-1] for trial in trials]
    costs = costs_of(trials, study.problem.cost_names)
    worst = study.worst_score
    direction = study.context.judge.direction
    return Evaluations(
        candidates=np.array([trial.candidate for trial in trials], dtype=np.int64),
        objectives=np.column_stack([_column(measured, "signal"), np.where(failed[:, None], np.nan, costs)]),
        stderr=np.column_stack(
            [np.where(failed, np.nan, _column(measured, "signal_stderr", 0.0)), np.zeros_like(costs)]
        ),
        samples=np.array([one.samples for one in measured], dtype=np.int64),
        status=tuple(_told(study, trial) for trial in trials),
        reasons=tuple(trial.reason for trial in trials),
        distortion=_column(measured, "distortion"),
        acceptable=np.array([direction.meets(trial.score, worst) for trial in trials], dtype=np.bool_),
    )


def _told(study: Study, trial: Trial) -> str:
    """Status for the optimizer, to which an estimate from a large enough part of the samples counts like others."""
    return OK if trial.status == RACED and isinstance(study.racing, Interim) else trial.status


def _column(measured: Sequence[Evaluation], name: str, missing: float = math.nan) -> FloatArray:
    values = [getattr(one, name) for one in measured]
    return np.array([missing if value is None else value for value in values], dtype=np.float64)


def result_of(
    study: Study, dense: Trial, found: Sequence[Trial], stopped: str, explained: Sequence[str]
) -> SearchResult:
    """Score the front once on held-out samples, as far as there is time, and make the result."""
    judge = study.context.judge
    deadline = study.deadline
    front = find_front(found, tuple(study.limits), judge.direction)
    tests: dict[int, Measurement] = {}
    try:
        for trial in _best_first(dense, front, judge.direction):
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
        trials=tuple(_tested(judge, trial, tests) for trial in sorted(found, key=lambda trial: trial.id)),
        front=tuple(_tested(judge, trial, tests) for trial in front),
        dense=_tested(judge, dense, tests),
        space=study.context.space,
        limits=dict(study.limits),
        budget=str(study.budget),
        metric=judge.name,
        higher_is_better=judge.higher_is_better,
        notes=(*study.notes, *note_of_probes(found), *explained),
        stopped=stopped,
        seconds=deadline.spent,
        seed=study.request.seed,
        _builder=FromEvaluator(study.evaluator, study.context, study.fresh, study.costs),
    )
    notes = (*result.notes, *_notes_of_score(study, result, tests))
    return replace(result, notes=notes, seconds=deadline.spent)


def _best_first(dense: Trial, front: Sequence[Trial], direction: Direction) -> list[Trial]:
    """Order the trials to test: the dense model, then the front by falling score, which `SearchResult.best` takes."""
    return [dense, *sorted(front, key=lambda trial: (direction.key(trial.score), trial.signal))]


def _tested_outcome(study: Study, trial: Trial) -> Outcome:
    measured = study.evaluator.test(np.array(trial.candidate, dtype=np.int64))
    return checked(study.evaluator, measured, "test")


def _tested(judge: Judge, trial: Trial, tests: Mapping[int, Measurement]) -> Trial:
    if trial.id not in tests:
        return trial
    measured = tests[trial.id]
    interval = summary(measured.metric, judge.proportion, measured.weights).interval
    known = None if math.isnan(interval[0]) else interval
    return replace(trial, test_score=float(measured.metric.mean()), test_interval=known)


def _notes_of_score(study: Study, result: SearchResult, tests: Mapping[int, Measurement]) -> list[str]:
    """Note whether the best trial meets the limits on the score on validation and on held-out data."""
    if study.worst_score is None:
        return []
    try:
        best = result.best()
        dense = result.dense
    except InfeasibleBudgetError as error:
        return [str(error)]
    if not {best.id, dense.id} <= tests.keys():
        return []
    return [
        note_of_held_out(limit, study.context.judge, best, dense, tests[best.id], tests[dense.id])
        for limit in study.budget.score_limits
    ]
