"""Common parts of the benchmarks: the description of the machine, and the writing of results."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

RESULTS = Path(__file__).parents[1] / "results"


def environment(command: str) -> dict[str, Any]:
    """Describe the conditions that figures depend on; `command` repeats them."""
    return {
        "command": command,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(name: str, title: str, results: Mapping[str, Any], text: str) -> None:
    """Write ``results/<name>.json`` and ``.md``, and show the latter."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    where = results["environment"]
    machine = (
        f"`{where['command']}` on {where['cpu']}, {where['cores']} cores (load {where['load_1min']} at the start), "
        f"{where['threads']} thread, Python {where['python']}, torch {where['torch']}, numpy {where['numpy']}."
    )
    report = f"# {title}\n\n{machine}\n\n{text}\n"
    (RESULTS / f"{name}.md").write_text(report)
    print(report)


def interval(differences: Sequence[float] | np.ndarray) -> str:
    """Mean and 95 % t-interval of differences between shares, in points."""
    mean, error = 100 * np.mean(differences), 100 * stats.sem(differences)
    low, high = stats.t.interval(0.95, len(differences) - 1, mean, error) if error else (mean, mean)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
