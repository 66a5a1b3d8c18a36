"""Run evaluations in this process, one after the other."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from autoprune.evaluators import Context, Evaluator
from autoprune.protocols import Failure, IntArray, Measurement

Outcome = Measurement | Failure


class Executor(Protocol):
    """Runs evaluations somewhere. Receives integers only; results come back in any order."""

    name: str

    def start(self, evaluator: Evaluator, context: Context) -> None:
        """Bring an evaluator, prepared here already, and its context to the workers, once."""
        ...

    def room(self) -> int:
        """How many more candidates to submit now; 0 while all workers have enough to do."""
        ...

    def submit(self, trials: list[int], candidates: IntArray) -> None:
        """Queue candidates, shape (n, d), under their trial numbers."""
        ...

    def gather(self) -> list[tuple[int, Outcome]]:
        """Wait for at least one outcome and return those that are there; empty when nothing is queued."""
        ...

    def stop(self) -> None:
        """Let go of whatever `start` took."""
        ...


class LocalExecutor:
    """Evaluates in this process.

    Args:
        generation: Candidates asked for at once. Larger ones share more work between candidates; smaller ones let an
            optimizer learn sooner.
    """

    name = "local"

    def __init__(self, generation: int = 8) -> None:
        self._generation = generation
        self._queue: list[tuple[int, IntArray]] = []
        self._evaluator: Evaluator | None = None

    def start(self, evaluator: Evaluator, context: Context) -> None:
        """Use the evaluator as it is."""
        self._evaluator = evaluator

    def room(self) -> int:
        """A whole generation once the last one is done, so that runs with one seed agree."""
        return 0 if self._queue else self._generation

    def submit(self, trials: list[int], candidates: IntArray) -> None:
        """Queue candidates."""
        self._queue.extend(zip(trials, candidates, strict=True))

    def gather(self) -> list[tuple[int, Outcome]]:
        """Evaluate the next candidate in the queue."""
        if not self._queue:
            return []
        assert self._evaluator is not None
        trial, candidate = self._queue.pop(0)
        (outcome,) = self._evaluator.evaluate(np.stack([candidate]))
        return [(trial, outcome)]

    def stop(self) -> None:
        """Nothing to let go of."""
        self._queue.clear()


EXECUTORS = {"local": LocalExecutor}


def make_executor(spec: str | Executor) -> Executor:
    """Make the executor meant by a name, or take one already made.

    Raises:
        ValueError: If it is an unknown name, or no executor.
    """
    if isinstance(spec, str) and spec in EXECUTORS:
        return EXECUTORS[spec]()
    if isinstance(spec, str | type) or not hasattr(spec, "submit"):
        raise ValueError(f"executor must be one of {sorted(EXECUTORS)} or an Executor instance, got {spec!r}")
    return spec
