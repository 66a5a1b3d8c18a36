"""Execution: the executor of a search, and the folder that it is kept in."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from autoprune.arguments import by_name, flag, require_storage, shown, whole_number
from autoprune.execution.callbacks import Callback, require_callbacks
from autoprune.execution.fastest import FastestExecutor
from autoprune.execution.local import Executor, LocalExecutor
from autoprune.execution.pool import PoolExecutor
from autoprune.execution.ray import RayExecutor
from autoprune.files.access import as_path

ExecutorName = Literal["local", "ray"]

EXECUTORS: dict[str, Callable[[], Executor]] = {"local": LocalExecutor, "ray": RayExecutor}
"""Executors by name."""

AUTO: Literal["auto"] = "auto"
"""Number of workers that the speed decides."""

ANYWAY: Literal["anyway"] = "anyway"
"""Value of ``resume`` that continues in spite of differences; also the key in the journal of these."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Executor and folder of a search: ``search(..., execution=autoprune.Execution(run_dir="runs/a"))``.

    Attributes:
        executor: ``"local"``, ``"ray"`` (workers on this machine, or on the cluster of the job that this runs in), or
            an `Executor`, such as ``autoprune.execution.RayExecutor(address="auto", gpus_per_worker=0.5)``.
        workers: Processes of this machine that evaluate, without Ray, one thread each (docs/processes.md): a number, or
            ``"auto"`` for one on each core where that is faster than this process, which a note says. The same seed
            gives the same trials as in one process with one thread. None for this process alone.
        run_dir: A separate folder for the journal of the run; without it the journal is in memory.
        resume: Continue the search in `run_dir`, or begin it if there is none yet. No finished trial is repeated;
            pending ones are evaluated again. The other arguments must be those of that search, but `trials` may be more
            or ``"auto"``, and `executor` and `optimizer` others: functions are compared by their code, and the dense
            model must have the same score. ``"anyway"`` continues in spite of differences, which a note then names.
        progress: Show the progress as a line in a terminal, or as a bar in a notebook.
        callbacks: Called after each trial and at the end, see `autoprune.execution.Callback`: those of
            ``autoprune.execution.trackers`` write to MLflow, TensorBoard or Weights & Biases.
        storage: An Optuna storage, or its URL, such as ``"sqlite:///runs/optuna.db"``, to add each trial to as well, so
            that optuna-dashboard shows the search while it runs. A resumed search continues its study there.

    Raises:
        TypeError: If `run_dir` is no path, `callbacks` no list of callbacks, or `storage` neither text nor a storage.
        ValueError: If another field is out of range or an unknown name, or there is no `run_dir` to resume.
    """

    executor: ExecutorName | Executor = "local"
    workers: int | Literal["auto"] | None = None
    run_dir: str | Path | None = None
    resume: bool | Literal["anyway"] = False
    progress: bool = True
    callbacks: Sequence[Callback] = ()
    storage: Any = None

    def __post_init__(self) -> None:
        if not (self.workers is None or (isinstance(self.workers, str) and self.workers == AUTO)):
            self._fill("workers", whole_number("workers", self.workers, 1, why=", 'auto' or None"))
        if self.workers is not None and self.executor != "local":
            raise ValueError(
                f"workers={self.workers!r} must go with executor='local', got {shown(self.executor)}; "
                "the workers of Ray are autoprune.execution.RayExecutor(workers=2)"
            )
        self.make_executor()  # whose errors are those of the name
        if not isinstance(self.run_dir, str | os.PathLike | None):
            raise TypeError(f"run_dir must be the path of a folder or None, got {shown(self.run_dir)}")
        anyway = isinstance(self.resume, str) and self.resume == ANYWAY
        self._fill("run_dir", None if self.run_dir is None else str(as_path(self.run_dir, "run_dir")))
        self._fill("resume", ANYWAY if anyway else flag("resume", self.resume, "or 'anyway'"))
        self._fill("progress", flag("progress", self.progress))
        self._fill("callbacks", require_callbacks(self.callbacks))
        self._fill("storage", require_storage(self.storage))
        if self.resume and self.run_dir is None:
            raise ValueError("resume=True needs the run_dir of an earlier search, got run_dir=None")

    def _fill(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def make_executor(self) -> Executor:
        """Make the executor meant by its name and the workers, or take the one given."""
        if self.workers == AUTO:
            return FastestExecutor()
        if self.workers is not None:
            return PoolExecutor(self.workers)
        return by_name("executor", self.executor, EXECUTORS, "an Executor", "submit")


def execution_of(given: ExecutorName | Executor | Execution) -> Execution:
    """Make the execution that ``execution=`` stands for.

    Raises:
        ValueError: If it is an unknown name, or neither an executor nor an execution.
    """
    if isinstance(given, Execution):
        return given
    by_name("execution", given, EXECUTORS, "an autoprune.Execution or Executor", "submit")
    return Execution(executor=given)
