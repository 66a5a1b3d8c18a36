"""Tracker for TensorBoard."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from autoprune.execution.callbacks import numbers_of, settings_of
from autoprune.files.access import as_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from autoprune.result import SearchResult, Trial


@final
class TensorBoard:
    """Writes a search to event files: scalars of each trial, and the settings, the table and the picture at the end.

    Args:
        folder: Folder of the event files, made if missing; ``tensorboard --logdir`` reads it or its parent.

    Raises:
        TypeError: If `folder` is no path.
        ImportError: At the first trial, if tensorboard is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder: Path = as_path(folder, "folder")
        self._writer: Any = None

    def on_trial(self, trial: Trial) -> None:
        """Write the numbers of a trial, with its number as the step."""
        writer = self._opened()
        for name, value in numbers_of(trial).items():
            writer.add_scalar(name, value, trial.id)
        writer.flush()  # a killed search keeps what it wrote

    def on_end(self, result: SearchResult) -> None:
        """Write settings and the front as text, and its picture if matplotlib is there; close the file."""
        writer = self._opened()
        rows = "".join(f"| {name} | {value} |\n" for name, value in settings_of(result).items())
        writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}")
        writer.add_text("front", "".join(f"    {line}\n" for line in str(result).splitlines()))
        with suppress(ImportError):  # a picture less, without matplotlib
            writer.add_figure("front", _drawn(result), close=False)
        writer.close()
        self._writer = None

    def _opened(self) -> Any:
        if self._writer is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("trackers.TensorBoard() needs tensorboard; pip install tensorboard") from error
            self._writer = SummaryWriter(str(self._folder))
        return self._writer


def _drawn(result: SearchResult) -> Figure:
    """Draw the front on a figure whose pixels the writer can read.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    result.plot(axes=figure.add_subplot())
    return figure
