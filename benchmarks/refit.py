"""What measuring on the way gains where a latency table is off.

``python -m benchmarks.refit`` searches trained networks under 35 % of the dense latency, with tables whose whole
networks look 7 % faster and 7 % slower than they are, as they do where something else ran while the dense network or
the others were measured; with and without measuring the front on the way. ``--quick`` for a look.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

import autoprune
from benchmarks.common import environment, interval, table, write
from benchmarks.latency import TRIALS, Timed, profiled

COMMAND = "python -m benchmarks.refit"
NETWORKS = ("resnet20_wide", "mobilenet_v2_wide")
BATCH, SHARE, SEEDS = 32, 0.35, (0, 1, 2)
OFF = (0.93, 1.07)  # what ratios to the dense network are multiplied by


def off_by(latency: autoprune.Latency, factor: float) -> autoprune.Latency:
    """The table as if every whole network had been measured so much slower, or faster."""
    evidence = replace(latency.evidence, ratio=latency.evidence.ratio * factor)
    return replace(latency, evidence=evidence, correction=None)  # type: ignore[arg-type]  # fitted anew


def searches(network: str, seeds: Sequence[int], trials: int) -> list[dict[str, Any]]:
    """A row for each seed, table and mode."""
    latency = profiled(network, BATCH)
    rows = []
    for seed, factor, refit in product(seeds, OFF, (False, True)):
        timed = Timed(network, seed, off_by(latency, factor))
        result = timed.search(f"latency <= {SHARE:.0%}", trials, seed, refit_latency=refit)
        row: dict[str, Any] = {"network": timed.name, "seed": seed, "off": factor, "refit": refit}
        missed = [trial for trial in result.trials if trial.predicted and not trial.feasible]
        row |= {"measured": sum(bool(trial.predicted) for trial in result.trials), "missed": len(missed)}
        try:
            best = result.best()
        except autoprune.InfeasibleBudgetError as error:
            row |= {"error": str(error)}
        else:
            (again,) = timed.measure(result, [best])
            row |= {"score": best.score, "test": best.test_score, "measured_again": again}
        rows.append(row)
        print(row, flush=True)
    return rows


def text_of(rows: list[dict[str, Any]]) -> str:
    cells, pairs = [], list(zip(rows[::2], rows[1::2], strict=True))
    for pair in pairs:
        shown = [
            row["error"] if "error" in row else f"{row['score']:.4f} ({row['test']:.4f}) in {row['measured_again']:.1%}"
            for row in pair
        ]
        counts = [f"{row['missed']} of {row['measured']}" for row in pair]
        cells.append((pair[0]["network"], f"{pair[0]['off'] - 1:+.0%}", *shown, *counts))
    both = [pair for pair in pairs if not any("error" in row for row in pair)]
    ahead = []
    for factor in OFF:
        own = [pair for pair in both if pair[0]["off"] == factor]
        gains = [interval([on[key] - without[key] for without, on in own]) for key in ("score", "test")]
        ahead.append(f"with a table that is {factor - 1:+.0%} off by {gains[0]} points ({gains[1]} held out)")
    header = [
        "network",
        "table off by",
        "at the end alone: accuracy (held out) in",
        "on the way too",
        "missed",
        "missed",
    ]
    return (
        f"Searches of {TRIALS} trials under {SHARE:.0%} of the dense latency at batch {BATCH}, on one thread. "
        f"Measuring on the way is ahead {' and '.join(ahead)}: mean and 95 % t-interval over networks and seeds. "
        "Missed: networks that were measured to be over the limit, of all that were measured.\n\n"
        + table(header, cells)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one network, two seeds, 30 trials; writes no file")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    began = environment(COMMAND)
    rows = [
        row
        for network in NETWORKS[: 1 if quick else None]
        for row in searches(network, SEEDS[: 2 if quick else None], 30 if quick else TRIALS)
    ]
    if quick:
        print(text_of(rows))
    else:
        results = {"environment": began, "rows": rows}
        write("refit", "Latency measured on the way", results, text_of(rows))


if __name__ == "__main__":
    main()
