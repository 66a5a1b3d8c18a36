"""Picture of a front: score against the first limited cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.protocols import OK
from autoprune.result.plots.canvas import DENSE, FRONT, INK, LIMIT, drawing, tidied, with_unit, write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from autoprune.result import SearchResult

FAR = 10.0
"""Distance from the best score, in multiples of that of the front's middle, from which on points are not shown."""

MOST_BARS = 300
"""Most networks on a front whose intervals are drawn one by one; more are drawn as a band."""


def plot_front(result: SearchResult, path: str | Path | None = None, axes: Axes | None = None) -> Axes:
    """Draw score against the first limited cost; see `SearchResult.plot`."""
    axes = drawing(axes, (7.0, 4.4), "result.plot()")
    from matplotlib.ticker import EngFormatter

    name, limit = next(iter(result.limits.items()))
    done = [trial for trial in result.trials if trial.status == OK and trial.feasible]
    axes.scatter([t.costs[name] for t in done], [t.score for t in done], s=14, color=INK, alpha=0.6, lw=0)
    axes.scatter([], [], s=14, color=INK, label=f"{len(done)} trials")
    if result.front:
        x = [t.costs[name] for t in result.front]
        y = [t.score for t in result.front]
        fmt = "o-" if len(result.limits) == 1 else "o"
        low, high = ([t.interval[end] for t in result.front] for end in (0, 1))
        bars = None
        if len(x) <= MOST_BARS:
            bars = [[max(0.0, mid - end) for mid, end in zip(y, low, strict=True)]]
            bars.append([max(0.0, end - mid) for mid, end in zip(y, high, strict=True)])
        else:
            axes.fill_between(x, low, high, color=FRONT, alpha=0.2, lw=0)
        axes.errorbar(x, y, yerr=bars, fmt=fmt, color=FRONT, ms=4, lw=1.4, elinewidth=0.7, label="front (95 %)")
    axes.scatter([result.dense.costs[name]], [result.dense.score], marker="D", s=36, color=DENSE, label="dense")
    dense = result.dense.costs[name]
    share = f" ({limit / dense:.0%} of dense)" if dense else ""
    _zoom(axes, result, [trial.score for trial in done])
    if limit != dense:
        axes.axvline(limit, color=LIMIT, ls="--", lw=1, label=f"limit{share}")
    if (worst := result.worst_score) is not None:
        axes.axhline(worst, color=LIMIT, ls=":", lw=1, label="score limit")
    axes.set_xlabel(with_unit(name))
    axes.set_ylabel(f"{result.metric} on validation data")
    axes.set_title(f"{result.budget}: {len(result.front)} networks on the front", fontsize=11, loc="left")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlim(left=0)
    tidied(axes).legend(frameon=False, fontsize=9, loc="lower right" if result.higher_is_better else "upper right")
    if path is not None:
        write_picture(axes, path, dpi=150)
    return axes


def _zoom(axes: Axes, result: SearchResult, scores: Sequence[float]) -> None:
    """Leave out scores that are far worse than most of the front's, where they would squeeze it to a line; count them.

    Far is `FAR` times as far from the best as the middle of the front is, or a tenth of that of the dense model.
    """
    if not result.front:
        return
    front = sorted(result.direction.key(trial.score) for trial in result.front)
    best = min(front[0], result.direction.key(result.dense.score))
    room = max(FAR * (front[len(front) // 2] - best), abs(result.dense.score) / FAR)
    hidden = sum(result.direction.key(score) > best + room for score in scores)
    if not hidden:
        return
    end = result.direction.key(best + room)
    margin = 0.05 * room
    ends = [end for trial in result.front for end in trial.interval if not math.isnan(end)]
    above = result.direction.best([result.direction.key(best), *ends])
    axes.set_ylim((end, above + margin) if result.higher_is_better else (above - margin, end))
    place = (0.01, 0.02) if result.higher_is_better else (0.01, 0.94)
    told = "1 trial is worse than shown" if hidden == 1 else f"{hidden} trials are worse than shown"
    axes.text(*place, told, transform=axes.transAxes, fontsize=8, color=DENSE)
