"""Memory that a further worker of a search in processes takes, as a share of the model's.

Run ``python -m benchmarks.execution.worker_memory`` from the root of the repository (Linux; a few minutes of processor
time); names of networks repeat these alone, ``--before PATH`` measures another checkout, too. For each network a
process of its own starts a pool of three workers with the default evaluator, which score candidates of about half of
the widths. A worker's own memory is what would be free if it ended: the private pages of ``/proc/PID/smaps_rollup``,
clean and dirty. Pages that it shares with other processes, such as those of mapped files, are not among them. They are
read when a worker is prepared, after its last candidate, and every 20 ms while candidates are evaluated: that peak
holds the candidate's weights and activations, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autoprune.evaluators import Compensated, Context
from autoprune.execution import PoolExecutor
from autoprune.protocols import Failure
from autoprune.testing.contexts import context_of
from benchmarks.evaluators.search_cost import Encoder
from benchmarks.execution.large_inputs import data, plain, wide_convolutions
from benchmarks.support.common import RESULTS, environment, table, write

COMMAND = "python -m benchmarks.execution.worker_memory"
STORED = RESULTS / "worker_memory.json"
AIM = 0.2
ROOT = Path(__file__).parents[2]
WORKERS, CANDIDATES, GENERATION, SAMPLES = 3, 16, 8, 64
MEGABYTE = 2**20


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 64, (SAMPLES, 32), generator=draw), torch.randint(0, 8, (SAMPLES,), generator=draw)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "linear layers": (lambda: plain(11, width=2_900, inputs=64), lambda: data(SAMPLES, 64)),
    "convolutions": (wide_convolutions, lambda: data(SAMPLES // 2, 3, 4, 4)),
    "transformer": (lambda: Encoder(width=1_024, heads=16, inner=4_096, depth=8), tokens),
}


def pages(pid: int) -> dict[str, float]:
    """Megabytes of a process by ``smaps_rollup``: resident, its share of shared pages, and private."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    found = {key: int(value.split()[0]) / 1024 for key, value in (line.split(":") for line in lines)}
    private = found["Private_Clean"] + found["Private_Dirty"]
    return {"resident": found["Rss"], "proportional": found["Pss"], "private": private}


def measure(name: str) -> dict[str, Any]:
    """Measure the workers of a pool, in megabytes: the mean of them, for the peak the largest."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, samples = NETWORKS[name]
    model = make().eval()
    size = sum(parameter.nbytes for parameter in model.parameters()) / MEGABYTE
    context = context_of(model, samples())
    evaluator, pool = Compensated(), PoolExecutor(WORKERS)
    evaluator.prepare(context)
    pool.start(evaluator, context, Compensated())
    peaks: dict[int, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            for pid in pool.processes:
                peaks[pid] = max(peaks.get(pid, 0.0), pages(pid)["private"])

    pool.ready()
    time.sleep(1.0)
    prepared = [pages(pid) for pid in pool.processes]
    watcher = threading.Thread(target=watch)
    watcher.start()
    evaluate(pool, context)
    over.set()
    watcher.join()
    time.sleep(1.0)
    after = [pages(pid) for pid in pool.processes]
    pool.stop()
    row: dict[str, Any] = {"network": name, "model": size, "peak": max(peaks.values())}
    for moment, found in (("prepared", prepared), ("after", after)):
        row |= {f"{moment}: {key}": float(np.mean([each[key] for each in found])) for key in found[0]}
    return row


def evaluate(pool: PoolExecutor, context: Context) -> None:
    """Score random candidates of a third to two thirds of the options."""
    sizes = context.space.sizes
    rng = np.random.default_rng(0)
    for first in range(0, CANDIDATES, GENERATION):
        drawn = context.space.canonical(rng.integers(sizes // 3, 2 * sizes // 3 + 1, (GENERATION, len(sizes))))
        pool.submit(list(range(first, first + GENERATION)), drawn, [None] * GENERATION)
        done = 0
        while done < GENERATION:
            for finished in pool.gather():
                assert not isinstance(finished.outcome, Failure), finished.outcome.reason
                done += 1


def in_process(name: str, code: Path) -> dict[str, Any]:
    """Measure a network with the autoprune of a checkout, in a process of its own."""
    call = [sys.executable, "-P", str(Path(__file__).resolve()), "--measure", name]
    environ = {**os.environ, "PYTHONPATH": str(code.resolve()), "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(call, cwd=code, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def report(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        own = [row[key] for key in ("prepared: private", "after: private", "peak")]
        shares = [f"{value:.0f} MB ({value / row['model']:.0%})" for value in own]
        lines.append(
            [row["network"], row["code"], f"{row['model']:.0f} MB", *shares, f"{row['after: resident']:.0f} MB"]
        )
    moments = ["prepared", "between candidates", "peak in an evaluation", "resident"]
    return (
        f"Memory of a further worker that no other process shares, of {WORKERS} workers, and as a share of the "
        f"parameters. The aim is less than {AIM:.0%} for a worker that evaluates nothing. *Resident* is what tools "
        "show: it counts the pages of mapped files, and those since a fork, in every process that reads them.\n\n"
        f"{table(['network', '', 'parameters', *moments], lines)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=[*NETWORKS])
    parser.add_argument("--before", type=Path, help="another checkout that is measured, too")
    parser.add_argument("--measure", choices=NETWORKS, help="one network in this process, printed as JSON")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    where = environment(COMMAND)
    codes = {**({"before": given.before} if given.before else {}), "now": ROOT}
    rows = json.loads(STORED.read_text())["rows"] if STORED.exists() else []
    for name, code in product(given.networks, codes):
        rows = [row for row in rows if (row["network"], row["code"]) != (name, code)]
        rows.append({"code": code, **in_process(name, codes[code])})
        print(rows[-1], flush=True)
        write("worker_memory", "Memory of a further worker", {"environment": where, "rows": rows}, report(rows))


if __name__ == "__main__":
    main()
