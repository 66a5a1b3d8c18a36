"""Channels with depth against channels alone, on residual networks under budgets on measured latency, before training.

ResNet-20 and a pre-activation ResNet-38 on hard digits, at 50 and 35 % of the dense latency. Both spaces are searched
with as many trials, under one table of latencies; the networks found are measured next to the dense one, in turn.
Every cell is kept when it is done; cells that are there are not repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import autoprune
from autoprune.search_spaces import Channels, Depth, Product, Settings
from benchmarks.support.common import RESULTS, environment, interval, table, write
from benchmarks.support.trained import score, trained

NETWORKS = ("resnet20_wide", "preactivation_resnet38_wide")
SHARES = (0.5, 0.35)
SPACES: dict[str, Settings] = {"channels": Channels(), "channels and depth": Product(Channels(), Depth())}
BATCH, CALLS = 32, 30
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.evaluators.depth"


@torch.no_grad()
def relative_latency(small: nn.Module, dense: nn.Module, x: Tensor) -> float:
    """Median time of a small network as a share of the dense one's, of calls in turn."""
    seconds: list[list[float]] = [[], []]
    for _ in range(CALLS):
        for model, kept in zip((small, dense), seconds, strict=True):
            began = time.perf_counter()
            model(x)
            kept.append(time.perf_counter() - began)
    return float(np.median(seconds[0]) / np.median(seconds[1]))


@functools.cache
def latencies_of(network: str) -> autoprune.Latency:
    """Measured once, because times hardly depend on the weights."""
    given = trained(network, 0)
    return autoprune.profile(given.model, given.data["train"][0][:BATCH], batch=BATCH)


def searched(network: str, share: float, space: str, seed: int, trials: int) -> dict[str, Any]:
    """Accuracy and loss on held-out digits of the best network that a search finds, and its time."""
    given = trained(network, seed)
    x = given.data["train"][0][:BATCH]
    result = autoprune.search(
        given.model,
        f"latency <= {share:.0%}",
        autoprune.Data(calibration=given.data["train"], validation=given.data["validation"]),
        example=autoprune.Call(cost_batch=BATCH),
        costs={"latency_ms": latencies_of(network)},
        space=SPACES[space],
        trials=trials,
        seed=seed,
    )
    best = result.best()
    small = result.build(best)
    accuracy, loss = score(small, given.data["test"])
    dropped = sum(option == "dropped" for option in best.decoded.values())
    return {
        "accuracy": accuracy,
        "loss": loss,
        "latency": relative_latency(small, given.model, x),
        "flops": best.costs["flops"] / result.dense.costs["flops"],
        "dropped": dropped,
    }


def report(cells: dict[str, Any]) -> str:
    rows = []
    for network in NETWORKS:
        for share in SHARES:
            own = {space: _of(cells, network, share, space) for space in SPACES}
            both = sorted(set.intersection(*(set(found) for found in own.values())))
            if not both:
                continue
            row = [network, f"{share:.0%}"]
            for found in own.values():
                mean = {key: np.mean([found[seed][key] for seed in both]) for key in ("accuracy", "latency", "dropped")}
                row.append(f"{mean['accuracy']:.3f} ({mean['latency']:.0%}, {mean['dropped']:.1f} dropped)")
            plain, deep = own.values()
            gains = [deep[seed]["accuracy"] - plain[seed]["accuracy"] for seed in both]
            rows.append([*row, interval(gains) if len(gains) > 1 else f"{100 * gains[0]:+.1f}"])
    return (
        "Accuracy on held-out digits, before training; in brackets the latency measured next to the dense network, and "
        "the number of branches dropped. Last: difference in percentage points, with its 95 % interval over "
        "the seeds.\n\n" + table(["network", "latency", *SPACES, "difference"], rows)
    )


def _of(cells: dict[str, Any], network: str, share: float, space: str) -> dict[int, Any]:
    wanted = {"network": network, "share": share, "space": space}
    return {cell["seed"]: cell for cell in cells.values() if wanted.items() <= cell.items() and "error" not in cell}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = RESULTS / "depth.json"
    cells: dict[str, Any] = json.loads(kept.read_text())["cells"] if kept.exists() else {}
    for network in options.networks:
        for seed in range(options.seeds):
            for share in SHARES:
                for space in SPACES:
                    key = f"{network}, {share}, {space}, {seed}, {options.trials}"
                    if key in cells:
                        continue
                    try:
                        row = searched(network, share, space, seed, options.trials)
                    except autoprune.InfeasibleBudgetError as error:
                        row = {"error": str(error)}
                    cells[key] = row | {"network": network, "share": share, "space": space, "seed": seed}
                    write(
                        "depth",
                        "Channels with depth, under latency",
                        {"environment": environment(COMMAND), "cells": cells},
                        report(cells),
                    )


if __name__ == "__main__":
    main()
