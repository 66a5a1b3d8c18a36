"""Executors: run evaluations here or on workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from autoprune.arguments import shown
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
    if isinstance(spec, str) and spec in EXECUTORS:
        return EXECUTORS[spec]()
    if isinstance(spec, str | type) or not hasattr(spec, "submit"):
        raise ValueError(f"executor must be one of {sorted(EXECUTORS)} or an Executor instance, got {shown(spec)}")
    return spec


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
