"""The worth of a search where widths matter: networks it finds next to uniform ones, before and after fine-tuning.

Run ``python -m benchmarks.evaluators.unsaturated`` from the root of the repository; it goes on where it stopped, a cell
at a time, and ends before a cell that would begin after ``--minutes``. At 15 and 5 % of the FLOPs each task of
`benchmarks.support.hard_tasks` is searched with the defaults and 100 candidates. Its rival is the candidate that this
search itself starts from: uniform widths at the budget, their units ranked by the criterion that the calibration check
chose, re-fitted in the same way. Both networks get the same fine-tune; both are judged on test samples before and after
it. Where no candidate is as small as the budget, the cell says how small the smallest is, and uses a limit just above.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import autoprune
from autoprune.errors import InfeasibleBudgetError
from autoprune.optimizers import Problem, uniform_seeds
from autoprune.protocols import IntArray
from autoprune.result import SearchResult
from autoprune.result.builders import FromEvaluator
from autoprune.testing.contexts import study_for
from benchmarks.support.common import RESULTS, environment, interval, table, write
from benchmarks.support.hard_tasks import TASKS, Task

COMMAND = "python -m benchmarks.evaluators.unsaturated"
STORED = RESULTS / "unsaturated.json"
SHARES, TRIALS, SEEDS = (0.15, 0.05), 100, 5
OURS, UNIFORM = "search", "uniform widths"
SLACK = 1.02
"""Limit where the budget is out of reach, over the cost of the cheapest candidate."""

Cell = dict[str, Any]


def cell(name: str, share: float, seed: int) -> Cell:
    """Test scores of both networks, before and after the fine-tune."""
    began = time.process_time()
    task = TASKS[name](seed)
    result, limit, why = searched(task, share, seed)
    builder = result._builder
    assert isinstance(builder, FromEvaluator)
    found = result.best()
    candidates = {OURS: np.array(found.candidate), UNIFORM: uniform_at(builder, limit)}
    dense = result.dense.costs["flops"]
    made: Cell = {"dense": task.judge(task.model), "limit": limit / dense, "why": why, "trials": len(result.trials)}
    made["search cpu seconds"] = time.process_time() - began
    for way, candidate in candidates.items():
        small = builder.evaluator.build(candidate)
        before = task.judge(small)
        autoprune.recover(small, recipe=task.recipe(seed))
        flops = float(builder.costs["flops"](candidate[None])[0]) / dense
        made[way] = {"flops": flops, "before": before, "after": task.judge(small)}
    made["cpu seconds"] = time.process_time() - began
    return made


def searched(task: Task, share: float, seed: int) -> tuple[SearchResult, float, str]:
    """A search with the defaults, its limit in FLOPs, and why that is not the budget, or nothing."""

    def search(budget: str) -> SearchResult:
        quiet = autoprune.Execution(progress=False)
        return autoprune.search(
            task.model, budget, task.data, metric=task.metric, trials=TRIALS, seed=seed, execution=quiet
        )

    try:
        result, why = search(f"flops <= {share:.0%}"), ""
    except InfeasibleBudgetError as error:
        study = study_for(task.model, "flops <= 100%", task.data, metric=task.metric, evaluator="adaptive_bn")
        least = float(study.costs["flops"](study.problem.sizes[None] - 1)[0])
        result, why = search(f"flops <= {SLACK * least:.0f}"), str(error)
    return result, result.limits["flops"], why


def uniform_at(builder: FromEvaluator, limit: float) -> IntArray:
    """The uniform candidate at a limit on FLOPs, shape (d,), as a search makes it for its start."""
    space = builder.context.space
    problem = Problem(
        sizes=space.sizes,
        cost_names=("flops",),
        limits=np.array([limit]),
        cost_function=lambda candidates: builder.costs["flops"](candidates)[:, None],
        ordered=np.array([dimension.ordered for dimension in space.dimensions]),
        canonical=space.canonical,
    )
    found: IntArray = uniform_seeds(problem)[-1]
    return found


def key_of(name: str, share: float, seed: int) -> str:
    return f"{name} | {share:.0%} | {seed}"


def stored() -> dict[str, Cell]:
    """Cells of earlier runs."""
    cells: dict[str, Cell] = json.loads(STORED.read_text())["cells"] if STORED.exists() else {}
    return cells


def report(cells: Mapping[str, Cell]) -> tuple[str, list[str]]:
    """The report, and the comparisons after fine-tuning whose interval is not above 0."""
    rows, missed, limited = [], [], []
    for name in TASKS:
        for share in SHARES:
            some = [cells[key] for seed in range(SEEDS) if (key := key_of(name, share, seed)) in cells]
            if len(some) < 2:
                continue
            gains = {when: [each[OURS][when] - each[UNIFORM][when] for each in some] for when in ("before", "after")}
            scores = [
                " / ".join(f"{100 * np.mean([each[way][when] for each in some]):.1f}" for when in gains)
                for way in (UNIFORM, OURS)
            ]
            flops = [f"{100 * np.mean([each[way]['flops'] for each in some]):.1f}" for way in (UNIFORM, OURS)]
            dense = f"{100 * np.mean([each['dense'] for each in some]):.1f}"
            words = {when: interval(gain) for when, gain in gains.items()}
            rows.append([name, f"{share:.0%}", len(some), dense, " / ".join(flops), *scores, *words.values()])
            if "[+" not in words["after"]:
                missed.append(f"{name} at {share:.0%}: {words['after']} points")
            limited += sorted({f"{name} at {share:.0%}: {each['why']}" for each in some if each["why"]})[:1]
    header = ("task", "budget", "seeds", "dense", "FLOPs used", "uniform", "search", "gain before", "gain after")
    seconds = sum(each["cpu seconds"] for each in cells.values())
    parts = [
        "Test scores in percent before / after the same fine-tune, means over seeds (a draw of the data, a trained "
        "network, a search and a fine-tune each; torchcrepe and EfficientNet have one network): accuracy, for colours "
        "the share of the variance explained, for tones the share of pitches within a quarter of a tone, for "
        "EfficientNet agreement with the dense network. Gains of the search over uniform widths with the same "
        "re-fit and the same criterion, in points, with their paired 95 % interval (Student's t). FLOPs used: of both, "
        f"in percent of the dense network. {seconds:.0f} s of processor time.",
        table(header, rows),
    ]
    if missed:
        parts.append("No gain after fine-tuning that is certain:\n\n" + "\n".join(f"- {line}" for line in missed))
    if limited:
        parts.append("Budgets out of reach:\n\n" + "\n".join(f"- {line}" for line in limited))
    return "\n\n".join(parts), missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after this time")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--tasks", nargs="+", default=[""], help="only those whose name contains one of these")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    where, began = environment(COMMAND), time.monotonic()
    names = [name for name in TASKS if any(part in name for part in chosen.tasks)]
    for seed in range(chosen.seeds):
        for share in SHARES:
            for name in names:
                key = key_of(name, share, seed)
                if key in stored() or time.monotonic() - began > 60 * chosen.minutes:
                    continue
                made = cell(name, share, seed)
                STORED.write_text(json.dumps({"environment": where, "cells": {**stored(), key: made}}, indent=1))
                print(key, json.dumps(made), file=sys.stderr, flush=True)
    text, missed = report(stored())
    write(
        "unsaturated",
        "What a search adds where tasks are not saturated",
        {"environment": where, "cells": stored()},
        text,
    )
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
