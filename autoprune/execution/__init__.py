"""Executors: run evaluations here or on workers."""

from autoprune.execution.local import EXECUTORS, Executor, LocalExecutor, Outcome, make_executor

__all__ = ["EXECUTORS", "Executor", "LocalExecutor", "Outcome", "make_executor"]
