"""Promotion at rungs: the bars that each candidate must pass, by the scores of others, and a note on saved steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoprune.early_stopping.successive_halving import Ladder, Rung, Rungs, behind
from autoprune.evaluators import Evaluator, Trains
from autoprune.protocols import OK, RACED, FloatArray
from autoprune.result.trials import Trial, costs_of
from autoprune.study.study import Study


def require_training(evaluator: Evaluator, rungs: Rungs) -> Trains:
    """Check the evaluator of a search with rungs.

    Raises:
        ValueError: If it trains no candidates, or not for long enough.
    """
    if not isinstance(evaluator, Trains):
        raise ValueError(
            "early_stopping=Rungs(...) needs an evaluator that trains each candidate, such as "
            f"autoprune.evaluators.FineTune(steps=900), got {type(evaluator).__name__}; use that, or "
            "early_stopping=True"
        )
    rungs.steps(evaluator.steps)
    return evaluator


class Promotion:
    """Sets the bars of every rung by the trials that reached it.

    Only trials of earlier asks count, as in a race, so that local, synchronous and resumed searches decide alike; and
    only those that cost no more. Probes of single dimensions pass everywhere, because the tables made from them need
    full scores.

    Args:
        study: With an evaluator that trains.
        rungs: The settings.
    """

    def __init__(self, study: Study, rungs: Rungs) -> None:
        self._study, self._rungs = study, rungs
        self._steps = rungs.steps(require_training(study.evaluator, rungs).steps)

    def ladders(self, trials: Sequence[Trial], found: Sequence[Trial]) -> list[Ladder]:
        """Make the rungs of each of the trials to be scored, from those found before they were asked for."""
        problem = self._study.problem
        costs = costs_of(trials, problem.cost_names)
        probes = problem.probes(np.array([trial.candidate for trial in trials], dtype=np.int64))
        columns = [self._rung(steps, costs, probes, found) for steps in self._steps[:-1]]
        return [Ladder(rungs, self._steps[-1]) for rungs in zip(*columns, strict=True)]

    def _rung(self, steps: int, costs: FloatArray, probes: NDArray[np.bool_], found: Sequence[Trial]) -> list[Rung]:
        reached = [(trial, one) for trial in found for one in trial.evaluations if one.steps == steps]
        if not reached:
            return [Rung(steps)] * len(costs)
        signal = np.array([one.signal for _, one in reached], dtype=np.float64)
        known = costs_of([trial for trial, _ in reached], self._study.problem.cost_names)
        holds = behind(np.column_stack([signal, known]), self._rungs.reduction)
        rungs = []
        for cost, probe in zip(costs, probes, strict=True):
            rivals = np.flatnonzero(holds & (known <= cost).all(axis=1) & ~probe)
            best = min(rivals, key=lambda i: (signal[i], reached[i][0].id), default=None)
            rungs.append(Rung(steps) if best is None else Rung(steps, float(signal[best]), reached[best][0].id))
        return rungs


def note_of_rungs(rungs: Rungs, study: Study, found: Sequence[Trial]) -> tuple[str, ...]:
    """Note on the number of candidates stopped at rungs and the steps saved, in plain words."""
    done = [trial for trial in found if trial.status in (OK, RACED)]
    if not done:
        return ()
    training = require_training(study.evaluator, rungs)
    steps = rungs.steps(training.steps)
    spent = sum(_spent(trial, steps[-1], training.continues) for trial in done)
    ends = [trial.evaluations[-1].steps for trial in done]
    stopped = [ends.count(at) for at in steps[:-1]]
    where = ", ".join(f"{count} after {at}" for count, at in zip(stopped, steps[:-1], strict=True))
    return (
        f"rungs stopped {sum(stopped)} of {len(done)} trainings early ({where} of {steps[-1]} steps); "
        f"{spent / (steps[-1] * len(done)):.0%} of the training steps were taken; what is behind early may still have "
        "ended ahead: this is a heuristic, without an error probability",
    )


def _spent(trial: Trial, total: int, continues: bool) -> int:
    """Training steps that a trial took, of `total` for a whole training."""
    taken = [one.steps or total for one in trial.evaluations]
    return max(taken) if continues else sum(taken)
