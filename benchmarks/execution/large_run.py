"""Ten thousand trials in a hundred dimensions: size of the journal, memory of the driver, time to resume.

Run ``python -m benchmarks.execution.large_run`` from the root of the repository (Linux; about 5 minutes, most of them
`auto`); exits with 1 when a target is missed. Each optimizer runs in a process of its own, on 64 simulated workers that
take no time, with one value in place of one for each sample. Memory is the peak of the search over what the process
held after a search of 100 trials, which has imported what there is to import. Resuming is a search of 8 more trials,
tracing of the model included. Both are given in processor time of the driver.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from autoprune.execution import Execution
from autoprune.journal.sqlite_file import FILE_NAME
from benchmarks.execution.simulated import SimulatedWorkers, search
from benchmarks.support.common import environment, table, write

COMMAND = "python -m benchmarks.execution.large_run"
OPTIMIZERS = ("random", "nsga2", "level_switch", "auto")
TRIALS, DIMENSIONS, MORE, WARM = 10_000, 100, 8, 100
MOST = {"journal_mb": 50.0, "memory_mb": 200.0, "resume_seconds": 30.0}


def at_once() -> float:
    return 0.0


def resident_mb(which: str) -> float:
    """Memory of this process: ``VmRSS`` is what it holds, ``VmHWM`` the most that it held."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def measure(optimizer: str, trials: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    options = {"optimizer": optimizer, "seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        search(DIMENSIONS, trials=WARM, execution=Execution(run_dir=f"{folder}/warm", progress=False), **options)
        before = resident_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        began, workers = time.perf_counter(), SimulatedWorkers(64, at_once)
        result = search(
            DIMENSIONS,
            trials=trials,
            execution=Execution(executor=workers, run_dir=f"{folder}/run", progress=False),
            **options,
        )
        seconds, peak = time.perf_counter() - began, resident_mb("VmHWM")
        size = sum(file.stat().st_size for file in Path(folder, "run").iterdir() if file.name.startswith(FILE_NAME))
        found = [trial.candidate for trial in result.trials]
        del result
        began = time.process_time()
        more = search(
            DIMENSIONS,
            trials=trials + MORE,
            execution=Execution(run_dir=f"{folder}/run", resume=True, progress=False),
            **options,
        )
        resumed = time.process_time() - began
    assert [trial.candidate for trial in more.trials[:trials]] == found
    assert len({trial.candidate for trial in more.trials}) == trials + MORE
    return {
        "journal_mb": size / 1e6,
        "memory_mb": peak - before,
        "resume_seconds": resumed,
        "search_seconds": seconds,
        "driver_seconds": workers.driver,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--only", help="one optimizer, measured in this process and printed as JSON")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.trials)))
        return 0
    where, found = environment(COMMAND), {}
    for name in OPTIMIZERS:
        call = [sys.executable, "-m", "benchmarks.execution.large_run", "--trials", str(options.trials), "--only", name]
        found[name] = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
        print(name, found[name], flush=True)
    met = all(row[name] <= most for row in found.values() for name, most in MOST.items())
    rows = [
        (
            name,
            f"{row['journal_mb']:.1f}",
            f"{row['memory_mb']:.0f}",
            f"{row['resume_seconds']:.1f}",
            f"{row['driver_seconds']:.0f}",
        )
        for name, row in found.items()
    ]
    header = ("optimizer", "journal, MB", "driver's extra memory, MB", "resume, s", "the search, s")
    verdict = f"Targets (below 50 MB, 200 MB and 30 s) {'met' if met else 'NOT met'}."
    text = f"{options.trials:,} trials in {DIMENSIONS} dimensions.\n\n{table(header, rows)}\n\n{verdict}"
    if options.trials == TRIALS:
        write("large_run", "A large run", {"environment": where, "met": met, "optimizers": found}, text)
    else:
        print(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
