"""Picture of convergence: growth of the front over the trials."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from autoprune.pareto import hypervolume
from autoprune.protocols import OK, FloatArray
from autoprune.result.plots.canvas import FRONT, drawing, tidied
from autoprune.result.trials import costs_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from autoprune.result import SearchResult

_MARGIN = 0.1  # of the extent of all points: distance of the reference point from the worst values


def plot_convergence(result: SearchResult, axes: Axes | None = None) -> Axes:
    """Draw the hypervolume of the front over the trials; see `SearchResult.plot_convergence`."""
    axes = drawing(axes, (7.0, 3.6), "result.plot_convergence()")
    from matplotlib.ticker import PercentFormatter

    volumes = growth(result)
    final = volumes[-1] if len(volumes) and volumes[-1] > 0 else 1.0
    axes.step(np.arange(1, len(volumes) + 1), volumes / final, where="post", color=FRONT, lw=1.6)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlim(0, max(len(volumes), 1))
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("trials, in the order proposed")
    axes.set_ylabel("hypervolume, in % of the final")
    names = ", ".join(result.limits)
    axes.set_title(f"front of {result.metric} against {names}", fontsize=11, loc="left")
    return tidied(axes)


def growth(result: SearchResult) -> FloatArray:
    """Hypervolume of the front after each trial, shape (trials,); it never falls.

    It is that of score and limited costs, each scaled to its extent over the feasible trials, with a reference point a
    tenth of the extent beyond the worst; 0 before the first feasible trial.
    """
    done = [i for i, trial in enumerate(result.trials) if trial.status == OK and trial.feasible]
    volumes = np.zeros(len(result.trials))
    if not done:
        return volumes
    trials = [result.trials[i] for i in done]
    scores = [result.direction.key(trial.score) for trial in trials]
    points = np.column_stack([scores, costs_of(trials, tuple(result.limits))])
    low = points.min(axis=0)
    extent = points.max(axis=0) - low
    points = (points - low) / np.where(extent > 0, extent, 1.0)
    reference = np.full(points.shape[1], 1 + _MARGIN)
    front = points[:0]
    volume = 0.0
    for i, point in zip(done, points, strict=True):
        if not (front <= point).all(axis=1).any():  # a dominated point adds nothing
            front = np.vstack([front[~(front >= point).all(axis=1)], point])
            volume = hypervolume(front, reference)
        volumes[i:] = volume
    return volumes
