"""Picture of a network: what it keeps of every dimension of the search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoprune.arguments import is_number, is_whole
from autoprune.protocols import Dimension
from autoprune.result.plots.canvas import FRONT, PALE, drawing, tidied
from autoprune.result.trials import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from autoprune.result import SearchResult

MOST_NAMED = 60
"""Most dimensions that are all named; of more, names are thinned out."""


def plot_layers(result: SearchResult, trial: Trial, axes: Axes | None = None) -> Axes:
    """Draw a bar for each dimension, in forward order from the top; see `SearchResult.plot_layers`."""
    dimensions = result.space.dimensions
    count = len(dimensions)
    axes = drawing(axes, (7.0, 1.4 + 0.22 * min(count, MOST_NAMED)), "result.plot_layers()")
    from matplotlib.ticker import PercentFormatter

    places = range(count)
    kept = [share_kept(dimension, i) for dimension, i in zip(dimensions, trial.candidate, strict=True)]
    axes.barh(places, [1.0] * count, color=PALE, height=0.8)
    axes.barh(places, kept, color=FRONT, height=0.8)
    if count <= MOST_NAMED:
        for place, dimension, i in zip(places, dimensions, trial.candidate, strict=True):
            axes.text(1.01, place, _words(dimension, i), va="center", fontsize=8)
    step = -(-count // MOST_NAMED)
    axes.set_yticks(places[::step], [dimension.name for dimension in dimensions[::step]], fontsize=8)
    axes.set_ylim(count - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("kept, in % of the dense model")
    axes.set_ylabel("dimension, in forward order")
    cost = next(iter(result.limits))
    dense = result.dense.costs[cost]
    share = f"{trial.costs[cost] / dense:.0%} of {cost}, " if dense else ""
    axes.set_title(f"trial {trial.id}: {share}{result.metric} {trial.score:.4f}", fontsize=11, loc="left")
    tidied(axes).grid(visible=False, axis="y")
    return axes


def share_kept(dimension: Dimension, index: int) -> float:
    """Share of the dense model that an option keeps of its dimension, in [0, 1].

    Numbers of units count against the first option, sparsities against 1, and words by their place among the options.
    """
    first = dimension.options[0]
    option = dimension.options[index]
    if not (is_number(first) and is_number(option)):
        return 1.0 - index / max(len(dimension.options) - 1, 1)
    return float(option) / float(first) if first else 1.0 - float(option)


def _words(dimension: Dimension, index: int) -> str:
    option = dimension.options[index]
    first = dimension.options[0]
    if is_whole(option) and is_whole(first):
        return f"{option} of {first}"
    return f"{option:g}" if is_number(option) else str(option)
