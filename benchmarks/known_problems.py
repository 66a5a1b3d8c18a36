"""Hypervolume against evaluations on problems with known answers, for every optimizer; no network is involved.

Run ``python -m benchmarks.known_problems`` from the root of the repository, a few minutes on one thread. ``--seeds``,
``--first-seed``, ``--problems`` and ``--optimizers`` narrow it down for tuning; then nothing is written to disk.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from autoprune.optimizers import OPTIMIZERS, MakeOptimizer, uniform_seeds
from autoprune.pareto import hypervolume
from autoprune.protocols import FloatArray
from autoprune.testing.problems import (
    KnownProblem,
    additive_problem,
    blocks_problem,
    product_problem,
    staircase_problem,
    table_problem,
)
from benchmarks.common import environment, table, write

COMMAND = "python -m benchmarks.known_problems"
BATCH = 8
SHOWN = (48, 96, 200)  # evaluations after which the front is looked at

PROBLEMS: dict[str, Callable[[int], KnownProblem]] = {
    "additive": lambda seed: additive_problem([16] * 24, seed),
    "product": lambda seed: product_problem([16] * 24, seed),
    "staircase": lambda seed: staircase_problem([16] * 24, seed),
    "table": lambda seed: table_problem([8] * 24, seed, budget=0.6),
    "blocks": lambda seed: blocks_problem(8, seed),
}
NAMES = ("random", "nsga2", "level_switch", "bayes", "knapsack", "auto")
COMPARED: dict[str, MakeOptimizer] = {name: OPTIMIZERS[name] for name in NAMES}
FEWER_SEEDS = {"bayes": 5}  # where an optimizer is slow


def run(make: MakeOptimizer, known: KnownProblem, seed: int, trials: int) -> tuple[FloatArray, float]:
    """Objectives in the order of the search, shape (<= trials, m), and the optimizer's own seconds."""
    optimizer, found, own, asked = make(known.problem, seed), [], 0.0, 0
    while asked < trials:
        began = time.perf_counter()
        candidates = optimizer.ask(min(BATCH, trials - asked))
        own += time.perf_counter() - began
        if not len(candidates):
            break
        asked += len(candidates)
        evaluations = known.evaluate(candidates)
        found.append(evaluations.objectives)
        began = time.perf_counter()
        optimizer.tell(evaluations)
        own += time.perf_counter() - began
    return np.concatenate(found), own


def volumes(known: KnownProblem, objectives: FloatArray, shown: Sequence[int]) -> list[float]:
    """Share of the box between no loss at the lowest cost of the budget range, and uniform pruning there at the limits.

    What costs less than the budget range asks for counts as if it cost that much.
    """
    low, high = known.problem.budget_range.T
    uniform = uniform_seeds(known.problem, (float((low / high).max()),))[-1:]
    scale = np.concatenate([known.loss(uniform), high])
    floor = np.concatenate([[0.0], low / high])
    points, reference = np.maximum(objectives / scale, floor), np.concatenate([[1.0], np.full(len(low), 1.0 + 1e-9)])
    box = float(np.prod(reference - floor))
    return [hypervolume(points[:n], reference) / box for n in shown]


def interval(values: Sequence[float]) -> str:
    """Mean with half of its 95 % interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--optimizers", nargs="+", choices=COMPARED, default=list(COMPARED))
    chosen = parser.parse_args()
    results: dict[str, Any] = {"environment": environment(COMMAND)}
    rows = []
    for problem in chosen.problems:
        found: dict[str, list[list[float]]] = {}
        for name in chosen.optimizers:
            seconds, found[name] = 0.0, []
            seeds = range(chosen.first_seed, chosen.first_seed + min(chosen.seeds, FEWER_SEEDS.get(name, chosen.seeds)))
            for seed in seeds:
                known = PROBLEMS[problem](seed)
                objectives, own = run(COMPARED[name], known, seed, SHOWN[-1])
                seconds += own
                found[name].append(volumes(known, objectives, SHOWN))
            last = [volume[-1] for volume in found[name]]
            against = [a - b[-1] for a, b in zip(last, found[chosen.optimizers[0]], strict=False)]
            means = [interval(column) for column in zip(*found[name], strict=True)]
            milliseconds = 1e3 * seconds / (len(seeds) * SHOWN[-1])
            rows.append([problem, name, len(seeds), *means, interval(against), f"{milliseconds:.1f}"])
            print(*rows[-1], sep=" | ", flush=True)
        results[problem] = found
    header = ["problem", "optimizer", "seeds", *(f"after {n}" for n in SHOWN), f"- {chosen.optimizers[0]}", "ms each"]
    explained = (
        "Hypervolume (0 to 1, higher is better) after so many evaluations, mean over seeds with its 95 % interval; the "
        "difference to the first optimizer after all of them, paired by seed; and the optimizer's own time for each "
        f"candidate, asked for {BATCH} at a time. Seeds from 100 on were used for tuning."
    )
    if sys.argv[1:]:
        print(table(header, rows))
    else:
        write(
            "known_problems",
            "Optimizers on problems with known answers",
            results,
            f"{explained}\n\n{table(header, rows)}",
        )


if __name__ == "__main__":
    main()
