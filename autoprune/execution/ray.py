"""Run evaluations on Ray actors: on this machine's cores and GPUs, or on a cluster's."""

from __future__ import annotations

import logging
import math
import os
import random
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Any, final

from autoprune.arguments import flag, number, one_of, positive, shown, whole_number
from autoprune.data.sampling import process_state
from autoprune.early_stopping.racing import Contest
from autoprune.evaluators import Context, Evaluator, Orders
from autoprune.execution.local import GENERATION, Finished, Outcome
from autoprune.execution.ray_worker import Actor, Task, Worker, context_on
from autoprune.files.access import brief
from autoprune.imports import importing
from autoprune.protocols import Failure, IntArray

log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0  # within this time a hanging worker is noticed
_LOOK_SECONDS = 5.0  # between checks for new nodes
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_FIRST_WITH_TOKENS = (2, 52)
_LOOPBACK = "127.0.0.1"
_STRIKES = 2  # a candidate counts as failed once it has taken down this number of workers
_CONSIDERED = 64  # waiting candidates among which a worker's next one is chosen


@contextmanager
def _random_as_before() -> Iterator[None]:
    """Restore Python's random state, which Ray draws from; unseeded inside, because its draws name processes."""
    with process_state():
        state = random.getstate()
        try:
            yield
        finally:
            random.setstate(state)


@contextmanager
def _on_loopback(alone: bool) -> Iterator[None]:
    """Start Ray on the loopback, by its switch for systems whose firewalls would ask the user.

    No public option does: ``ray.init`` replaces an address of the loopback by one that other machines reach.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = before and not alone
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _require_authentication(version: str) -> None:
    """Refuse a Ray whose ports take commands without authentication.

    Raises:
        ImportError: If it is older than the first version with a token.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < _FIRST_WITH_TOKENS:
        first = ".".join(map(str, _FIRST_WITH_TOKENS))
        raise ImportError(
            f"execution='ray' needs Ray {first} or newer, the first with token authentication, got {version}; "
            f"pip install 'ray>={first}'"
        )


