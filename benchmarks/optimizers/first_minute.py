"""Quality of `auto` against the number of trials: it must not fall as they rise, nor stay behind simpler optimizers.

Run ``python -m benchmarks.optimizers.first_minute`` from the root of the repository, about an hour on one thread; it
goes on where it stopped, a cell at a time, and exits with 1 when a target is missed. ``--problems`` and ``--seeds``
choose fewer; a cell with fewer seeds than wanted is made again.

For each number of trials each optimizer is told that number, as in `autoprune.search`, and starts from uniform pruning;
random search and an NSGA-II that start at random are next to them. Hypervolume is that of `equal_evaluations`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.optimizers.cases import CASES, KNOWN
from benchmarks.optimizers.equal_evaluations import PLANNING, run
from benchmarks.support.common import RESULTS, environment, table, write

COMMAND = "python -m benchmarks.optimizers.first_minute"
STORED = RESULTS / "first_minute.json"
TRIALS = (5, 12, 25, 50, 100, 200)
SEEDS = 20
JUDGED = "auto"
OPTIMIZERS = (JUDGED, "knapsack", "level_switch", "nsga2 (random start)", "random")
MOST_FALL, MOST_BEHIND = 0.005, 0.01


def cell(problem: str, optimizer: str, seeds: int) -> list[list[float]]:
    """Hypervolume of every seed at every number of trials, shape (seeds, numbers)."""
    rows = []
    for seed in range(seeds):
        case = CASES[problem](seed)
        if optimizer in PLANNING:
            runs = [run(optimizer, case, seed, n)[0] for n in TRIALS]
        else:  # without a plan a shorter run is the beginning of a longer one
            longest = run(optimizer, case, seed, TRIALS[-1])[0]
            runs = [longest[:n] for n in TRIALS]
        rows.append([round(case.volume(seen), 4) for seen in runs])
    return rows


def verdict(row: Mapping[str, list[list[float]]]) -> tuple[float, float, int]:
    """Largest fall of the median as trials rise; most that it is behind, as shares; and at which number of trials."""
    medians = {name: np.median(np.array(found), axis=0) for name, found in row.items()}
    own = medians[JUDGED]
    fall = float(np.maximum((own[:-1] - own[1:]) / np.maximum(own[:-1], 1e-9), 0.0).max())
    best = np.max([each for name, each in medians.items()], axis=0)
    behind = (best - own) / np.maximum(best, 1e-9)
    return fall, float(behind.max()), TRIALS[int(behind.argmax())]


def explain(cells: Mapping[str, Mapping[str, list[list[float]]]]) -> tuple[str, list[str]]:
    """The report, and the targets missed."""
    parts = ["Median hypervolume over seeds, as a share of the box of `equal_evaluations`; higher is better."]
    missed = []
    for problem, row in cells.items():
        lines = [
            (name, len(row[name]), *(f"{value:.3f}" for value in np.median(np.array(row[name]), axis=0)))
            for name in OPTIMIZERS
            if name in row
        ]
        fall, behind, at = verdict(row)
        text = f"`{JUDGED}` falls by at most {fall:.1%} as trials rise, and is at most {behind:.1%} behind (at {at})."
        parts.append(f"## {problem}\n\n{table(('optimizer', 'seeds', *TRIALS), lines)}\n\n{text}")
        if fall > MOST_FALL:
            missed.append(f"{problem}: falls by {fall:.1%}")
        if behind > MOST_BEHIND:
            missed.append(f"{problem}: {behind:.1%} behind at {at} trials")
    target = f"Target (no fall of more than {MOST_FALL:.1%}, nowhere more than {MOST_BEHIND:.0%} behind the best)"
    parts.append(f"{target} " + ("met." if not missed else "NOT met:\n\n" + "\n".join(f"- {line}" for line in missed)))
    return "\n\n".join(parts), missed


def stored() -> dict[str, Any]:
    """The cells of earlier runs."""
    cells: dict[str, Any] = json.loads(STORED.read_text())["cells"] if STORED.exists() else {}
    return cells


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", nargs="+", choices=CASES, default=list(KNOWN))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for problem in chosen.problems:
        for optimizer in OPTIMIZERS:
            if len(stored().get(problem, {}).get(optimizer, [])) < chosen.seeds:
                found = cell(problem, optimizer, chosen.seeds)
                cells = stored()
                cells.setdefault(problem, {})[optimizer] = found
                STORED.write_text(json.dumps({"cells": cells}))
                print(problem, optimizer, np.median(found, axis=0).round(3).tolist(), file=sys.stderr, flush=True)
    cells = {problem: row for problem, row in stored().items() if JUDGED in row}
    text, missed = explain(cells)
    results = {"environment": environment(f"{COMMAND} --seeds {chosen.seeds}"), "missed": missed, "cells": cells}
    write("first_minute", "Quality against the number of trials", results, text)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
