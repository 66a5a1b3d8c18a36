"""Executors: run evaluations here or on workers."""

from autoprune.execution.callbacks import Callback
from autoprune.execution.execution import ANYWAY, EXECUTORS, Execution, ExecutorName, execution_of
from autoprune.execution.local import Executor, Finished, LocalExecutor, Outcome, attempt, evaluate_one
from autoprune.execution.pool import PoolExecutor
from autoprune.execution.ray import RayExecutor

__all__ = [
    "ANYWAY",
    "EXECUTORS",
    "Callback",
    "Execution",
    "Executor",
    "ExecutorName",
    "Finished",
    "LocalExecutor",
    "Outcome",
    "PoolExecutor",
    "RayExecutor",
    "attempt",
    "evaluate_one",
    "execution_of",
]
