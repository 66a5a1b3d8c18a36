"""Size of a report of many trials, and the time until a browser has drawn it.

``python -m benchmarks.execution.report_page``: 10,000 trials of 1,000 dimensions with 16 options each, drawn at random,
which hardly compresses: searches repeat options. Times are those of the page itself, from the start of navigation, in a
headless Chromium, median of five. Needs Chromium, its driver and selenium.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from autoprune.protocols import OK, Dimension
from autoprune.result import SearchResult, Trial
from autoprune.result.report import page_of
from autoprune.result.trials import find_front
from autoprune.search_spaces.channels import ChannelSpace
from tests.browser import Browser
from tests.reporting import made, outline_for

OPTIONS = tuple(range(64, 0, -4))
MB = 1e6


def large(trials: int, dimensions: int, seed: int = 0) -> SearchResult:
    """Make a result of random trials with as many options as cost and score allow; names as of a real network."""
    rng = np.random.default_rng(seed)
    kinds = ("q", "k", "v", "o", "gate", "up", "down", "norm")
    names = [f"model.layers.{j // 8}.block.{kinds[j % 8]}_proj" for j in range(dimensions)]
    space = ChannelSpace(
        dimensions=tuple(Dimension(name, OPTIONS) for name in names),
        groups=tuple((name, OPTIONS[0]) for name in names),
        order={name: tuple(range(OPTIONS[0])) for name in names},
    )
    weight = rng.integers(1_000, 90_000, dimensions)
    middle = rng.uniform(1, len(OPTIONS) - 2, (trials + 1, 1))  # networks of all sizes, each with options around one
    spread = rng.normal(middle, len(OPTIONS) / 4, (trials + 1, dimensions))
    chosen = np.clip(np.rint(spread), 0, len(OPTIONS) - 1).astype(np.int64)
    chosen[0] = 0
    for i in range(1, min(trials, dimensions // 2)):  # probes of single dimensions, for the heat map
        chosen[i] = 0
        chosen[i, 2 * i] = rng.integers(1, len(OPTIONS))
    kept = np.array(OPTIONS)[chosen]
    flops, params = kept @ weight, kept @ (weight // 7)
    score = np.clip(0.7 + 0.3 * kept.mean(1) / OPTIONS[0] + rng.normal(0, 0.02, trials + 1), 0, 1)
    limit = float(np.quantile(flops, 0.9))
    found = []
    for i in range(trials + 1):
        costs = {"flops": float(flops[i]), "params": float(params[i]), "memory_bytes": float(4 * params[i] + 8192)}
        costs["latency_ms"] = float(flops[i] / 3e8 + rng.normal(0, 0.01))
        found.append(
            Trial(
                id=i - 1,
                candidate=tuple(chosen[i].tolist()),
                decoded={},
                costs=costs,
                score=float(score[i]),
                interval=(float(score[i]) - 0.013, float(score[i]) + 0.012),
                signal=float(rng.normal()),
                status=OK,
                feasible=costs["flops"] <= limit,
            )
        )
    dense, *rest = found
    front = find_front(rest, ("flops",), made().direction)
    return replace(
        made(),
        trials=tuple(rest),
        front=front,
        dense=dense,
        space=space,
        limits={"flops": limit},
        budget=f"flops <= {100 * limit / dense.costs['flops']:.4g}%",
        outline=outline_for(space),
        notes=(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--dimensions", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    result = large(options.trials, options.dimensions)
    print(f"{options.trials} trials, {options.dimensions} dimensions, {len(result.front)} on the front\n")
    print("| page | MB | written in s | interactive in ms | complete in ms | all five, complete |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for full in (True, False):
            began = time.process_time()
            file = Path(folder) / "report.html"
            file.write_text(page_of(result, full=full), encoding="utf-8")
            spent = time.process_time() - began
            marks = [drawn(file, Path(folder)) for _ in range(options.repeats)]
            interactive, complete = (statistics.median(column) for column in zip(*marks, strict=True))
            each = ", ".join(f"{mark[1]:.0f}" for mark in marks)
            cells = [
                "with all candidates" if full else "without",
                f"{file.stat().st_size / MB:.2f}",
                f"{spent:.1f}",
                f"{interactive:.0f}",
                f"{complete:.0f}",
                each,
            ]
            print(f"| {' | '.join(cells)} |")


def drawn(file: Path, folder: Path) -> tuple[float, float]:
    """Milliseconds from the start of navigation until the page can be used, and until all of it is there."""
    with Browser(folder) as browser:
        browser.open(file)
        return tuple(
            browser.run("performance.getEntriesByName(arguments[0])[0].startTime", name)
            for name in ("interactive", "complete")
        )


if __name__ == "__main__":
    main()
