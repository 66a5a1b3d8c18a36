"""Pictures of a search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.files.access import as_path, replacing, shortened
from autoprune.protocols import OK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from autoprune.result import SearchResult
    from autoprune.result.audit_report import Audit

INK, FRONT, LIMIT = "#9aa5b1", "#1f6feb", "#c2410c"
MOST_BARS = 300
"""Most networks on a front whose intervals are drawn one by one; more are drawn as a band."""
UNITS = {"flops": "MACs", "params": "parameters", "memory_bytes": "bytes"}


def plot_front(result: SearchResult, path: str | Path | None = None) -> Figure:
    """Draw score against the first limited cost; see `SearchResult.plot`."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise ImportError("result.plot() needs matplotlib; install autoprune[plot]") from error
    name, limit = next(iter(result.limits.items()))
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axes = figure.add_subplot()
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
    axes.scatter([result.dense.costs[name]], [result.dense.score], marker="D", s=36, color="#111827", label="dense")
    dense = result.dense.costs[name]
    share = f" ({limit / dense:.0%} of dense)" if dense else ""
    if limit != dense:
        axes.axvline(limit, color=LIMIT, ls="--", lw=1, label=f"limit{share}")
    if (worst := result.worst_score) is not None:
        axes.axhline(worst, color=LIMIT, ls=":", lw=1, label="score limit")
    axes.set_xlabel(f"{name} ({UNITS[name]})" if name in UNITS else name)
    axes.set_ylabel(f"{result.metric} on validation data")
    axes.set_title(f"{result.budget}: {len(result.front)} networks on the front", fontsize=11, loc="left")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right" if result.higher_is_better else "upper right")
    if path is not None:
        _write(figure, path, dpi=150)
    return figure


def plot_audit(audit: Audit, path: str | Path | None = None) -> Figure:
    """Draw trained scores against cheap ones, and the control networks; see `Audit.plot`."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError as error:
        raise ImportError("result.audit.plot() needs matplotlib; install autoprune[plot]") from error
    panels = len(audit.evaluators) + bool(audit.variants)
    figure = Figure(figsize=(3.4 * panels + 1.0, 3.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for axis, name in zip(axes, audit.evaluators, strict=False):
        points = axis.scatter(
            [row.scores[name] for row in audit.rows],
            [row.trained for row in audit.rows],
            c=[row.cost for row in audit.rows],
            cmap="viridis",
            s=24,
        )
        tau = audit.rankings[name].tau
        axis.set_title(f"{name}: tau {tau.value:.2f} ({tau.low:.2f} to {tau.high:.2f})", fontsize=9)
        axis.set_xlabel(f"{audit.metric} before training")
        axis.xaxis.set_major_locator(MaxNLocator(4))
        if axis is not axes[0]:
            axis.sharey(axes[0])  # new weights, in the last panel, may be far below
        axis.tick_params(labelleft=axis is axes[0])
    unit = UNITS.get(audit.cost)
    figure.colorbar(
        points,
        ax=list(axes[: len(audit.evaluators)]),
        label=f"{audit.cost} ({unit})" if unit else audit.cost,
        format=EngFormatter(),
    )
    axes[0].set_ylabel(f"{audit.metric} after training")
    if audit.variants:
        for place, variant in enumerate(audit.variants.values()):
            axes[-1].scatter([place] * len(variant.trained), variant.trained, color=FRONT, s=24, alpha=0.7)
        axes[-1].set_xticks(range(len(audit.variants)), list(audit.variants), rotation=20, fontsize=8)
        axes[-1].set_title(f"networks like trial {audit.winner}", fontsize=9)
    for axis in axes:
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    if path is not None:
        _write(figure, path, dpi=120)
    return figure


def _write(figure: Figure, path: str | Path, dpi: int) -> None:
    """Replace a picture; its ending gives the format, which is PNG for a name without one."""
    name = as_path(path)
    form = name.suffix.lstrip(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if form not in known:
        raise ValueError(f"path must end in a format of pictures, one of {sorted(known)}, got {shortened(name)}")
    with replacing(name) as fresh:
        figure.savefig(fresh, dpi=dpi, format=form)
