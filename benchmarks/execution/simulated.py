"""Stand-ins that leave nothing of a search but its driver: an evaluator in memory, and workers that only take time."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import autoprune
from autoprune.early_stopping.racing import Race
from autoprune.evaluators import Context, Evaluator
from autoprune.execution import Execution, Finished
from autoprune.protocols import FloatArray, IntArray, Measurement

WIDTH = 16


def chain(dimensions: int) -> nn.Module:
    """Linear layers one after the other: each width is a dimension of 16 options, and neighbours multiply."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(8, WIDTH), nn.ReLU()]
    for _ in range(dimensions - 1):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 4)).eval()


def search(dimensions: int, **options: Any) -> autoprune.SearchResult:
    """A search of `chain` that evaluates in memory, unless told otherwise."""
    x, y = torch.zeros(12, 8), torch.zeros(12, dtype=torch.int64)
    options = {"evaluator": InMemory(), "metric": "cross_entropy", "execution": Execution(progress=False), **options}
    return autoprune.search(chain(dimensions), "flops <= 50%", (x, y), **options)


class InMemory:
    """Scores candidates by a sum of random powers of their options, one value in place of one for each sample."""

    def __init__(self, samples: int = 1) -> None:
        self._samples = samples

    def prepare(self, context: Context) -> None:
        rng, sizes = np.random.default_rng(0), context.space.sizes
        self._last, self._weights = np.maximum(sizes - 1, 1), rng.lognormal(size=len(sizes))

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement]:
        losses = (candidates / self._last) ** 2 @ self._weights
        values = [np.full(self._samples, loss) for loss in losses]
        return [Measurement(row, row, 0.0, row) for row in values]

    def test(self, candidate: IntArray) -> Measurement:
        return self.evaluate(candidate[None])[0]

    def build(self, candidate: IntArray) -> nn.Module:
        raise NotImplementedError("nothing is built in a simulation")


def lognormal(seed: int, median: float = 1.0, sigma: float = 1.0) -> Callable[[], float]:
    """Seconds of one evaluation after the other, with a heavy tail."""
    rng = np.random.default_rng(seed)
    return lambda: float(median * rng.lognormal(0.0, sigma))


class SimulatedWorkers:
    """Executor in simulated time: evaluations take given times, the driver its real time.

    The work of the search between two calls, which is to ask, tell and write the journal, is timed and advances the
    clock; a wait for workers advances it to the next result and takes no real time. Each worker has a separate queue.

    Args:
        workers: Number of workers.
        seconds: Gives the length of the next evaluation.
        ahead: Candidates waiting on each worker in addition to the one that it evaluates.
        generation: Candidates asked for at once, and only when the last of them is done; None for a steady state.
        overhead: Seconds that the driver spends on each task beyond what is measured here: the messages of Ray.
    """

    name, threads = "simulated", 1

    def __init__(
        self,
        workers: int,
        seconds: Callable[[], float],
        ahead: int = 1,
        generation: int | None = None,
        overhead: float = 0.0,
    ) -> None:
        self._seconds, self._generation, self._overhead = seconds, generation, overhead
        self._slots = workers * (1 + ahead) if generation is None else generation
        self.workers, self.now, self.driver = workers, 0.0, 0.0
        self.spans: list[tuple[float, float]] = []  # begin and end of every evaluation
        self.submitted: list[float] = []
        self._left = 0.0
        self._free = np.zeros(workers)  # when each worker is through with its queue
        self._tasks = np.zeros(workers, dtype=np.int64)
        self._running: list[tuple[float, int, int, IntArray]] = []

    def start(self, evaluator: Evaluator, context: Context, fresh: Evaluator) -> None:
        self._evaluator = evaluator
        self._left = time.process_time()

    def room(self) -> int:
        if self._generation is not None:
            return 0 if self._running else self._generation
        return self._slots - len(self._running)

    def submit(self, trials: list[int], candidates: IntArray, races: Sequence[Race | None]) -> None:
        self._advance(len(trials))
        for trial, candidate in zip(trials, candidates, strict=True):
            worker = int(self._tasks.argmin())
            begin = max(float(self._free[worker]), self.now)
            end = begin + self._seconds()
            self._free[worker] = end
            self._tasks[worker] += 1
            heapq.heappush(self._running, (end, trial, worker, candidate))
            self.spans.append((begin, end))
        self.submitted.append(self.now)
        self._left = time.process_time()

    def gather(self) -> list[Finished]:
        self._advance()
        ready = []
        if self._running:
            self.now = max(self.now, self._running[0][0])
        while self._running and self._running[0][0] <= self.now:
            ready.append(heapq.heappop(self._running))
            self._tasks[ready[-1][2]] -= 1
        finished = [
            Finished(trial, outcome, f"simulated-{worker}")
            for (_, trial, worker, _), outcome in zip(
                ready, self._evaluator.evaluate(np.array([row[-1] for row in ready])) if ready else [], strict=True
            )
        ]
        self._left = time.process_time()
        return finished

    def stop(self) -> None:
        self._evaluator = None  # type: ignore[assignment]  # until `start`

    def _advance(self, tasks: int = 0) -> None:
        """Let the clock catch up with what the driver did since it was here."""
        took = time.process_time() - self._left + tasks * self._overhead
        self.driver += took
        self.now += took


def utilisation(spans: list[tuple[float, float]], window: tuple[float, float], workers: int) -> float:
    """Share of a window of time in which workers were evaluating."""
    begin, end = np.array(spans).T
    busy: FloatArray = np.clip(np.minimum(end, window[1]) - np.maximum(begin, window[0]), 0.0, None)
    return float(busy.sum()) / (workers * (window[1] - window[0]))
