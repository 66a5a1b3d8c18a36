"""Rungs: a candidate is scored at intermediate steps of its training, and stopped where others were better there.

Asynchronous successive halving in its stopping form: a candidate continues at once if it is good enough so far, and one
that was stopped is never resumed, so a worker holds one training and decides alone. "Good enough" is decided by fronts,
as there is a best candidate for every budget. Unlike a race this is a heuristic: the network that is ahead after a
ninth of the training need not be ahead at its end, and no error probability is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from autoprune.arguments import is_number, shown, whole_number
from autoprune.border import checked, only
from autoprune.pareto import non_dominated
from autoprune.protocols import Failure, FloatArray, IntArray, Measurement

if TYPE_CHECKING:
    from autoprune.evaluators.protocol import Evaluator, Trains

MOST_RUNGS = 100


@dataclass(frozen=True)
class Rungs:
    """Stop trainings early, as with ``early_stopping=Rungs(3)`` and ``evaluator=FineTune(steps=900)``.

    Candidates are then scored after 100 and 300 steps. There, trials are ranked by fronts: those that none
    dominates in score and cost, those that only these dominate, and so on. A candidate is stopped if one that costs no
    more, and is not among the best third itself, scored better after as many steps.

    Attributes:
        count: Rungs, the whole training among them.
        reduction: Ratio of the steps of consecutive rungs, and one over the share of trials that may pass a rung.

    Reference:
        Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020, arXiv:1810.05934; by fronts:
        Schmucker et al., "Multi-objective Asynchronous Successive Halving", 2021, arXiv:2106.12639.
    """

    count: int = 3
    reduction: float = 3.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", whole_number("count", self.count, 2, MOST_RUNGS))
        if not (is_number(self.reduction) and self.reduction > 1):
            raise ValueError(f"reduction must be a number above 1, got {shown(self.reduction)}")

    def steps(self, total: int) -> tuple[int, ...]:
        """Training steps of each rung, ascending, up to `total`.

        Raises:
            ValueError: If these are too few for the number of rungs.
        """
        steps = tuple(round(total / self.reduction**i) for i in reversed(range(self.count)))
        if steps[0] < 1 or len(set(steps)) < self.count:
            raise ValueError(
                f"{self.count} rungs must differ in steps, got {steps}; train for more than {total} steps, or pass "
                "Rungs with a smaller count"
            )
        return steps


@dataclass(frozen=True)
class Rung:
    """Threshold for a candidate at one intermediate step of its training.

    Attributes:
        steps: Training steps before it.
        bar: A candidate is stopped if its mean signal is above; infinite where none is stopped.
        rival: The trial with that signal; -1 where there is none.
    """

    steps: int
    bar: float = math.inf
    rival: int = -1


@dataclass(frozen=True)
class Ladder:
    """Rungs below the whole training, for one candidate, and the steps of the whole. It is sent to workers."""

    rungs: tuple[Rung, ...]
    total: int


def climb(evaluator: Evaluator, candidate: IntArray, ladder: Ladder) -> Measurement | Failure:
    """Train and score a candidate, shape (d,), until it is behind at a rung.

    A candidate that passes all of them has the score of an evaluation without rungs, to the last bit.
    """
    trains = cast("Trains", evaluator)  # a search with rungs requires it before its first trial
    passed: list[Measurement] = []
    for rung in ladder.rungs:
        seen = checked(evaluator, trains.on_the_way(candidate.copy(), rung.steps), "on_the_way")
        if isinstance(seen, Failure):
            return _failed(seen, passed)
        outcome = replace(seen, steps=rung.steps)
        if outcome.signal.mean() > rung.bar:
            reason = f"behind trial {rung.rival} after {rung.steps} of {ladder.total} steps"
            return replace(outcome, raced=reason, rungs=tuple(passed))
        passed.append(outcome)
    last = only(evaluator, evaluator.evaluate(candidate[None].copy()))
    return _failed(last, passed) if isinstance(last, Failure) else replace(last, rungs=tuple(passed))


def _failed(failure: Failure, passed: Sequence[Measurement]) -> Failure:
    return replace(failure, seconds=failure.seconds + sum(before.seconds for before in passed))


def behind(objectives: FloatArray, reduction: float) -> NDArray[np.bool_]:
    """Mark the points that are not among the best, by fronts.

    Whole fronts count as the best, one after the other, as long as together they hold less than one over `reduction` of
    the points and one to come, rounded up.

    Args:
        objectives: Shape (n, m), lower is better.
        reduction: Above 1.

    Returns:
        True for the points on the fronts that are left, shape (n,).
    """
    left = np.ones(len(objectives), dtype=np.bool_)
    room = math.ceil((len(objectives) + 1) / reduction)
    while left.any():
        front = np.flatnonzero(left)[non_dominated(objectives[left])]
        room -= len(front)
        if room <= 0:
            break
        left[front] = False
    return left
