"""Cells of a table of zeros: one for each method, share or pattern, and draw of calibration samples."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from torch import nn

from benchmarks.peers.language.zeros import DATABASE, METHODS, SEARCHES, Target, Zeros
from benchmarks.support.common import table

JUDGED = "auto on the database"
TARGETS: tuple[str, ...] = ("0.7", "0.6", "0.5", "2:4", "4:8")
Cells = dict[str, dict[str, Any]]


def arguments(description: str | None, folder: str, size: str) -> argparse.ArgumentParser:
    """Options of a table: which cells, how many candidates, and where the database is, in `folder` of this size."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=40, help="candidates of a search")
    parser.add_argument("--folder", type=Path, default=Path(folder), help=f"of the database: {size} a seed")
    return parser


def target_of(text: str) -> Target:
    """A share of zeros, or the name of a pattern."""
    return text if ":" in text else float(text)


def key(method: str, target: str, seed: int) -> str:
    return f"{method} | {target} | {seed}"


def fill(
    cells: Cells, zeros: Zeros, options: argparse.Namespace, judge: Callable[[nn.Module], Mapping[str, float]]
) -> Iterable[str]:
    """Compute the cells of one draw that are not there; yields the name of each when it is done."""
    for target in options.targets:
        for method in options.methods:
            name = key(method, target, zeros.seed)
            if name in cells or (":" in target and method in SEARCHES):
                continue
            zeros.kept.clear()
            _ = zeros.solver if method not in DATABASE else zeros.study  # not a part of this cell
            began = time.process_time()
            network = METHODS[method](zeros, target_of(target)).eval()
            seconds = time.process_time() - began
            cells[name] = {"cpu_seconds": round(seconds, 1), **judge(network), **zeros.kept}
            yield name


def table_of(cells: Cells, shown: Callable[[dict[str, Any]], str]) -> str:
    """A row for each method, a column for each target, and a line in it for each draw; then the seconds of all."""
    targets = [target for target in TARGETS if any(f"| {target} |" in name for name in cells)]
    rows = []
    for method in METHODS:
        own = [[cell for name, cell in cells.items() if name.startswith(f"{method} | {t} |")] for t in targets]
        rows.append([method, *("<br>".join(map(shown, each)) for each in own)])
    head = ["", *(t if ":" in t else f"{float(t):.0%} zeros" for t in targets)]
    notes = [
        f"{name}: {cell['cpu_seconds']:.0f} s of processor time"
        + (f", {cell['evaluations']:.0f} candidates" if "evaluations" in cell else "")
        + (" near the limit" if "near" in cell else "")
        for name, cell in cells.items()
    ]
    return f"{table(head, rows)}\n\n" + "\n\n".join(notes)


def lead_table(cells: Cells, lost: Callable[[dict[str, Any]], float]) -> str:
    """Compare what `JUDGED` loses with every other method, over the draws that both have.

    Args:
        cells: All of them.
        lost: Quality lost by the network of a cell; lower is better.

    Returns:
        By method and target: ratio of the means, and mean and 95 % t-interval of the difference, negative where
        `JUDGED` loses less; an interval needs two draws.
    """
    targets = [target for target in TARGETS if any(name.startswith(f"{JUDGED} | {target} |") for name in cells)]
    rows = []
    for other in (method for method in METHODS if method != JUDGED):
        row = [other]
        for target in targets:
            seeds = {name.rpartition("| ")[2] for name in cells if name.startswith(f"{other} | {target} |")}
            both = [seed for seed in sorted(seeds) if f"{JUDGED} | {target} | {seed}" in cells]
            mine, its = (
                np.array([lost(cells[f"{method} | {target} | {seed}"]) for seed in both]) for method in (JUDGED, other)
            )
            row.append(_compared(mine, its) if both else "")
        rows += [row] if any(row[1:]) else []
    return table([f"{JUDGED}, next to", *(f"{float(target):.0%} zeros" for target in targets)], rows)


def _compared(mine: np.ndarray, its: np.ndarray) -> str:
    gap = mine - its
    text = f"{mine.mean() / its.mean():.2f}; {gap.mean():+.3f}"
    if len(gap) > 1:
        low, high = stats.t.interval(0.95, len(gap) - 1, gap.mean(), stats.sem(gap))
        text += f" [{low:+.3f}, {high:+.3f}]"
    return f"{text} ({len(gap)})"
