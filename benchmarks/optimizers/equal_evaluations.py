"""Every optimizer at equal evaluations, on problems with known answers and on two trained networks.

Run ``python -m benchmarks.optimizers.equal_evaluations`` from the root of the repository, about an hour on one thread.
It writes ``results/optimizers.md``, ``.json`` and ``.png``, again after each optimizer and problem, and exits with 1
when `auto` misses its target. ``--problems`` and ``--optimizers`` run these again and keep the others; with no name
after ``--problems`` the report alone is written. ``--seeds`` and ``--first-seed`` are for tuning, from seed 100 on, and
write nothing. Evaluations of the networks are kept in ``runs/optimizers``.

A single change that is over the limit, to learn what a dimension costs, counts as an evaluation like any other.
Optimizers that plan are run once for each number of evaluations, because a user who asks for 50 gets a plan for 50. All
but the two that start at random are given uniform pruning to start from, as
`autoprune.search` does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from autoprune.optimizers import NSGA2, OPTIMIZERS, Bayes, Knapsack, MakeOptimizer, Problem
from autoprune.optimizers.knapsack.sensitivity import SHARE
from autoprune.protocols import Evaluations, IntArray
from benchmarks.optimizers.cases import CASES, NETWORKS, Case
from benchmarks.optimizers.report import draw, explain, missed
from benchmarks.support.common import RESULTS, environment, write

COMMAND = "python -m benchmarks.optimizers.equal_evaluations"
STORED = RESULTS / "optimizers.json"
BATCH = 8
SEEDS, NETWORK_SEEDS, BAYES_SEEDS = 20, 5, 5
EVALUATIONS, SMALL = (50, 100, 200), (20, 40)
STEP = 10  # evaluations between two points of a curve
FRONT_SHARE = 6  # one in this number of evaluations goes to the knapsack's front where NSGA-II starts from it


class FromKnapsack:
    """NSGA-II from the knapsack's front: that scans and proposes its front first, and both are told everything."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self._knapsack, self._nsga2 = Knapsack(problem, seed), NSGA2(problem, seed)
        self._left = len(problem.seeds) + int(SHARE * problem.trials) + problem.trials // FRONT_SHARE

    def ask(self, n: int) -> IntArray:
        self._left -= n
        return (self._nsga2 if self._left < 0 else self._knapsack).ask(n)

    def tell(self, evaluations: Evaluations) -> None:
        self._knapsack.tell(evaluations)
        self._nsga2.tell(evaluations)


COMPARED: dict[str, MakeOptimizer] = {
    "random": OPTIMIZERS["random"],
    "nsga2 (random start)": NSGA2,
    "nsga2 (knapsack start)": FromKnapsack,
    "level_switch": OPTIMIZERS["level_switch"],
    "bayes (TPE)": Bayes,
    "bayes (GP)": partial(Bayes, sampler="gp"),
    "knapsack": Knapsack,
    "auto": OPTIMIZERS["auto"],
}
AT_RANDOM = ("random", "nsga2 (random start)")
PLANNING = ("nsga2 (knapsack start)", "knapsack", "auto")


def seeds_of(problem: str, optimizer: str) -> int:
    """Number of seeds; none for the GP where it would take hours."""
    if optimizer == "bayes (GP)" and problem != "small":
        return 0
    return min(BAYES_SEEDS if "bayes" in optimizer else SEEDS, NETWORK_SEEDS if problem in NETWORKS else SEEDS)


def run(optimizer: str, case: Case, seed: int, trials: int) -> tuple[IntArray, float]:
    """Run an optimizer: its candidates in order, shape (<= trials, d), and its own seconds of processor time."""
    starts = None if optimizer in AT_RANDOM else case.starts
    began = time.process_time()
    proposer = COMPARED[optimizer](replace(case.problem, seeds=starts, trials=trials), seed)
    seen, own = case.starts[:0], time.process_time() - began
    while len(seen) < trials:
        began = time.process_time()
        candidates = proposer.ask(min(BATCH, trials - len(seen)))
        own += time.process_time() - began
        if not len(candidates):
            break
        evaluations = case.evaluate(candidates)
        began = time.process_time()
        proposer.tell(evaluations)
        own += time.process_time() - began
        seen = np.concatenate([seen, candidates])
    return seen, own


def cell(problem: str, optimizer: str, seeds: Sequence[int]) -> dict[str, Any]:
    """One optimizer on one problem: figures of every seed at the checkpoints, and curves of the longest runs."""
    shown, seconds = (SMALL if problem == "small" else EVALUATIONS), 0.0
    replanned = optimizer in PLANNING
    figures: dict[str, list[list[float]]] = {"volume": [], "at limit": [], "at half": []}
    curves = []
    for seed in seeds:
        case = CASES[problem](seed)
        longest, own = run(optimizer, case, seed, shown[-1])
        seconds += own
        runs = [run(optimizer, case, seed, n)[0] if replanned else longest[:n] for n in shown[:-1]] + [longest]
        figures["volume"].append([round(case.volume(seen), 4) for seen in runs])
        figures["at limit"].append([round(case.best(seen, 1.0), 4) for seen in runs])
        figures["at half"].append([round(case.best(seen, 0.5), 4) for seen in runs])
        curves.append([round(case.volume(longest[:n]), 4) for n in range(STEP, shown[-1] + 1, STEP)])
    milliseconds = round(1e3 * seconds / (len(seeds) * shown[-1]), 1)
    made = {"seeds": len(seeds), "shown": shown, "replanned": replanned, "ms": milliseconds}
    return made | figures | {"curves": curves, "step": STEP}


def stored() -> dict[str, dict[str, Any]]:
    """The cells of earlier runs."""
    cells: dict[str, dict[str, Any]] = json.loads(STORED.read_text())["cells"] if STORED.exists() else {}
    return cells


def report(cells: Mapping[str, Mapping[str, Any]]) -> bool:
    """Write the whole report again, and return whether `auto` met its target."""
    ordered = {p: {o: cells[p][o] for o in COMPARED if o in cells[p]} for p in CASES if p in cells}
    results = {"environment": environment(COMMAND), "batch": BATCH, "missed": missed(ordered), "cells": ordered}
    draw(ordered, RESULTS / "optimizers.png")
    write("optimizers", "Optimizers at equal evaluations", results, explain(ordered, BATCH))
    return not results["missed"]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--problems", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--optimizers", nargs="+", choices=COMPARED, default=list(COMPARED))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    tuning = chosen.seeds is not None or chosen.first_seed != 0
    cells: dict[str, dict[str, Any]] = {} if tuning else stored()
    for problem in chosen.problems:
        for optimizer in chosen.optimizers:
            count = min(seeds_of(problem, optimizer), chosen.seeds or SEEDS)
            if count:
                found = cell(problem, optimizer, range(chosen.first_seed, chosen.first_seed + count))
                cells = cells if tuning else stored()  # another process may have written since
                cells.setdefault(problem, {})[optimizer] = found
                means = {name: np.mean(found[name], axis=0).round(3).tolist() for name in ("volume", "at limit")}
                print(problem, optimizer, count, means, f"{found['ms']} ms", file=sys.stderr, flush=True)
                if not tuning:
                    STORED.write_text(json.dumps({"cells": cells}))
    if tuning:
        print(explain(cells, BATCH))
        return 1 if missed(cells) else 0
    return 0 if report(cells) else 1


if __name__ == "__main__":
    sys.exit(main())
