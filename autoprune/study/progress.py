"""Progress of a search: a line with ETA in a terminal, a bar in a notebook, log records elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from html import escape
from types import TracebackType
from typing import Any, Protocol, Self

from autoprune.imports import notebook_shell
from autoprune.result.trials import Trial

log = logging.getLogger("autoprune.search")

LOG_EVERY_SECONDS = 30.0
DRAW_EVERY_SECONDS = 0.5


class Bar(Protocol):
    """Picture of the progress, which is replaced in place."""

    def update(self, done: int, state: str, left: str) -> None:
        """Show the number of trials, the state in words, and the time left in words, which may be empty."""
        ...

    def stop(self) -> None:
        """Leave the last picture."""
        ...


class TerminalBar:
    """Line in a terminal, which rich draws on standard error; it estimates the time left by itself."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.fields[state]}"), console=Console(stderr=True))
        self._bar.start()
        self._task = self._bar.add_task("search", total=total, state="")

    def update(self, done: int, state: str, left: str) -> None:
        """Show the state."""
        self._bar.update(self._task, completed=done, state=state)

    def stop(self) -> None:
        """Leave the last line."""
        self._bar.stop()


class NotebookBar:
    """Bar under a notebook's cell: plain HTML that IPython replaces, which needs no widgets."""

    def __init__(self, total: int) -> None:
        from IPython.display import HTML, display

        self._html: Any = HTML
        self._total = total
        self._handle: Any = display(self._html(self._picture(0, "", "")), display_id=True)

    def update(self, done: int, state: str, left: str) -> None:
        """Show the state."""
        self._handle.update(self._html(self._picture(done, state, left)))

    def stop(self) -> None:
        """Leave the last bar."""

    def _picture(self, done: int, state: str, left: str) -> str:
        told = f"{done} of {self._total} trials{left}" + (f": {state}" if state else "")
        return (
            f"<progress max='{self._total}' value='{done}' style='width:14em;vertical-align:middle'></progress> "
            f"<span>{escape(told)}</span>"
        )


class Progress:
    """Counts trials, and shows the best so far and the size of the front.

    Args:
        total: Trials asked for.
        metric: Name of the metric.
        show: Whether to draw; nothing is drawn where there is neither a notebook nor a terminal on standard error.
    """

    def __init__(self, total: int, metric: str, show: bool) -> None:
        self._total = total
        self._metric = metric
        self._show = show
        self._bar: Bar | None = None
        self._updated = self._began = time.monotonic()
        self._first: int | None = None  # number of trials before the first of this process
        self._tenths = 0

    def __enter__(self) -> Self:
        if self._show and notebook_shell() is not None:
            self._bar = NotebookBar(self._total)
        elif self._show and sys.stderr.isatty():
            self._bar = TerminalBar(self._total)
        return self

    def due(self, done: int) -> bool:
        """Return whether it is time to `update`: finding the front after every trial would be slow."""
        self._first = done - 1 if self._first is None else self._first
        if self._bar is not None:
            return done == self._total or time.monotonic() - self._updated > DRAW_EVERY_SECONDS
        return self._tenth(done) > self._tenths or time.monotonic() - self._updated > LOG_EVERY_SECONDS

    def _tenth(self, done: int) -> int:
        return 10 * done // self._total

    def _left(self, done: int) -> str:
        """Time for the rest at the pace so far, in words."""
        if done >= self._total or self._first is None:
            return ""
        seconds = (time.monotonic() - self._began) / (done - self._first) * (self._total - done)
        return f", about {seconds:.0f} s left" if seconds < 120 else f", about {seconds / 60:.0f} min left"

    def update(self, done: int, failed: int, best: Trial | None, front: int, phase: str = "") -> None:
        """Show the state of the search."""
        state = f"front {front}, {phase}" if phase else f"front {front}"
        if best is not None:
            state = f"{self._metric} {best.score:.4f}, {state}"
        if failed:
            state += f", {failed} failed"
        self._updated = time.monotonic()
        if self._bar is not None:
            self._bar.update(done, state, self._left(done))
        else:
            self._tenths = self._tenth(done)
            log.info("%d of %d trials: %s%s", done, self._total, state, self._left(done))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
