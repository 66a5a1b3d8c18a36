"""Run evaluations in this process, one after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from autoprune.arguments import said
from autoprune.early_stopping.racing import Contest, evaluate
from autoprune.evaluators import Context, Evaluator, Orders
from autoprune.protocols import Failure, IntArray, Measurement

log = logging.getLogger(__name__)

Outcome = Measurement | Failure

GENERATION = 8
"""Candidates asked for at once where results must not depend on the speed of workers."""


class Finished(NamedTuple):
    """Result of an evaluation: the trial's number, its outcome, and the name of the worker."""

    trial: int
    outcome: Outcome
    worker: str


def evaluate_one(evaluator: Evaluator, candidate: IntArray, race: Contest | None = None) -> Outcome:
    """Score one candidate, shape (d,), which may lose its race before it has seen all samples; never raises."""
    return attempt(lambda: evaluate(evaluator, candidate, race))


def attempt(measure: Callable[[], Outcome]) -> Outcome:
    """Measure an outcome; an error of a user's evaluator, or a value that is no number, is a failure of one trial."""
    began = time.perf_counter()
    try:
        outcome = measure()
    except Exception as error:  # not KeyboardInterrupt, which ends the search
        log.debug("an evaluation failed", exc_info=error)
        return Failure(said(error), time.perf_counter() - began)
    seen = [values for one in outcome.stages if isinstance(one, Measurement) for values in (one.signal, one.metric)]
    if not all(np.isfinite(values).all() for values in seen):
        return Failure("the score of a sample is NaN or infinite", outcome.seconds)
    return outcome


class Executor(Protocol):
    """Runs evaluations, here or elsewhere. Receives integers only; results come back in any order.

    Attributes:
        name: Name of this kind of execution in the journal.
        threads: PyTorch threads of each worker; None where evaluations run in this process.
    """

    name: str
    threads: int | None

    def start(self, evaluator: Evaluator, context: Context, fresh: Evaluator) -> None:
        """Send the evaluator and its context to the workers, once.

        Args:
            evaluator: Prepared on the context in this process.
            context: Everything that a worker holds.
            fresh: The same evaluator before it was prepared, which pickles.
        """
        ...

    def room(self) -> int:
        """Number of further candidates to submit now; 0 while all workers have enough to do, or before `start`."""
        ...

    def submit(self, trials: list[int], candidates: IntArray, races: Sequence[Contest | None]) -> None:
        """Queue candidates, shape (n, d), under their trial numbers, each with the race that it runs, if any."""
        ...

    def gather(self) -> list[Finished]:
        """Wait for at least one outcome and return those that are there; empty when nothing is queued."""
        ...

    def stop(self) -> None:
        """Release everything that `start` acquired."""
        ...


@runtime_checkable
class Hurries(Protocol):
    """Optional protocol: executors that wait for other processes, and stop waiting at a time.

    Attributes:
        until: Time by `time.monotonic` from which on `gather` returns what is there, or nothing; infinite for never.
    """

    until: float


class LocalExecutor:
    """Evaluates in this process.

    Args:
        generation: Candidates asked for at once. Larger ones share more work between candidates; smaller ones let an
            optimizer learn sooner.
    """

    name = "local"
    threads: int | None = None

    def __init__(self, generation: int = GENERATION) -> None:
        self._generation = generation
        self._queue: list[tuple[int, IntArray, Contest | None]] = []
        self._evaluator: Evaluator | None = None

    def start(self, evaluator: Evaluator, context: Context, fresh: Evaluator) -> None:
        """Use the evaluator as it is."""
        self._evaluator = evaluator

    def room(self) -> int:
        """Return a whole generation once the last one is done, so that runs with one seed agree."""
        return 0 if self._queue or self._evaluator is None else self._generation

    def submit(self, trials: list[int], candidates: IntArray, races: Sequence[Contest | None]) -> None:
        """Queue candidates, in the order of the evaluator if it has one."""
        evaluator = self._evaluator
        order = evaluator.order(candidates.copy()) if isinstance(evaluator, Orders) else np.arange(len(trials))
        self._queue.extend((trials[i], candidates[i], races[i]) for i in order.tolist())

    def gather(self) -> list[Finished]:
        """Evaluate the next candidate in the queue."""
        if not self._queue:
            return []
        assert self._evaluator is not None
        trial, candidate, race = self._queue.pop(0)
        return [Finished(trial, evaluate_one(self._evaluator, candidate, race), self.name)]

    def stop(self) -> None:
        """Forget the queue, and let the evaluator free what it keeps for further candidates."""
        self._queue.clear()
        if isinstance(self._evaluator, Orders):
            self._evaluator.release()
        self._evaluator = None