@final
@dataclass(eq=False, repr=False)
class RayExecutor:
    """Evaluates on Ray actors, each of which holds model, data and caches, and is sent option indices only.

    A worker that dies or hangs is replaced and its candidate tried again; a candidate that takes down two is recorded
    as failed. A lost node counts against no candidate: its workers start again where and when there is room.

    Attributes:
        address: ``"auto"``, ``"ray://host:port"`` or ``"host:port"`` of a running cluster. By default the address in
            ``RAY_ADDRESS``, which a Ray job sets, or a new Ray on this machine. A Ray that this process is connected to
            already is used as it is. Only a Ray connected here is shut down in the end.
        workers: Number of workers; None for as many as the nodes have room for, which follows nodes that join. With a
            number, workers without room wait for a node.
        cpus_per_worker: Cores reserved for each.
        gpus_per_worker: GPUs reserved for each; several share one with a fraction. Without any, a worker runs on the
            CPU, even if the model is on a GPU.
        threads_per_worker: PyTorch threads of each. Sums differ in the last digits between numbers of threads.
        runtime_env: Environment that Ray prepares on the nodes, such as ``{"working_dir": ".", "pip": ["autoprune"]}``.
        max_restarts: A worker that dies more often than this in a row before it is ready is given up.
        timeout_seconds: A worker that evaluates one candidate for longer hangs, and is replaced; None for never.
        synchronous: Ask for a generation, wait for all of it, and tell in the order asked. The same seed then gives the
            same trials as a local search with as many threads, but fast workers wait for slow ones.
        generation: Candidates asked for at once if synchronous.
        listen: Interface of a new Ray: ``"loopback"``, which only this machine reaches, or ``"network"``, for nodes
            that join it.
        ahead: Candidates waiting on each worker in addition to the one that it evaluates, so that it need not wait for
            the driver. 0 lets optimizers learn sooner, and is better where evaluations take many seconds.

    Raises:
        ValueError: If a number is out of range.
    """

    name = "ray"

    address: str | None = None
    workers: int | None = None
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    threads_per_worker: int = 1
    runtime_env: Mapping[str, Any] | None = None
    max_restarts: int = 3
    timeout_seconds: float | None = None
    synchronous: bool = False
    generation: int = GENERATION
    ahead: int = 1
    listen: str = "loopback"

    def __post_init__(self) -> None:
        for name in ("cpus_per_worker", "gpus_per_worker"):
            number(name, getattr(self, name), 0, "at least 0")
        for name, least in (("threads_per_worker", 1), ("max_restarts", 0), ("generation", 1), ("ahead", 0)):
            whole_number(name, getattr(self, name), least)
        if self.workers is not None:
            whole_number("workers", self.workers, 1)
        if not isinstance(self.address, str | None):
            raise TypeError(f"address must be text, such as 'auto', or None, got {shown(self.address)}")
        if not isinstance(self.runtime_env, Mapping | None):
            raise TypeError(f"runtime_env must be a dictionary for Ray, or None, got {shown(self.runtime_env)}")
        self.synchronous = flag("synchronous", self.synchronous)
        if self.cpus_per_worker == 0 == self.gpus_per_worker:
            raise ValueError("cpus_per_worker and gpus_per_worker must not both be 0: workers would have no bound")
        if self.timeout_seconds is not None:
            self.timeout_seconds = positive("timeout_seconds", self.timeout_seconds, " or None")
        one_of("listen", self.listen, ("loopback", "network"))
        self.threads: int | None = self.threads_per_worker
        self.until = math.inf  # time at which `gather` stops waiting, to a second
        self._forget()

    def _forget(self) -> None:
        self._ray: Any = None
        self._connected = False
        self._environment: dict[str, str | None] = {}  # before Ray changed it
        self._evaluator: Evaluator | None = None
        self._shipped: Any = None
        self._started = 0
        self._looked = 0.0
        self._workers: list[Worker] = []
        self._waiting: deque[Task] = deque()
        self._unreleased: deque[int] = deque()  # trials in the order submitted
        self._done: dict[int, Finished] = {}  # in the order of arrival

    def start(self, evaluator: Evaluator, context: Context, fresh: Evaluator) -> None:
        """Connect to Ray, store evaluator and context in it once, and start the workers.

        Raises:
            ImportError: If Ray is older than its token authentication.
            RuntimeError: If a new Ray would listen to more than this machine.
            TypeError: If something that workers need cannot be pickled; names the argument.
            ValueError: If no node has room for a worker, or a new Ray for the number asked for.
        """
        with importing():
            import ray

        _require_authentication(ray.__version__)
        self._ray = ray
        self._connected = not ray.is_initialized()
        local_room = None
        if self._connected:
            address = self.address or os.environ.get("RAY_ADDRESS") or "local"
            self._connect(address)
            local_room = self._capacity() if address == "local" else None
        room = self._capacity()
        if room == 0 if self.workers is None else local_room is not None and self.workers > local_room:
            raise ValueError(
                f"{self.workers or 1} workers must fit, each with cpus_per_worker={self.cpus_per_worker:g} and "
                f"gpus_per_worker={self.gpus_per_worker:g}, but there is room for {room} on the nodes of Ray "
                f"({self._resources()}); ask for fewer or smaller ones"
            )
        self._evaluator = evaluator
        self._shipped = self._store(fresh, context_on(replace(context, subsets=context.subsets.to_send()), "cpu"))
        self._add_workers(self.workers or room)

    def _connect(self, address: str) -> None:
        """Connect to a Ray, or start one; `stop` undoes its changes of the environment."""
        local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        alone = bool(local) and self.listen == "loopback"
        before = dict(os.environ)
        with _random_as_before(), _on_loopback(alone):
            self._ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **local)
        self._environment = {name: before.get(name) for name in {*before, *os.environ} if _changed(name, before)}
        if alone and any(node["NodeManagerAddress"] != _LOOPBACK for node in self._ray.nodes()):
            raise RuntimeError(
                f"Ray {self._ray.__version__} must listen on the loopback alone, but it does not; start a cluster with "
                "`ray start` and name it with address=, or allow it with RayExecutor(listen='network')"
            )

    def _store(self, fresh: Evaluator, context: Context) -> Any:
        """Put the evaluator and the context for the workers into the object store, once."""
        try:
            return self._ray.put((fresh, context))
        except Exception as error:  # a user's object may raise anything when it is pickled
            parts = {"evaluator": fresh, "metric": context.judge, "data": context.subsets, "forward": context.forward}
            for name, part in {**parts, "space": context.space, "model": context.model}.items():
                if (why := self._why_unpicklable(part)) is not None:
                    raise TypeError(
                        f"{name} must be something that pickle can send to the workers of Ray, but it cannot "
                        f"({brief(why)}); keep locks, files, sockets and generators out of it, or use execution='local'"
                    ) from error
            raise

    def _why_unpicklable(self, part: Any) -> Exception | None:
        try:
            self._ray.cloudpickle.dumps(part)
        except Exception as error:  # as above
            return error
        return None

    def room(self) -> int:
        """Return a generation once the last one is done if synchronous, else the number of free slots."""
        if self.synchronous:
            return self.generation if self._workers and not self._unreleased else 0
        return max(len(self._workers) * (1 + self.ahead) - len(self._unreleased), 0)

    def submit(self, trials: list[int], candidates: IntArray, races: Sequence[Contest | None]) -> None:
        """Queue candidates; those of a generation with their places in the evaluator's order, if it has one.

        Hardly any other candidates wait, so that a choice among them is not worth the driver's time.
        """
        tasks = list(map(Task, trials, candidates, races))
        if self.synchronous and isinstance(self._evaluator, Orders):
            for i, position in enumerate(self._evaluator.order(candidates).tolist()):
                tasks[position].place = i / len(tasks)
        self._waiting.extend(tasks)
        self._unreleased.extend(trials)
        self._dispatch()

    def gather(self) -> list[Finished]:
        """Wait for outcomes: in the order of arrival, or in the order submitted if synchronous.

        Once the time is over it returns what is there, in either case.

        Raises:
            RuntimeError: If no worker is left, because none could be started.
        """
        while self._unreleased:
            over = time.monotonic() >= self.until
            if (released := self._release(whatever=over or not self.synchronous)) or over:
                return released
            self._step()
        return []

    def stop(self) -> None:
        """Stop the workers, and Ray if `start` connected to it."""
        for worker in self._workers:
            self._ray.kill(worker.handle)
        if self._connected:
            with _random_as_before():
                self._ray.shutdown()
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._forget()

    def _release(self, whatever: bool) -> list[Finished]:
        """Give out all outcomes, or those up to the first that is missing."""
        if whatever:
            released = list(self._done.values())
        else:
            released = []
            while len(released) < len(self._unreleased) and self._unreleased[len(released)] in self._done:
                released.append(self._done[self._unreleased[len(released)]])
        for finished in released:
            self._unreleased.remove(finished.trial)
            del self._done[finished.trial]
        return released

    def _step(self) -> None:
        """Wait for an event, or for a second, and handle it."""
        self._follow_nodes()
        self._dispatch()
        refs = [ref for worker in self._workers for ref in worker.refs()]
        if not refs:
            raise RuntimeError("no worker is left to evaluate candidates; the log says why each of them was given up")
        there, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)  # asking for many takes milliseconds
        ready = set(there or self._ray.wait(refs, timeout=_POLL_SECONDS)[0])
        for worker in list(self._workers):
            if worker.starting is not None:
                self._welcome(worker, ready)
            else:
                self._collect(worker, ready)

    def _welcome(self, worker: Worker, ready: set[Any]) -> None:
        if worker.starting not in ready:
            return
        try:
            worker.place, worker.node = self._ray.get(worker.starting)
            worker.starting, worker.lost_starts = None, 0
            log.info("%s is ready", worker.name)
        except self._ray.exceptions.RayError as error:
            worker.lost_starts += self._blames(worker, error)
            if worker.lost_starts > self.max_restarts:
                log.error("%s is given up, because it could not be started: %s", worker.name, error)
                self._workers.remove(worker)
                if not self._workers:
                    raise RuntimeError(f"no worker could be started: {_one_line(error)}") from error
            else:
                log.warning("%s could not be started, and is started again: %s", worker.name, _one_line(error))
                self._launch(worker)

    def _collect(self, worker: Worker, ready: set[Any]) -> None:
        while worker.tasks and worker.tasks[0].ref in ready:
            task = worker.tasks[0]
            try:
                outcome: Outcome = self._ray.get(task.ref)
            except self._ray.exceptions.RayTaskError as error:
                outcome = Failure(f"{type(error.cause).__name__}: {error.cause}")
            except self._ray.exceptions.RayError as error:
                self._replace(worker, f"died: {_one_line(error)}", self._blames(worker, error))
                return
            del worker.tasks[0]
            worker.since = time.monotonic()
            self._done[task.trial] = Finished(task.trial, outcome, worker.name)
        if self.timeout_seconds is not None and worker.tasks and time.monotonic() - worker.since > self.timeout_seconds:
            self._replace(worker, f"did not answer within timeout_seconds={self.timeout_seconds:g}", blames=True)

    def _replace(self, worker: Worker, why: str, blames: bool) -> None:
        """Replace the worker; its current task gets a strike if it is to blame, and waiting tasks are sent again."""
        if blames:
            worker.tasks[0].strikes += 1
        log.warning(
            "%s %s; it is started again, and trial %d %s",
            worker.name,
            why,
            worker.tasks[0].trial,
            "failed" if worker.tasks[0].strikes >= _STRIKES else "is tried again",
        )
        for task in worker.tasks[::-1]:
            if task.strikes >= _STRIKES:
                reason = f"{task.strikes} workers were lost while they evaluated it; the last one {why}"
                self._done[task.trial] = Finished(task.trial, Failure(reason), worker.name)
            else:
                self._waiting.appendleft(task)
        self._ray.kill(worker.handle)
        self._launch(worker)

    def _blames(self, worker: Worker, error: Exception) -> bool:
        """Return whether a worker died of its task, and not with its node."""
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        return "node has died" not in str(error) and (not worker.node or worker.node in alive)

    def _dispatch(self) -> None:
        """Send waiting tasks to the workers with the fewest, to each the one that shares most with its last task.

        A task with a strike is sent first and alone, so that the cause of another death is certain.
        """
        if not self._waiting:
            return
        free = [
            (len(worker.tasks), i, worker)
            for i, worker in enumerate(self._workers)
            if worker.starting is None and len(worker.tasks) <= self.ahead and not any(t.strikes for t in worker.tasks)
        ]
        heapify(free)
        while self._waiting and free:
            held, i, worker = free[0]
            task = self._next(worker)
            if held and task.strikes:
                return
            heappop(free)
            if not held:
                worker.since = time.monotonic()
            task.ref = worker.handle.evaluate.remote(task.candidate, task.race)
            self._waiting.remove(task)
            worker.tasks.append(task)
            worker.at = task.place
            if held < self.ahead and not task.strikes:
                heappush(free, (held + 1, i, worker))

    def _next(self, worker: Worker) -> Task:
        """Next task in order after the worker's last one; each worker begins with a separate part."""
        at = worker.number % len(self._workers) / len(self._workers) if worker.at is None else worker.at
        near = islice(self._waiting, _CONSIDERED)
        return min(near, key=lambda task: (not task.strikes, (task.place - at) % 1))

    def _launch(self, worker: Worker) -> None:
        worker.tasks = []
        worker.place = ""
        worker.node = ""
        worker.at = None
        actor = self._ray.remote(Actor).options(
            num_cpus=self.cpus_per_worker,
            num_gpus=self.gpus_per_worker,
            runtime_env=None if self.runtime_env is None else dict(self.runtime_env),
            scheduling_strategy="SPREAD",
        )
        worker.handle = actor.remote(self._shipped, self.threads)
        worker.starting = worker.handle.where.remote()

    def _add_workers(self, count: int) -> None:
        for _ in range(count):
            self._workers.append(Worker(self._started))
            self._launch(self._workers[-1])
            self._started += 1

    def _follow_nodes(self) -> None:
        """Add workers where nodes have joined, unless their number was given."""
        if self.workers is not None or time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        if (more := self._capacity() - len(self._workers)) > 0 and self._started:
            log.info("the nodes have room for %d more workers", more)
            self._add_workers(more)

    def _capacity(self) -> int:
        """Number of workers that the nodes have room for when nothing else runs on them."""
        rooms = []
        for node in self._ray.nodes():
            has = node["Resources"]
            needs = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
            if node["Alive"]:
                rooms.append(min(int(has.get(name, 0) / need + 1e-9) for name, need in needs.items() if need))
        return sum(rooms)

    def _resources(self) -> str:
        found = self._ray.cluster_resources()
        return f"{found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs in all"


def _changed(name: str, before: Mapping[str, str]) -> bool:
    return os.environ.get(name) != before.get(name)


def _one_line(error: Exception) -> str:
    """Message of an error without the traceback that Ray puts before an exception of ours and after one of its own."""
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    told = lines[-1] if "creation task" in lines[0] else " ".join(lines)
    return told[:500]
