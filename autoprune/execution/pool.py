"""Run evaluations in processes of this machine, without Ray: one thread each, and weights that all of them share."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol, final, runtime_checkable

import numpy as np
import torch

from autoprune.arguments import whole_number
from autoprune.early_stopping.racing import Contest
from autoprune.evaluators import Context, Evaluator, Orders
from autoprune.execution.local import GENERATION, Finished
from autoprune.execution.pool_source import READY, Source
from autoprune.protocols import Failure, IntArray

if TYPE_CHECKING:
    from autoprune.execution.shipping import Parcel

log = logging.getLogger(__name__)

_STRIKES = 2  # a candidate counts as failed once it has taken down this number of workers
_RESTARTS = 3  # deaths in a row before a worker is ready, after which it is given up


@runtime_checkable
class Sends(Protocol):
    """Optional protocol: evaluators that can be sent to other processes with what they have prepared."""

    def to_send(self, processes: int) -> Evaluator:
        """Copy for a number of processes whose `prepare` repeats less; it pickles."""
        ...


@dataclass(eq=False)
class _Task:
    trial: int
    candidate: IntArray
    race: Contest | None
    strikes: int = 0


@dataclass(eq=False)
class _Worker:
    """Process of the pool; it keeps its number when it is replaced.

    Attributes:
        source: Where it was started.
        connection: To it.
        pid: Number of the process by the system, which it tells when its evaluator is prepared; 0 before.
        task: The task that it works on; None while it waits.
        queue: Its further tasks, in order.
        lost: Deaths in a row before it was ready.
    """

    number: int
    source: Source
    connection: Connection[Any, Any]
    pid: int = 0
    task: _Task | None = None
    queue: deque[_Task] = field(default_factory=deque)
    lost: int = 0

    @property
    def name(self) -> str:
        """Name in logs and in the journal."""
        return f"process-{self.number} {self.pid}" if self.pid else f"process-{self.number}"


@final
class PoolExecutor:
    """Evaluates in processes of this machine; the same seed gives the trials of a search in one process.

    A generation of candidates is asked for, evaluated and told in the order of one process, so that nothing depends on
    the number of workers or on their speed. Each holds consecutive parts of that order, which share most, and takes
    from the others when its own is done. Weights, samples and what the evaluator has collected lie in one file that all
    map into memory, and workers are forked from one process that has imported and prepared what they need. A worker
    that dies is replaced and its candidate tried again; a candidate that takes down two is recorded as failed.

    Args:
        workers: Number of processes.
        threads: PyTorch threads of each. Sums differ in the last digits between numbers of threads.
        generation: Candidates asked for at once.

    Attributes:
        until: Time by `time.monotonic` at which `gather` stops waiting; infinite for never.

    Raises:
        ValueError: If a number is out of range.
    """

    name = "processes"

    def __init__(self, workers: int, threads: int = 1, generation: int = GENERATION) -> None:
        self.workers = whole_number("workers", workers, 1)
        self.threads: int | None = whole_number("threads", threads, 1)
        self._generation = whole_number("generation", generation, 1)
        self.until = math.inf
        self._forget()

    def _forget(self) -> None:
        self._evaluator: Evaluator | None = None
        self._parcel: Parcel | None = None
        self._source: Source | None = None
        self._workers: list[_Worker] = []
        self._unreleased: deque[int] = deque()  # trials in the order of release
        self._done: dict[int, Finished] = {}

    @property
    def processes(self) -> list[int]:
        """Numbers of the workers that are ready, by the system."""
        return [worker.pid for worker in self._workers if worker.pid]

    def start(self, evaluator: Evaluator, context: Context, fresh: Evaluator) -> None:
        """Write what workers need to a file, and start them; they prepare while the search goes on.

        Raises:
            TypeError: If something that workers need cannot be pickled; names the argument.
            ValueError: If the model is not on a CPU, or this system cannot hand descriptors to a process.
        """
        from autoprune.execution.shipping import parcel_of

        require_possible(context)
        sent = evaluator.to_send(self.workers) if isinstance(evaluator, Sends) else fresh
        self._evaluator, self._parcel = evaluator, parcel_of(sent, context)
        self._workers = [self._launched(number) for number in range(self.workers)]

    def room(self) -> int:
        """Return a whole generation once the last one is done."""
        return self._generation if self._workers and not self._unreleased else 0

    def submit(self, trials: list[int], candidates: IntArray, races: Sequence[Contest | None]) -> None:
        """Queue candidates in the order of the evaluator, consecutive ones at the same worker."""
        evaluator = self._evaluator
        order = evaluator.order(candidates.copy()) if isinstance(evaluator, Orders) else np.arange(len(trials))
        tasks = [_Task(trials[i], candidates[i], races[i]) for i in order.tolist()]
        self._unreleased.extend(task.trial for task in tasks)
        for worker, part in zip(self._workers, np.array_split(np.arange(len(tasks)), len(self._workers)), strict=True):
            worker.queue.extend(tasks[i] for i in part.tolist())
        self._dispatch()

    def gather(self) -> list[Finished]:
        """Wait for outcomes, and return those whose turn it is; once the time is over, all that are there.

        Raises:
            RuntimeError: If no worker is left, because none could be started.
        """
        while self._unreleased:
            over = time.monotonic() >= self.until
            if (released := self._release(whatever=over)) or over:
                return released
            self._step()
        return []

    def ready(self) -> None:
        """Wait until every worker has prepared its evaluator.

        Raises:
            RuntimeError: If no worker could be started.
        """
        while not all(worker.pid for worker in self._workers):
            self._step()

    def stop(self) -> None:
        """End the workers, and let the evaluator free what it keeps for further candidates."""
        for worker in self._workers:
            worker.connection.close()
        if self._source is not None:
            self._source.stop()
        if self._parcel is not None:
            self._parcel.close()
        if isinstance(self._evaluator, Orders):
            self._evaluator.release()
        self._forget()

    def _release(self, whatever: bool) -> list[Finished]:
        """Give out outcomes up to the first that is missing, or all of them, in the order of release."""
        released, waiting = [], deque[int]()
        for trial in self._unreleased:
            if trial in self._done and (whatever or not waiting):
                released.append(self._done.pop(trial))
            else:
                waiting.append(trial)
        self._unreleased = waiting
        return released

    def _launched(self, number: int) -> _Worker:
        """Start a worker, from a process that is replaced if it has ended."""
        assert self._parcel is not None
        assert self.threads is not None
        if self._source is None or not self._source.alive:
            self._source = Source(self._parcel, self.threads)
        return _Worker(number, self._source, self._source.launched(number))

    def _say(self, worker: _Worker, message: object) -> None:
        """Send a message; a worker that is gone is noticed when it is asked for an answer."""
        try:
            worker.connection.send(message)
        except OSError as error:
            log.debug("%s takes no message: %s", worker.name, error)

    def _step(self) -> None:
        """Wait for an event, or until the time is over, and handle it."""
        self._dispatch()
        if not self._workers:
            raise RuntimeError("no worker is left to evaluate candidates; the log says why each of them was given up")
        left = None if math.isinf(self.until) else max(self.until - time.monotonic(), 0.0)
        there = wait([worker.connection for worker in self._workers], left)
        for worker in list(self._workers):
            if worker.connection in there:
                self._hear(worker)

    def _hear(self, worker: _Worker) -> None:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if not worker.pid:
            if not (isinstance(answer, tuple) and answer[0] == READY):
                raise RuntimeError(f"no worker could be started: {answer}")
            worker.pid, worker.lost = answer[1], 0
            log.info("%s is ready", worker.name)
        elif worker.task is not None:
            self._done[worker.task.trial] = Finished(worker.task.trial, answer, worker.name)
            worker.task = None

    def _replace(self, worker: _Worker) -> None:
        """Start a worker again that has died; the candidate that it died of gets a strike."""
        code = worker.source.exit_code(worker.number)
        worker.connection.close()
        task = worker.task
        told = "is started again"
        if task is not None:
            task.strikes += 1
            if task.strikes >= _STRIKES:
                reason = f"{task.strikes} workers were lost while they evaluated it; the last one ended with {code}"
                self._done[task.trial] = Finished(task.trial, Failure(reason), worker.name)
            else:
                worker.queue.appendleft(task)
            told += f", and trial {task.trial} {'failed' if task.strikes >= _STRIKES else 'is tried again'}"
        lost = 0 if worker.pid else worker.lost + 1
        place = self._workers.index(worker)
        if lost > _RESTARTS:
            log.error("%s is given up, because it ended with %s before it was ready", worker.name, code)
            del self._workers[place]
            if self._workers:
                self._workers[0].queue.extend(worker.queue)
            return
        log.warning("%s ended with %s; it %s", worker.name, code, told)
        new = self._launched(worker.number)
        new.queue, new.lost = worker.queue, lost
        self._workers[place] = new

    def _dispatch(self) -> None:
        """Give each worker that waits the next of its tasks, or the last of the worker with the most."""
        for worker in self._workers:
            if not worker.pid or worker.task is not None:
                continue
            longest = max(self._workers, key=lambda other: len(other.queue))
            queue = worker.queue or longest.queue
            if queue:
                worker.task = queue.popleft() if queue is worker.queue else queue.pop()
                self._say(worker, (worker.task.candidate, worker.task.race))


def require_possible(context: Context) -> None:
    """Check that processes of this machine can evaluate.

    Raises:
        ValueError: If the model is not on a CPU, or this system cannot hand descriptors to a process.
    """
    if why := why_impossible(context):
        raise ValueError(f"workers must be left out here, because {why}; execution='ray' may do it")


def why_impossible(context: Context) -> str:
    """Reason why processes of this machine cannot evaluate, in plain words; empty if they can."""
    device = next((parameter.device for parameter in context.model.parameters()), torch.device("cpu"))
    if device.type != "cpu":
        return f"the model is on {device}"
    return "this system hands no descriptors to processes" if sys.platform == "win32" else ""


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
