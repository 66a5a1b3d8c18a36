"""Executors: run evaluations here or on workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from autoprune.arguments import by_name
from autoprune.execution.local import Executor, Finished, LocalExecutor, Outcome, attempt, evaluate_one
from autoprune.execution.ray import RayExecutor

ExecutorName = Literal["local", "ray"]

EXECUTORS: dict[str, Callable[[], Executor]] = {"local": LocalExecutor, "ray": RayExecutor}
"""Executors of `search(executor=)` by name."""


def make_executor(spec: str | Executor) -> Executor:
    """Make the executor meant by a name, or take one already made.

    Raises:
        ValueError: If it is an unknown name, or no executor.
    """
    return by_name("executor", spec, EXECUTORS, "an Executor", "submit")


__all__ = [
    "EXECUTORS",
    "Executor",
    "ExecutorName",
    "Finished",
    "LocalExecutor",
    "Outcome",
    "RayExecutor",
    "attempt",
    "evaluate_one",
    "make_executor",
]
