"""Tables, picture and target of `benchmarks.optimizers.equal_evaluations`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from autoprune.protocols import FloatArray
from benchmarks.optimizers.cases import DECEPTIVE, NETWORKS
from benchmarks.support.common import table

Cells = Mapping[str, Mapping[str, Mapping[str, Any]]]
JUDGED = "auto"
BEHIND = ("random", "nsga2 (random start)")  # of which auto must be clearly ahead
COLUMNS = 4
MARGIN = 0.02  # of the other's hypervolume, by which auto may be behind


def half_width(values: FloatArray) -> FloatArray:
    """Half of the 95 % interval of the mean over the first axis, by Student's t; infinite for one row."""
    n = len(values)
    if n < 2:
        return np.full(values.shape[1:], np.inf)
    half: FloatArray = stats.t.ppf(0.975, n - 1) * values.std(axis=0, ddof=1) / n**0.5
    return half


def ahead(cells: Cells, problem: str, other: str) -> list[tuple[int, float, float, float]]:
    """Evaluations, and how far ahead `auto` is, as a share of the other's hypervolume: mean and 95 % interval."""
    ours, theirs = (np.array(cells[problem][name]["volume"]) for name in (JUDGED, other))
    n = min(len(ours), len(theirs))
    difference, scale = ours[:n] - theirs[:n], np.maximum(theirs[:n].mean(axis=0), 1e-9)
    mean, half = difference.mean(axis=0) / scale, half_width(difference) / scale
    shown = cells[problem][JUDGED]["shown"]
    return list(zip(shown, mean.tolist(), (mean - half).tolist(), (mean + half).tolist(), strict=True))


def judged(cells: Cells) -> list[tuple[str, str]]:
    """The pairs of problem and other optimizer that `auto` is compared on."""
    return [(p, o) for p, row in cells.items() if JUDGED in row for o in row if o != JUDGED]


def missed(cells: Cells) -> list[str]:
    """List cases in which `auto` misses its target, after all evaluations; deceptive problems are left out."""
    lines = []
    for problem, other in judged(cells):
        n, mean, low, high = ahead(cells, problem, other)[-1]
        line = f"{problem}, {other}, {n} evaluations: {shown(mean, low, high)}"
        if problem not in DECEPTIVE and mean < -MARGIN:
            lines.append(f"{line}, more than {MARGIN:.0%} behind")
        elif problem not in DECEPTIVE and other in BEHIND and low <= 0:
            lines.append(f"{line}, not clearly ahead")
    return lines


def losses(cells: Cells) -> list[str]:
    """List cases in which `auto` is behind on average, or by more than the margin at the low end of the interval."""
    rows = [(p, o, *row) for p, o in judged(cells) for row in ahead(cells, p, o)]
    return [
        f"{p}, {o}, {n} evaluations: {shown(mean, low, high)}{'' if mean < 0 else ', open'}"
        for p, o, n, mean, low, high in rows
        if mean < 0 or low < -MARGIN
    ]


def shown(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"


def spread(values: Sequence[float]) -> str:
    half = half_width(np.array(values))
    return f"{np.mean(values):.3f}" + (f" ± {half:.3f}" if np.isfinite(half) else "")


def explain(cells: Cells, batch: int) -> str:
    """The whole report."""
    parts = [
        "Hypervolume: the share of the box between the loss of the dense model at half the limit, and uniform pruning "
        "there at the limit; higher is better. Best: the loss of the best candidate at the limit and at half of it, "
        "as a share of what uniform pruning loses there; lower is better. On the noisy problem the front and the best "
        "are chosen by what was measured and judged by exact losses. Means over seeds with 95 % intervals. The last "
        f"columns say by how much of the other's hypervolume {JUDGED} is ahead, paired within seeds, and the "
        f"optimizer's own time for a candidate, asked for {batch} at a time.",
        "![Hypervolume against evaluations](optimizers.png)",
    ]
    for problem, row in cells.items():
        counts = next(iter(row.values()))["shown"]
        header = ["optimizer", "seeds", *(f"hypervolume after {n}" for n in counts)]
        header += [f"best at limit after {counts[-1]}", "best at half", f"{JUDGED} ahead", "ms each"]
        lines = []
        for name, cell in row.items():
            against = ahead(cells, problem, name)[-1][1:] if name != JUDGED and JUDGED in row else None
            volumes = [spread(column) for column in zip(*cell["volume"], strict=True)]
            best = [spread([values[-1] for values in cell[key]]) for key in ("at limit", "at half")]
            lines.append([name, cell["seeds"], *volumes, *best, shown(*against) if against else "", cell["ms"]])
        kind = " (one network, seeds of the optimizers)" if problem in NETWORKS else ""
        parts.append(f"## {problem}{kind}\n\n{table(header, lines)}")
    short = missed(cells)
    target = (
        f"Target (after all evaluations {JUDGED} is on average no more than {MARGIN:.0%} of hypervolume behind any "
        f"other, and the whole interval ahead of {' and '.join(BEHIND)}, but for problems built to deceive)"
    )
    parts.append(f"{target} {'NOT met:' if short else 'met.'}")
    parts += ["\n".join(f"- {line}" for line in short)] if short else []
    behind = losses(cells)
    listed = "\n".join(f"- {line}" for line in behind) or "- none"
    parts.append(
        f"Where {JUDGED} is behind another on average at any number of evaluations, or ahead but with an interval that "
        f"reaches more than {MARGIN:.0%} behind (open):\n\n{listed}"
    )
    return "\n\n".join(parts)


def draw(cells: Cells, path: Path) -> None:
    """Hypervolume against evaluations, a panel for each problem."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(name for row in cells.values() for name in row))
    colours = {name: "black" if name == JUDGED else f"C{i}" for i, name in enumerate(names)}
    rows, columns = -(-len(cells) // COLUMNS), min(COLUMNS, len(cells))
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for axis, (problem, row) in zip(axes.flat, cells.items(), strict=False):
        for name, cell in row.items():
            curves = np.array(cell["curves"])
            x, mean, half = cell["step"] * np.arange(1, curves.shape[1] + 1), curves.mean(axis=0), half_width(curves)
            axis.plot(x, mean, color=colours[name], lw=2 if name == JUDGED else 1.2)
            if np.isfinite(half).all():
                axis.fill_between(x, mean - half, mean + half, color=colours[name], alpha=0.15, lw=0)
            if cell["replanned"]:
                axis.plot(cell["shown"], np.mean(cell["volume"], axis=0), "o", color=colours[name], ms=4)
        axis.set(title=problem, xlabel="evaluations", ylabel="hypervolume (share of the box)", ylim=(0, None))
    for axis in axes.flat[len(cells) :]:
        axis.axis("off")
    handles = [plt.Line2D([], [], color=colours[name], lw=2, label=name) for name in names]
    handles.append(plt.Line2D([], [], color="grey", marker="o", lw=0, label="run planned for so many evaluations"))
    title = "mean and 95 % interval over seeds"
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, title=title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
