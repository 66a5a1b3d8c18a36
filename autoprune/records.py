"""From what was measured to what is told, kept and returned: evaluations, trials, the result, a run's identity."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from autoprune.errors import InfeasibleBudgetError
from autoprune.execution import Outcome
from autoprune.metrics import Summary, summary
from autoprune.protocols import FAILED, OK, Evaluations, Failure, IntArray, Measurement
from autoprune.result import SearchResult
from autoprune.result.builders import FromEvaluator
from autoprune.result.held_out import note_of_held_out
from autoprune.result.trials import Evaluation, Trial, find_front, meets, note_of_probes, or_nan, within
from autoprune.statistics import statistics_of
from autoprune.study import Study

log = logging.getLogger(__name__)


def evaluations_of(study: Study, candidate: IntArray, outcome: Outcome) -> Evaluations:
    """One row for the optimizer: the signal, then the limited costs."""
    costs = study.problem.costs(candidate[None])[0]
    failed = isinstance(outcome, Failure)
    measured = statistics_of(outcome)
    spread = np.nan if failed else measured.signal_stderr or 0.0
    acceptable = meets(or_nan(measured.metric), study.worst_score, study.context.judge.higher_is_better)
    return Evaluations(
        candidates=candidate[None],
        objectives=np.array([[or_nan(measured.signal), *(np.full_like(costs, np.nan) if failed else costs)]]),
        stderr=np.array([[spread, *np.zeros_like(costs)]]),
        samples=np.array([measured.samples], dtype=np.int64),
        status=(FAILED if failed else OK,),
        reasons=(outcome.reason if isinstance(outcome, Failure) else "",),
        distortion=np.array([or_nan(measured.distortion)]),
        acceptable=np.array([acceptable]),
    )


def trial_of(
    study: Study, number: int, candidate: IntArray, outcome: Outcome, dense: Measurement | None = None
) -> Trial:
    """A record of a candidate and its one evaluation; `dense` is what an evaluation of the dense model saw."""
    failed = isinstance(outcome, Failure)
    nothing = Summary(math.nan, math.nan, (math.nan, math.nan))
    metric = nothing if isinstance(outcome, Failure) else summary(outcome.metric, study.context.judge.proportion)
    measured = statistics_of(outcome, dense)
    costs = {name: float(cost(candidate[None])[0]) for name, cost in study.costs.items()}
    return Trial(
        id=number,
        candidate=tuple(candidate.tolist()),
        decoded=study.context.space.decode(candidate.tolist()),
        costs=costs,
        score=metric.mean,
        interval=metric.interval,
        signal=or_nan(measured.signal),
        status=FAILED if failed else OK,
        reason=outcome.reason if isinstance(outcome, Failure) else "",
        evaluations=(Evaluation(fidelity="full", seconds=outcome.seconds, **measured._asdict()),),
        feasible=within(costs, study.limits),
    )


def result_of(
    study: Study,
    found: list[Trial],
    dense: Trial,
    stopped: str,
    seconds: float,
    seed: int,
    explained: Sequence[str] = (),
) -> SearchResult:
    """Score the front once on held-out samples, and put everything together."""
    judge = study.context.judge
    front = find_front(found, tuple(study.limits), judge.higher_is_better)
    tests: dict[int, Measurement] = {}
    try:
        for trial in (dense, *front):
            outcome = study.evaluator.test(np.array(trial.candidate, dtype=np.int64))
            if isinstance(outcome, Measurement):
                tests[trial.id] = outcome
    except KeyboardInterrupt:
        log.warning(
            "interrupted; only %d of %d trials on the front have a test score", max(len(tests) - 1, 0), len(front)
        )
        stopped = "interrupted"
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
        seconds=seconds,
        seed=seed,
        _builder=FromEvaluator(study.evaluator, study.context),
    )
    return replace(result, notes=(*result.notes, *_notes_of_score(study, result, tests)))


def _tested(trial: Trial, tests: Mapping[int, Measurement]) -> Trial:
    return replace(trial, test_score=float(tests[trial.id].metric.mean())) if trial.id in tests else trial


def _notes_of_score(study: Study, result: SearchResult, tests: Mapping[int, Measurement]) -> list[str]:
    """Whether the limits on the score hold for the trial that `SearchResult.best` gives, and on held-out data."""
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


def identity_of(study: Study, dense: Trial, seed: int, trials: int | str) -> dict[str, Any]:
    """What identifies a run in the journal."""
    return {
        "budget": str(study.budget),
        "limits": dict(study.limits),
        "seed": seed,
        "trials": trials,
        "metric": study.context.judge.name,
        "higher_is_better": study.context.judge.higher_is_better,
        "space": study.context.space.to_json(),
        "dense": dense.to_json(),
        "data": study.context.subsets.fingerprint,
        "notes": list(study.notes),
        "threads": torch.get_num_threads(),
        "device": str(next(study.context.model.parameters()).device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
