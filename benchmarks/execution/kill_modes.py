"""Searches that `benchmarks.execution.kill` kills at any moment: what each does before, between and after its trials.

Each ends with a file that says everything that must not depend on how often it was killed. Latencies are those of a
machine of known speed (`tests.machine`), so that they are the same whenever they are measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import autoprune
from autoprune.costs.latency import profile
from autoprune.evaluators import FineTune, Supernet
from autoprune.files.access import write_text
from tests.machine import Machine
from zoo import ZOO

TRIALS = 24
END = "end.json"
Options = Mapping[str, Any]


def _supernet(run_dir: Path) -> Options:
    return {
        "evaluator": Supernet(steps=60, batch_size=32, checkpoint=run_dir / "supernet.safetensors", checkpoint_steps=5)
    }


MODES: dict[str, Callable[[Path], Options]] = {
    "local, moments": lambda run_dir: {},
    "supernet": _supernet,
    "racing": lambda run_dir: {"early_stopping": True, "optimizer": "nsga2"},
    "fine-tune": lambda run_dir: {"evaluator": FineTune(steps=4)},
    "bayes": lambda run_dir: {"optimizer": "bayes"},
    "latency profiling and verification": lambda run_dir: {"budget": "latency <= 93%"},
}


def run(run_dir: str, mode: str) -> None:
    """Begin or go on with the search of a mode in a folder, and write its end there."""
    import autoprune.study.verification as verification

    if "latency" in mode:
        for module in (profile, verification):
            module.clock_for = lambda *args: Machine(cold=1.2, per_pass=2e-5)  # type: ignore[attr-defined]  # a name they import
    x = torch.randn(240, 64, generator=torch.Generator().manual_seed(0))
    options = {"budget": "flops <= 50%", **MODES[mode](Path(run_dir))}
    result = autoprune.search(
        ZOO["mlp"].build(),
        options.pop("budget"),
        (x, x[:, :10].argmax(1)),
        trials=TRIALS,
        execution=autoprune.Execution(run_dir=run_dir, resume=True, progress=False),
        **options,
    )
    trials = [[t.id, t.candidate, t.score, t.signal, t.distortion, dict(t.costs), t.status] for t in result.trials]
    front = [[t.id, t.test_score, dict(t.costs), dict(t.predicted)] for t in result.front]
    write_text(Path(run_dir) / END, json.dumps({"trials": trials, "front": front, "dense": result.dense.test_score}))


def end_of(run_dir: Path) -> Any:
    """Read the file of a search that has ended; None before."""
    return json.loads((run_dir / END).read_text()) if (run_dir / END).exists() else None


def moments(rng: np.random.Generator, seconds: float) -> tuple[float, float]:
    """Draw two times to kill a search of this length: the second in the remaining time, on average."""
    first = rng.uniform(0.0, seconds)
    return first, rng.uniform(0.0, max(seconds - first / 2, 0.2))


def wait(seconds: float, ended: Callable[[], bool]) -> bool:
    """Let time pass; true if the search ended before."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if ended():
            return True
        time.sleep(0.002)
    return False
