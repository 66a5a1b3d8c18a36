"""Memory that a further worker of a search in processes takes, as a share of the model's.

Run ``python -m benchmarks.execution.worker_memory`` from the root of the repository (Linux; about 10 minutes); names of
networks repeat these alone. Each network is searched in a process of its own with three workers and the default
evaluator. A worker's own memory is what would be free if it ended: the private pages of ``/proc/PID/smaps_rollup``,
clean and dirty. Pages that it shares with other processes, such as those of mapped files, are not among them. They are
read when a worker is prepared and waits, after the last candidate, and every 20 ms while candidates are evaluated: that
peak holds the candidate's weights and activations, too. Without memory-mapped files a worker would hold model, samples
and moments once more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import autoprune
from autoprune.evaluators import Context, Evaluator
from autoprune.execution import PoolExecutor
from benchmarks.evaluators.search_cost import Encoder
from benchmarks.execution.large_inputs import data, plain, wide_convolutions
from benchmarks.support.common import RESULTS, environment, table, write

COMMAND = "python -m benchmarks.execution.worker_memory"
STORED = RESULTS / "worker_memory.json"
AIM = 0.2
WORKERS, TRIALS, SAMPLES = 3, 12, 64
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


class Watched:
    """The pool of a search, whose processes are looked at."""

    name = "processes"
    threads: int | None = 1

    def __init__(self) -> None:
        self._pool = PoolExecutor(WORKERS)
        self.submit, self.room, self.gather = self._pool.submit, self._pool.room, self._pool.gather
        self.prepared: list[dict[str, float]] = []
        self.after: list[dict[str, float]] = []
        self.peaks: dict[int, float] = {}
        self._over = threading.Event()

    def start(self, evaluator: Evaluator, context: Context, fresh: Evaluator) -> None:
        self._pool.start(evaluator, context, fresh)
        self._pool.ready()
        time.sleep(1.0)
        self.prepared = [pages(pid) for pid in self._pool.processes]
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        time.sleep(1.0)
        self.after = [pages(pid) for pid in self._pool.processes]
        self._pool.stop()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            for pid in self._pool.processes:
                self.peaks[pid] = max(self.peaks.get(pid, 0.0), pages(pid)["private"])


def measure(name: str) -> dict[str, Any]:
    """One search, and what its workers held, in megabytes: the mean of them, the largest for peaks."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, samples = NETWORKS[name]
    model, executor = make().eval(), Watched()
    size = sum(parameter.nbytes for parameter in model.parameters()) / MEGABYTE
    result = autoprune.search(
        model,
        "flops <= 50%",
        samples(),
        trials=TRIALS,
        execution=autoprune.Execution(executor=executor, progress=False),
    )
    assert result.front
    row: dict[str, Any] = {"network": name, "model": size, "peak": max(executor.peaks.values())}
    for moment, found in (("prepared", executor.prepared), ("after", executor.after)):
        row |= {f"{moment}: {key}": float(np.mean([each[key] for each in found])) for key in found[0]}
    return row


def report(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        own = [row[key] for key in ("prepared: private", "after: private", "peak")]
        shares = [f"{value:.0f} MB ({value / row['model']:.0%})" for value in own]
        lines.append([row["network"], f"{row['model']:.0f} MB", *shares, f"{row['after: resident']:.0f} MB"])
    columns = ["network", "parameters", "prepared", "after the last candidate", "peak in an evaluation", "resident"]
    return (
        f"Memory of a further worker that no other process shares, of {WORKERS} workers, and as a share of the "
        f"parameters. The aim is less than {AIM:.0%} for a worker that waits. *Resident* is what tools show: it counts "
        f"the pages of mapped files in every process that reads them.\n\n{table(columns, lines)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=[*NETWORKS])
    parser.add_argument("--measure", action="store_true", help="one network in this process, printed as JSON")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.networks[0])))
        return
    where = environment(COMMAND)
    rows = json.loads(STORED.read_text())["rows"] if STORED.exists() else []
    for name in given.networks:
        command = [sys.executable, "-m", "benchmarks.execution.worker_memory", "--measure", name]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows = [row for row in rows if row["network"] != name] + [json.loads(printed.splitlines()[-1])]
        print(rows[-1], flush=True)
        write("worker_memory", "Memory of a further worker", {"environment": where, "rows": rows}, report(rows))


if __name__ == "__main__":
    main()
