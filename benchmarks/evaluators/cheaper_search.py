"""Racing and shared computation together: what they leave of the work of a search, and what becomes of its front.

Run ``python -m benchmarks.evaluators.cheaper_search`` from the root of the repository. A trained network is searched
twice with every seed: with both, and with neither. Multiply-accumulates are counted as evaluations execute them,
calibration included; the hypervolume is that of the front on validation data, from the loss and the FLOPs of the
uniform pruning that both searches begin with. Rows are kept, and those that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import autoprune
from autoprune.evaluators import AdaptiveBN, Context, Evaluator
from autoprune.evaluators.activation_cache.limits import ROOM_BYTES
from autoprune.pareto import hypervolume
from autoprune.protocols import OK, Failure, IntArray, Measurement
from autoprune.result import SearchResult
from benchmarks.support.common import RESULTS, environment, table, write
from benchmarks.support.trained import Trained, trained

COMMAND = "python -m benchmarks.evaluators.cheaper_search"
OPTIMIZERS = ("random", "level_switch")
STORED = RESULTS / "cheaper_search.json"
BUDGET = 0.5
SEEDED = 3  # trials that every search begins with: uniform pruning


class Counting:
    """An evaluator that counts the multiply-accumulates of its evaluations."""

    def __init__(self, share_bytes: int) -> None:
        self._own, self.macs = AdaptiveBN(share_bytes=share_bytes), 0

    def prepare(self, context: Context) -> None:
        self._own.prepare(context)
        self.order, self.release, self.test = self._own.order, self._own.release, self._own.test
        self.build = self._own.build

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        with FlopCounterMode(display=False) as counter:
            found = self._own.evaluate(candidates, chunk)
        self.macs += counter.get_total_flops() // 2
        return found


def search(case: Trained, seed: int, trials: int, optimizer: str, evaluator: Evaluator, racing: bool) -> SearchResult:
    """A search at half of the FLOPs."""
    data = autoprune.Data(calibration=case.data["train"], validation=case.data["validation"], test=case.data["test"])
    return autoprune.search(
        case.model,
        f"flops <= {BUDGET:.0%}",
        data,
        evaluator=evaluator,
        optimizer=optimizer,
        early_stopping=racing,
        trials=trials,
        seed=seed,
        execution=autoprune.Execution(progress=False),
    )


def volume(result: SearchResult) -> float:
    """Hypervolume of the front, by loss and FLOPs."""
    started = [trial for trial in result.trials if trial.id < SEEDED]
    front = np.array([[t.signal, t.costs["flops"]] for t in result.trials if t.status == OK and t.feasible])
    reference = np.array([max(t.signal for t in started), max(t.costs["flops"] for t in started) * (1 + 1e-9)])
    return hypervolume(front, reference)


def compare(case: Trained, seed: int, trials: int, optimizer: str, timed: bool) -> dict[str, Any]:
    """One search with neither and one with both: counted, and again to be timed if that is wanted."""
    ways = {"plain": (0, False), "both": (ROOM_BYTES, True)}
    macs, volumes, samples, seconds = {}, {}, {}, {}
    for name, (memory, racing) in ways.items():
        counting = Counting(memory)
        result = search(case, seed, trials, optimizer, counting, racing)
        macs[name], volumes[name] = counting.macs, volume(result)
        samples[name] = sum(trial.evaluations[-1].samples for trial in result.trials)
        if timed:
            began = time.perf_counter()
            search(case, seed, trials, optimizer, AdaptiveBN(share_bytes=memory), racing)
            seconds[name] = time.perf_counter() - began
    wall = seconds["both"] / seconds["plain"] if timed else None
    found = {"macs": macs, "volume": volumes, "samples": samples}
    shares = {name: value["both"] / value["plain"] for name, value in found.items()}
    return {"optimizer": optimizer, "seed": seed, "trials": trials, "wall": wall} | shares


def report(rows: list[dict[str, Any]], name: str, trials: int) -> str:
    lines = []
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
        own = [row for row in rows if row["optimizer"] == optimizer]
        walls = [row["wall"] for row in own if row["wall"] is not None]

        def each(key: str, own: list[dict[str, Any]] = own) -> str:
            values = [row[key] for row in own]
            return f"{np.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"

        wall = f"{np.mean(walls):.1%}" if walls else ""
        lines.append([optimizer, len(own), each("macs"), each("samples"), each("volume"), wall])
    header = ["optimizer", "seeds", "MACs executed", "validation samples", "hypervolume of the front", "wall time"]
    return (
        f"{name}, {trials} trials at half of the FLOPs, adaptive batch norm, racing at delta 0.05 and 1 GiB to share. "
        f"Shares of what a search takes and reaches with neither: means over seeds (lowest to highest). The aim is at "
        f"most 50 % of the MACs at 99 % of the hypervolume or more.\n\n{table(header, lines)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--timed", type=int, default=1, help="seeds whose searches run once more, to be timed")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--network", default="resnet20")
    given = parser.parse_args()
    torch.set_num_threads(1)
    where = environment(f"{COMMAND} --seeds {given.seeds} --trials {given.trials} --network {given.network}")
    case = trained(given.network, 0)
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    rows = stored["rows"] if (stored.get("case"), stored.get("trials")) == (case.name, given.trials) else []
    for seed in range(given.seeds):
        for optimizer in given.optimizers:
            if not any((row["optimizer"], row["seed"]) == (optimizer, seed) for row in rows):
                rows.append(compare(case, seed, given.trials, optimizer, seed < given.timed))
                found = {"environment": where, "case": case.name, "trials": given.trials, "rows": rows}
                write("cheaper_search", "A cheaper search", found, report(rows, case.name, given.trials))


if __name__ == "__main__":
    main()
