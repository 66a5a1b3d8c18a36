"""Tables, picture and targets of `benchmarks.peers.comparison`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from autoprune.protocols import FloatArray
from benchmarks.peers.methods import BAND, BUDGETS, FINETUNE_EPOCHS, FINETUNE_LR, TRIALS
from benchmarks.support.common import table

Run = Mapping[str, Any]
STAGES = ("before", "after")
MARGINS = {"before": 0.0, "after": 0.5}  # points by which ours may be behind; before fine-tuning it must be ahead
TARGET_BUDGETS = ("50%", "30%", "15%")
NAMES = tuple(f"{share:.0%}" for share in BUDGETS)


def accuracy(runs: Sequence[Run], pair: str, method: str, budget: str, stage: str) -> FloatArray:
    """Test accuracy in percent, one entry a seed."""
    own = sorted((r for r in runs if (r["pair"], r["method"]) == (pair, method)), key=lambda r: r["seed"])
    return np.array([100 * r["budgets"][budget][stage]["accuracy"] for r in own])


def interval(differences: FloatArray) -> tuple[float, float]:
    """95 % interval of the mean by Student's t over seeds; infinite for one seed."""
    n = len(differences)
    if n < 2:
        return -np.inf, np.inf
    half = stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n)
    return float(differences.mean() - half), float(differences.mean() + half)


def difference(
    runs: Sequence[Run], pair: str, method: str, judged: str, budget: str, stage: str
) -> tuple[float, float, float]:
    """Lead of `judged` over a method in points: mean and 95 % interval of the differences within seeds."""
    paired = accuracy(runs, pair, judged, budget, stage) - accuracy(runs, pair, method, budget, stage)
    return (float(paired.mean()), *interval(paired))


def shown(mean: float, low: float, high: float) -> str:
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" if np.isfinite(low) else f"{mean:+.1f}"


def pairs_of(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run["pair"] for run in runs))


def missed(runs: Sequence[Run], peers: Sequence[str], judged: str) -> list[str]:
    """Sentences on every target missed, by the means over seeds."""
    lines = []
    for pair in pairs_of(runs):
        for stage, margin in MARGINS.items():
            for budget in TARGET_BUDGETS:
                for method in peers:
                    found = difference(runs, pair, method, judged, budget, stage)
                    ahead = found[0] > 0 if stage == "before" else found[0] >= -margin
                    if not ahead:
                        where = f"{pair}, {budget} of the FLOPs, {stage} fine-tuning"
                        lines.append(f"{where}: {shown(*found)} points to {method}")
    return lines


def report(runs: Sequence[Run], peers: Sequence[str], ours: Sequence[str]) -> str:
    """Everything in words and tables; the targets are about the last of `ours`."""
    seeds = len({run["seed"] for run in runs})
    order, judged = [*peers, *ours], ours[-1]
    failures = missed(runs, peers, judged)
    checks = len(pairs_of(runs)) * len(STAGES) * len(TARGET_BUDGETS) * len(peers)
    verdict = (
        f"Target: by the mean over seeds, {judged} is ahead of every other method before fine-tuning and not behind by "
        f"more than {MARGINS['after']} points after it, at {', '.join(TARGET_BUDGETS)} of the FLOPs. "
        f"{checks - len(failures)} of {checks} comparisons meet it"
        + (f"; these {len(failures)} miss it:\n\n" + "\n".join(f"- {line}" for line in failures) if failures else ".")
    )
    setting = (
        f"{seeds} seeds: each has its own split of the digits, draw of the distortions, and trained network, which all "
        "methods share, as they share 512 calibration and 800 (clean: 400) validation images. Test images serve the "
        "figures below alone. Every network gets batch-norm statistics from the calibration images before each score; "
        f"the fine-tune is {FINETUNE_EPOCHS} epochs with AdamW, one cycle to a learning rate of {FINETUNE_LR}. "
        f"EagleEye and ours evaluate {TRIALS} candidates for each budget. EagleEye's strategies lie within {BAND:.0%} "
        "of the dense FLOPs below the budget. FastNAS scans each layer once, for all budgets. Differences are paired "
        "over seeds; their 95 % intervals (Student's t) are each for itself, so that of many comparisons some exclude "
        "zero by chance."
    )
    sections = [section(runs, pair, order, judged) for pair in pairs_of(runs)]
    picture = "![accuracy against FLOPs, before and after fine-tuning](peers.png)"
    return "\n\n".join([verdict, setting, *sections, effort(runs, order), picture])


