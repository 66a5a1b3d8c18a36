"""Hundreds of workers of Ray on a few processes: asynchronous actors that sleep in place of evaluating."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from autoprune.early_stopping.racing import Race
from autoprune.execution import Finished, RayExecutor
from autoprune.execution.ray_worker import Worker
from autoprune.protocols import IntArray, Measurement
from benchmarks.execution.sleepers import Sleepers

WORKERS_A_PROCESS = 64


class ManyWorkers:
    """A `RayExecutor`, whose workers share a few processes that sleep; everything in the driver is as it always is.

    Args:
        ray: The module, connected.
        workers: How many.
        median: Of the seconds of an evaluation, which are lognormal.
        sigma: Their spread.
    """

    name, threads = "ray", 1

    def __init__(self, ray: Any, workers: int, median: float, sigma: float, **options: Any) -> None:
        self.inner = RayExecutor(workers=workers, **options)
        self.inner._launch = self._launch  # type: ignore[method-assign]  # others sleep in its place
        slots = 2 * WORKERS_A_PROCESS + 8  # two tasks of each worker, and questions
        make = ray.remote(Sleepers).options(num_cpus=0, max_concurrency=slots).remote
        self._ray = ray
        self._actors = [make(i, median, sigma) for i in range(math.ceil(workers / WORKERS_A_PROCESS))]
        self.spans: list[tuple[float, float]] = []
        self.submitted: list[float] = []
        self.workers = workers

    def _launch(self, worker: Worker) -> None:
        actor, number = self._actors[worker.number // WORKERS_A_PROCESS], worker.number
        worker.tasks, worker.place, worker.node = [], "", ""
        send: Callable[[IntArray, Race | None], Any] = lambda candidate, race: actor.evaluate.remote(number, candidate)  # noqa: E731
        worker.handle = SimpleNamespace(evaluate=SimpleNamespace(remote=send))
        worker.starting = actor.where.remote()

    def start(self, *args: Any) -> None:
        self._ray.get([actor.where.remote() for actor in self._actors])
        self.inner.start(*args)

    def submit(self, trials: list[int], candidates: IntArray, races: Sequence[Race | None]) -> None:
        self.inner.submit(trials, candidates, races)
        self.submitted.append(time.time())

    def gather(self) -> list[Finished]:
        finished = self.inner.gather()
        # Sleepers send plain arrays, which the driver wraps: what mypy is told here is that these are no outcomes yet.
        return [each._replace(outcome=Measurement(each.outcome, each.outcome, 0.0)) for each in finished]  # type: ignore[arg-type]

    def stop(self) -> None:
        for spans in self._ray.get([actor.spans.remote() for actor in self._actors]):
            self.spans += spans
        self.inner._workers.clear()  # there is nothing of theirs to stop
        self.inner.stop()
        for actor in self._actors:
            self._ray.kill(actor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
