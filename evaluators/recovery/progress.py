"""Progress of a training: a line with the time left in a terminal, log records elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

log = logging.getLogger(__name__)


class Progress:
    """Shows steps, loss and validation as they come.

    Args:
        total: Steps of the whole training.
        done: Steps of it that an earlier process took.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self._total, self._first = total, done
        self._began = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._context: AbstractContextManager[Any] = nullcontext()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._context = self._bar = Bar(*columns, TextColumn("{task.fields[state]}"), console=Console(stderr=True))
        self._context.__enter__()
        if self._bar is not None:
            self._task = self._bar.add_task("recover", total=self._total, completed=self._first, state="")
        return self

    def update(self, done: int, loss: float, signal: float | None) -> None:
        """Show the state after `done` steps."""
        state = f"loss {loss:.4f}" + ("" if signal is None else f", validation {signal:.4f}")
        if self._bar is not None:
            self._bar.update(self._task, completed=done, state=state)
        else:
            log.info("step %d of %d: %s%s", done, self._total, state, self._left(done))

    def _left(self, done: int) -> str:
        """Time for the rest at the pace so far, in words."""
        if not self._first < done < self._total:
            return ""
        seconds = (time.monotonic() - self._began) / (done - self._first) * (self._total - done)
        return f", about {seconds:.0f} s left" if seconds < 120 else f", about {seconds / 60:.0f} min left"

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
