"""Picture of sensitivity: the loss of each option of each dimension when it alone is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from autoprune.result.plots.canvas import PALE, SCALE, drawing
from autoprune.result.plots.layers import MOST_NAMED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from autoprune.result import SearchResult

LABELS = {
    "distortion": "distance to dense outputs\n(nats, or relative squared error)",
    "signal": "increase of the search signal",
    "metric": "loss of {metric}",
}
_DECADES = 4.0  # of the scale, below the largest loss


def plot_sensitivity(result: SearchResult, table: str = "distortion", axes: Axes | None = None) -> Axes:
    """Draw losses as a map of dimensions and options; see `SearchResult.plot_sensitivity`."""
    found = result.sensitivity(table)
    count, most = found.losses.shape
    axes = drawing(axes, (7.0, 1.8 + 0.22 * min(count, MOST_NAMED)), "result.plot_sensitivity()")
    from matplotlib.colors import LogNorm

    losses = found.losses.copy()
    losses[:, 0] = np.nan  # dense loses nothing, and has no place on a logarithmic scale
    top = float(np.nanmax(losses)) if np.isfinite(losses).any() else 0.0
    top = top if top > 0 else 1.0
    least = top / 10**_DECADES
    image = axes.imshow(
        np.maximum(losses, least), cmap=SCALE, norm=LogNorm(least, top), aspect="auto", interpolation="nearest"
    )
    axes.set_facecolor(PALE)
    extent = "min" if np.nanmin(losses, initial=np.inf) < least else "neither"
    label = LABELS[table].format(metric=result.metric)
    axes.figure.colorbar(image, ax=axes, extend=extent).set_label(label, fontsize=8)
    step = -(-count // MOST_NAMED)
    axes.set_yticks(range(0, count, step), found.names[::step], fontsize=8)
    axes.set_xticks(range(0, most, -(-most // 16)))
    axes.set_xlabel("option: 0 is dense, and later ones remove more")
    axes.set_ylabel("dimension, in forward order")
    measured = int(np.isfinite(losses).sum())
    axes.set_title(f"{measured} options measured alone; grey: not measured", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return axes
