"""Actor that runs in a Ray worker, and the state that the driver keeps of it."""

from __future__ import annotations

import copy
import os
import socket
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from autoprune.early_stopping.racing import Contest
from autoprune.evaluators import Context, Evaluator, Orders
from autoprune.evaluators.scoring.untouched import Untouched
from autoprune.execution.local import Outcome, evaluate_one
from autoprune.protocols import Failure, IntArray


class Actor:
    """Holds model, data and caches in a process of its own, receives option indices and returns what it measured.

    Args:
        shipped: The evaluator, not prepared yet, and its context on the CPU.
        threads: PyTorch threads.
    """

    def __init__(self, shipped: tuple[Evaluator, Context], threads: int) -> None:
        import ray

        torch.set_num_threads(threads)
        gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
        self._evaluator, context = shipped
        context = replace(context, subsets=context.subsets.received())
        context = context_on(context, "cuda" if gpu else "cpu")
        self._untouched = Untouched(context.model, self._evaluator)
        self._evaluator.prepare(context)

    def where(self) -> tuple[str, str]:
        """Return host and process, for people, and the id of the node, once the evaluator is prepared."""
        import ray

        return f"{socket.gethostname()}:{os.getpid()}", ray.get_runtime_context().get_node_id()

    def evaluate(self, candidate: IntArray, race: Contest | None) -> Outcome:
        """Score one candidate, shape (d,), which may lose its race before it has seen all samples."""
        if isinstance(self._evaluator, Orders):
            self._evaluator.order(candidate[None])  # the evaluator counts shared prefixes to know which to cache
        outcome = evaluate_one(self._evaluator, candidate, race)
        try:
            self._untouched.require()
        except ValueError as error:
            return Failure(str(error), outcome.seconds)
        return outcome


def context_on(context: Context, device: str) -> Context:
    """Copy a context with model and samples on a device; the model of the one given stays where it is."""
    here = next(context.model.parameters()).device
    model = context.model if here == torch.device(device) else copy.deepcopy(context.model).to(device)
    return replace(context, model=model, subsets=context.subsets.to(device))


@dataclass(eq=False)
class Task:
    """Candidate that was submitted and not gathered yet.

    Attributes:
        race: The race that it runs, if any.
        place: Its place in the order in which neighbours share most, among those submitted with it, in [0, 1).
        strikes: Number of workers that died or hung while they evaluated it.
    """

    trial: int
    candidate: IntArray
    race: Contest | None
    place: float = 0.0
    strikes: int = 0
    ref: Any = None


@dataclass(eq=False)
class Worker:
    """Driver's state of one actor; it keeps its number when it is replaced.

    Attributes:
        handle: Of the actor.
        starting: A reference that is ready once the actor is; None afterwards.
        tasks: Sent to it, in the order in which it works; the first one is being evaluated.
        since: Start of that one, by the monotonic clock.
        place: Host and process; empty until known.
        node: Id of its node; empty until known.
        at: The place of its last task; None before that.
        lost_starts: Deaths in a row before it was ready.
    """

    number: int
    handle: Any = None
    starting: Any = None
    tasks: list[Task] = field(default_factory=list)
    since: float = 0.0
    place: str = ""
    node: str = ""
    at: float | None = None
    lost_starts: int = 0

    @property
    def name(self) -> str:
        """Name in logs and in the journal."""
        return f"ray-{self.number} {self.place}".strip()

    def refs(self) -> list[Any]:
        """References that the driver waits for: a worker ends its tasks in order, so the first one is enough."""
        return [self.starting] if self.starting is not None else [task.ref for task in self.tasks[:1]]
