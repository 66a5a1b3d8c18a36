"""Axes, colours and files of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.files.access import as_path, replacing, shortened
from autoprune.imports import notebook_shell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FRONT, LIMIT, DENSE, PALE = "#8a939d", "#0072b2", "#d55e00", "#111827", "#e8ecf0"
"""Trials, the front, limits, the dense model, and the background of bars: blue and vermilion of Okabe and Ito's
palette, which people without red or green receptors tell apart, with greys of other brightness."""

SCALE = "cividis"
"""Colour map whose brightness rises evenly, also for them (Nunez et al., PLOS ONE 13(7), 2018)."""

UNITS = {
    "flops": "MACs",
    "params": "parameters",
    "nonzero_params": "parameters",
    "memory_bytes": "bytes",
    "latency_ms": "ms",
    "ms_per_sample": "ms",
}


def with_unit(cost: str) -> str:
    """Label of an axis for a cost."""
    return f"{cost} ({UNITS[cost]})" if cost in UNITS else cost


def drawing(axes: Axes | None, size: tuple[float, float], caller: str) -> Axes:
    """Take axes, or make them: by pyplot in a notebook, which then shows them, and in a figure of their own elsewhere.

    Args:
        axes: Of the user, or None.
        size: Width and height of a new figure, in inches.
        caller: The method, for the message.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If `axes` are none.
    """
    try:
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{caller} needs matplotlib; install autoprune[plot]") from error
    if axes is None and notebook_shell() is not None:
        from matplotlib import pyplot

        return pyplot.subplots(figsize=size, layout="constrained")[1]
    if axes is None:
        return Figure(figsize=size, layout="constrained").add_subplot()
    if not isinstance(axes, Axes):
        raise TypeError(f"axes must be matplotlib axes or None, got {type(axes).__name__}; pass one of plt.subplots()")
    return axes


def tidied(axes: Axes) -> Axes:
    """Give axes a light grid and no frame."""
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def write_picture(axes: Axes, path: str | Path, dpi: int) -> None:
    """Replace the picture of the figure of some axes; its ending gives the format, PNG for a name without one."""
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("axes must belong to a figure to be written to a file, got some that were removed from theirs")
    name = as_path(path)
    form = name.suffix.lstrip(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if form not in known:
        raise ValueError(f"path must end in a format of pictures, one of {sorted(known)}, got {shortened(name)}")
    with replacing(name) as fresh:
        figure.savefig(fresh, dpi=dpi, format=form)