def section(runs: Sequence[Run], pair: str, order: Sequence[str], judged: str) -> str:
    """Accuracies of one pair, and what ours is ahead by."""
    dense = np.mean([run["dense"]["accuracy"] for run in runs if run["pair"] == pair])

    def means(method: str, budget: str) -> str:
        return " / ".join(f"{accuracy(runs, pair, method, budget, stage).mean():.1f}" for stage in STAGES)

    def ahead(method: str, budget: str) -> str:
        return " / ".join(shown(*difference(runs, pair, method, judged, budget, stage)) for stage in STAGES)

    header = [f"{budget} of the FLOPs" for budget in NAMES]
    levels = table(["method", *header], [[m, *(means(m, b) for b in NAMES)] for m in order])
    others = [method for method in order if method != judged]
    leads = table([f"{judged} minus", *header], [[m, *(ahead(m, b) for b in NAMES)] for m in others])
    return (
        f"## {pair}\n\nTest accuracy in percent before / after fine-tuning (dense: {100 * dense:.1f}), mean over "
        f"seeds:\n\n{levels}\n\nDifference in points, before / after, with its 95 % interval:\n\n{leads}"
    )


def effort(runs: Sequence[Run], order: Sequence[str]) -> str:
    """Evaluations, time, and how much of each budget was used."""

    def row(method: str) -> list[str]:
        own = [run for run in runs if run["method"] == method]
        used = [np.mean([run["budgets"][budget]["flops"] for run in own]) for budget in NAMES]
        evaluations, seconds = (np.mean([run[key] for run in own]) for key in ("evaluations", "cpu_seconds"))
        return [method, f"{evaluations:.0f}", f"{seconds:.0f}", *(f"{100 * share:.1f}" for share in used)]

    header = ["method", "evaluations", "CPU seconds", *(f"FLOPs for {budget}, %" for budget in NAMES)]
    return (
        "## Effort\n\nEvaluations and processor time of a method for all four budgets of one network together, without "
        "fine-tuning; FLOPs reached by PyTorch's counter, in percent of the dense network. Means over all networks.\n\n"
        + table(header, [row(method) for method in order])
    )


def plot(runs: Sequence[Run], order: Sequence[str], judged: str, path: Path) -> None:
    """Mean accuracy against budget, one column of panels a pair, before and after fine-tuning."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    pairs = pairs_of(runs)
    size = (4.2 * len(pairs) + 2.4, 7.5)
    figure, axes = plt.subplots(2, len(pairs), figsize=size, sharex=True, squeeze=False, layout="constrained")
    places = np.arange(len(NAMES))
    for column, pair in enumerate(pairs):
        dense = np.mean([100 * run["dense"]["accuracy"] for run in runs if run["pair"] == pair])
        for axis, stage in zip(axes[:, column], STAGES, strict=True):
            axis.axhline(dense, color="grey", lw=0.8, ls=":", label="dense")
            for number, method in enumerate(order):
                means = [accuracy(runs, pair, method, budget, stage).mean() for budget in NAMES]
                chosen = method == judged
                axis.plot(
                    places,
                    means,
                    color="black" if chosen else f"C{number}",
                    lw=2.4 if chosen else 1.3,
                    marker="oosvD^PX*<>"[number % 11],
                    ms=5,
                    zorder=3 if chosen else 2,
                    label=method,
                )
            axis.set_title(f"{pair}, {stage} fine-tuning", fontsize=10)
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel("FLOPs budget, share of the dense network")
        axes[1, column].set_xticks(places, [f"{100 * share:.0f} %" for share in BUDGETS])
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy, % (mean over seeds)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.savefig(path, dpi=90)
