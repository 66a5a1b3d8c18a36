"""Kill the driver of a search at random moments, again and again, and compare with the search left alone.

Run ``python -m benchmarks.execution.kill`` from the root of the repository (about 20 minutes); exits with 1 when
anything is lost, doubled or changed. ``--kills 0`` or ``--moments 0`` leaves out one of its two parts. Each run is a
real search in a process of its own, killed with SIGKILL, started again with ``resume=True``, killed again, and then
left to its end. The first three kinds are killed some milliseconds after a number of finished trials drawn at random;
those of `benchmarks.execution.kill_modes` at any moment of their time, which may be while a supernet is trained,
latencies are measured, or the front is verified.

- local, and synchronous workers of Ray: every resumed search must end with the candidates, scores and front of the one
  left alone.
- every kind of `benchmarks.execution.kill_modes`: the same, held-out scores and verified costs included.
- asynchronous workers of Ray: what was recorded must be there unchanged, and what was pending is evaluated once.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import autoprune
from autoprune.execution import Executor, RayExecutor
from autoprune.journal.journal import Journal
from autoprune.journal.rows import TrialRow
from autoprune.journal.sqlite_file import FILE_NAME
from benchmarks.execution import kill_modes
from benchmarks.support.common import environment, table, write
from zoo import ZOO

COMMAND = "python -m benchmarks.execution.kill"
KILLS, TRIALS = 20, 60
MOMENTS = 50
LOCAL, ASYNCHRONOUS, SYNCHRONOUS = "local", "ray", "ray-synchronous"
DELAY_SECONDS = 0.05  # at most, after the trial that a kill waits for
Row = tuple[str, int, int, str, str]


def search(run_dir: str | None, executor: str | Executor = "local") -> autoprune.SearchResult:
    x = torch.randn(240, 64, generator=torch.Generator().manual_seed(0))
    return autoprune.search(
        ZOO["mlp"].build(),
        "flops <= 50%",
        (x, x[:, :10].argmax(1)),
        trials=TRIALS,
        execution=autoprune.Execution(executor=executor, run_dir=run_dir, resume=run_dir is not None, progress=False),
    )


def child(run_dir: str, executor: str) -> None:
    torch.set_num_threads(1)
    print("ready", flush=True)
    if executor in kill_modes.MODES:
        kill_modes.run(run_dir, executor)
        return
    search(run_dir, LOCAL if executor == LOCAL else RayExecutor(workers=2, synchronous=executor == SYNCHRONOUS))


def start(run_dir: Path, executor: str) -> subprocess.Popen[str]:
    """Begin or resume a search in a process of its own, past its imports."""
    call = [sys.executable, "-m", "benchmarks.execution.kill", "--child", str(run_dir), "--executor", executor]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def recorded(run_dir: Path) -> list[TrialRow]:
    if not (run_dir / FILE_NAME).exists():
        return []
    with Journal.open(run_dir) as journal:
        return journal.trials()


def seen(rows: list[TrialRow]) -> list[tuple[object, ...]]:
    """Parts that must not change: candidates, costs, and every number measured."""
    return [
        (row.id, row.candidate, row.costs, row.status, *((e.signal, e.metric, e.distortion) for e in row.evaluations))
        for row in rows
    ]


def kept(before: list[TrialRow], after: list[TrialRow]) -> bool:
    """Return whether the rows of one process are a prefix of those of the next, with at most pending trials settled."""
    return [row.candidate for row in before] == [row.candidate for row in after[: len(before)]] and all(
        seen([old]) == seen([new]) for old, new in zip(before, after, strict=False) if old.evaluations
    )


def finished(run_dir: Path) -> int:
    return sum(bool(row.evaluations) for row in recorded(run_dir))


def killed_run(run_dir: Path, executor: str, rng: np.random.Generator) -> tuple[list[int], bool]:
    """Trials finished at each of two kills, and whether nothing was lost, doubled or changed."""
    counts, sound, before = [0], True, recorded(run_dir)
    for _ in range(2):
        process, wanted = start(run_dir, executor), rng.integers(min(counts[-1], TRIALS - 1), TRIALS)
        while finished(run_dir) < wanted:
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, DELAY_SECONDS))
        os.killpg(process.pid, signal.SIGKILL)  # the driver, and the Ray that it started
        end(process)
        after = recorded(run_dir)
        sound &= kept(before, after)
        counts.append(finished(run_dir))
        before = after
    end(start(run_dir, executor))
    after = recorded(run_dir)
    once = [len(row.evaluations) for row in after] == [1] * TRIALS
    return counts[1:], sound and kept(before, after) and once and len({row.candidate for row in after}) == TRIALS


def killed_at_any_moment(run_dir: Path, mode: str, rng: np.random.Generator, seconds: float) -> tuple[list[int], bool]:
    """Trials finished at each of two kills, and whether nothing recorded was lost or changed."""
    counts, sound, before = [], True, recorded(run_dir)
    for moment in kill_modes.moments(rng, seconds):
        process = start(run_dir, mode)
        ended = kill_modes.wait(moment, lambda process=process: process.poll() is not None)
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
        end(process)
        after = recorded(run_dir)
        sound &= kept(before, after)
        counts.append(finished(run_dir))
        before = after
    end(start(run_dir, mode))
    return counts, sound and kept(before, recorded(run_dir))


def modes(folder: Path, kills: int, chosen: str | None) -> list[Row]:
    """A row for each run of every mode of `kill_modes`, in turn."""
    rng, rows = np.random.default_rng(1), []
    names = [name for name in kill_modes.MODES if chosen in (None, name)]
    wholes, seconds = {}, {}
    for name in names:
        run_dir = folder / f"whole {name}"
        process = start(run_dir, name)
        began = time.monotonic()
        end(process)
        seconds[name] = time.monotonic() - began
        wholes[name] = kill_modes.end_of(run_dir)
        assert wholes[name] is not None, f"the search left alone did not end: {name}"
    for i in range(kills // 2):
        name = names[i % len(names)]
        run_dir = folder / str(i)
        (first, second), sound = killed_at_any_moment(run_dir, name, rng, seconds[name])
        same = kill_modes.end_of(run_dir) == wholes[name]
        rows.append((name, first, second, "yes" if sound else "NO", "yes" if same else "NO"))
        print(rows[-1], flush=True)
    return rows


def at_trials(kills: int, chosen: str | None) -> tuple[list[Row], bool]:
    """A row for each run killed after a number of trials, and whether all targets are met."""
    rng, rows, met = np.random.default_rng(0), [], True
    some = kills // 5
    for executor, wanted in ((LOCAL, kills), (ASYNCHRONOUS, some), (SYNCHRONOUS, some)):
        if chosen not in (None, executor):
            continue
        with tempfile.TemporaryDirectory() as folder:
            end(start(Path(folder, "whole"), executor))
            whole = recorded(Path(folder, "whole"))
            for i in range(wanted // 2):
                run_dir = Path(folder, str(i))
                (first, second), sound = killed_run(run_dir, executor, rng)
                same = seen(recorded(run_dir)) == seen(whole)
                met &= sound and (same or executor == ASYNCHRONOUS)
                rows.append((executor, first, second, "yes" if sound else "NO", "yes" if same else "no"))
                print(rows[-1], flush=True)
    return rows, met


def report(name: str, title: str, where: dict[str, Any], rows: list[Row], met: bool, note: str, whole: bool) -> None:
    """Write the results of one part, or show them where it was not run as a whole."""
    header = ("kind", "finished at the first kill", "at the second", "none lost or changed", "as left alone")
    text = f"{2 * len(rows)} kills. {note}\n\n{table(header, rows)}\n\nTargets {'met' if met else 'NOT met'}."
    if whole:
        write(name, title, {"environment": where, "met": met, "rows": rows}, text)
    else:
        print(text)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--kills", type=int, default=KILLS, help="for the local search; a fifth of it on Ray, either way; 0: this not"
    )
    parser.add_argument(
        "--moments", type=int, default=MOMENTS, help="kills at any moment, over all of the other kinds; 0: this not"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    at_trials_kinds = (LOCAL, ASYNCHRONOUS, SYNCHRONOUS)
    parser.add_argument("--executor", choices=(*at_trials_kinds, *kill_modes.MODES), help="one kind; by default all")
    options = parser.parse_args()
    if options.child:
        child(options.child, options.executor)
        return 0
    torch.set_num_threads(1)
    met = True
    if options.kills and options.executor in (None, *at_trials_kinds):
        where = environment(f"{COMMAND} --moments 0")
        rows, good = at_trials(options.kills, options.executor)
        note = (
            f"{TRIALS} trials a search. An asynchronous search depends on who is faster, so it need not end as the one "
            "left alone does."
        )
        whole = (options.kills, options.executor) == (KILLS, None)
        report("kill", "Drivers killed after a number of trials", where, rows, good, note, whole)
        met &= good
    if options.moments and options.executor in (None, *kill_modes.MODES):
        where = environment(f"{COMMAND} --kills 0")
        with tempfile.TemporaryDirectory() as folder:
            rows = modes(Path(folder), options.moments, options.executor)
        good = all(row[3:] == ("yes", "yes") for row in rows)
        note = f"{kill_modes.TRIALS} trials a search; held-out scores and verified costs are compared, too."
        whole = (options.moments, options.executor) == (MOMENTS, None)
        report("kill_moments", "Drivers killed at any moment", where, rows, good, note, whole)
        met &= good
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
