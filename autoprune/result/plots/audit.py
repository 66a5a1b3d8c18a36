"""Picture of an audit: trained scores against cheap ones, and the control networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.result.plots.canvas import FRONT, SCALE, tidied, with_unit, write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from autoprune.result.audit_report import Audit


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
            cmap=SCALE,
            s=24,
        )
        tau = audit.rankings[name].tau
        axis.set_title(f"{name}: tau {tau.value:.2f} ({tau.low:.2f} to {tau.high:.2f})", fontsize=9)
        axis.set_xlabel(f"{audit.metric} before training")
        axis.xaxis.set_major_locator(MaxNLocator(4))
        if axis is not axes[0]:
            axis.sharey(axes[0])  # new weights, in the last panel, may be far below
        axis.tick_params(labelleft=axis is axes[0])
    figure.colorbar(
        points,
        ax=list(axes[: len(audit.evaluators)]),
        label=with_unit(audit.cost),
        format=EngFormatter(),
    )
    axes[0].set_ylabel(f"{audit.metric} after training")
    if audit.variants:
        for place, variant in enumerate(audit.variants.values()):
            axes[-1].scatter([place] * len(variant.trained), variant.trained, color=FRONT, s=24, alpha=0.7)
        axes[-1].set_xticks(range(len(audit.variants)), list(audit.variants), rotation=20, fontsize=8)
        axes[-1].set_title(f"networks like trial {audit.winner}", fontsize=9)
    for axis in axes:
        tidied(axis)
    if path is not None:
        write_picture(axes[0], path, dpi=120)
    return figure
