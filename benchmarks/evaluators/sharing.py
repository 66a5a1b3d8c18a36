"""Shared computation: multiply-accumulates that candidates still cost when they resume where an earlier one has been.

Run ``python -m benchmarks.evaluators.sharing`` from the root of the repository; exits with 1 when a target is missed. A
ResNet of 20 basic blocks on random images of 32x32. Streams of candidates, in generations of 8 as a local search asks
for them, are scored by an evaluator that shares and by one that does not; multiply-accumulates are counted as they are
executed, everything included: calibration, validation, and the proof that a shared score is the same. Samples are fewer
than those of a search, and the memory limit is smaller in proportion, so that as many outputs fit as with the defaults.
Shares of multiply-accumulates do not depend on the number of samples: those of a scan were the same, to the last digit
shown, with 12 and 48 samples. Rows are kept, and those that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from autoprune.data.subsets import Data
from autoprune.evaluators import AdaptiveBN, Compensated
from autoprune.evaluators.activation_cache.limits import ROOM_BYTES
from autoprune.execution.local import GENERATION
from autoprune.optimizers.level_switch import LevelSwitch
from autoprune.protocols import IntArray, Measurement
from autoprune.study.study import Study
from autoprune.study.trials import finished, proposed, rows_of
from autoprune.testing.contexts import study_for
from benchmarks.support.common import RESULTS, environment, table, write
from zoo.resnet import BasicBlock, conv

COMMAND = "python -m benchmarks.evaluators.sharing"
BLOCKS = ((7, 16), (7, 32), (6, 64))
MOST = {"sensitivity scan": 0.55, "level_switch, one budget": 0.85, "level_switch, 16 budgets": 0.85}
STORED = RESULTS / "sharing.json"
DEFAULT_SAMPLES = 512 + 1024  # calibration and validation samples of a search

Evaluator = AdaptiveBN | Compensated
Stream = Generator[IntArray, list[Measurement], None]
EVALUATORS: dict[str, type[Evaluator]] = {"AdaptiveBN": AdaptiveBN, "Compensated": Compensated}


class TwentyBlocks(nn.Module):
    """A CIFAR ResNet of 20 basic blocks in three stages."""

    def __init__(self) -> None:
        super().__init__()
        blocks, inputs = [], BLOCKS[0][1]
        for stage, (count, width) in enumerate(BLOCKS):
            for i in range(count):
                blocks.append(BasicBlock(inputs, width, 2 if stage and not i else 1))
                inputs = width
        self.stem = nn.Sequential(conv(3, BLOCKS[0][1]), nn.BatchNorm2d(BLOCKS[0][1]), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


def make_study(samples: int, evaluator: Evaluator) -> Study:
    """A search with random weights on random images: which operations run does not depend on the values."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    parts = {"calibration": samples // 3, "validation": samples - samples // 3, "test": 8}
    data = {}
    for name, count in parts.items():
        data[name] = (
            torch.randn(count, 3, 32, 32, generator=generator),
            torch.randint(0, 10, (count,), generator=generator),
        )
    return study_for(
        TwentyBlocks().eval(),
        "flops <= 50%",
        Data(**data, batch_size=min(128, max(samples // 3, 1))),
        metric="accuracy",
        evaluator=evaluator,
    )


def scan(study: Study, seed: int, n: int) -> Stream:
    """Single changes of the dense model, dimension and option drawn uniformly."""
    rng, sizes = np.random.default_rng(seed), study.problem.sizes
    for _ in range(n // GENERATION):
        probes = np.zeros((GENERATION, len(sizes)), dtype=np.int64)
        dims = rng.integers(len(sizes), size=GENERATION)
        probes[np.arange(GENERATION), dims] = rng.integers(1, sizes[dims])
        yield probes


def level_switch(study: Study, seed: int, n: int, niches: int) -> Stream:
    """Yield the candidates that the optimizer asks for; the caller sends back the outcomes."""
    optimizer = LevelSwitch(study.problem, seed, niches=niches)
    for _ in range(n // GENERATION):
        candidates = optimizer.ask(GENERATION)
        outcomes = yield candidates
        trials = proposed(study, range(len(candidates)), candidates, study.costs_of(candidates))
        done = [finished(study, trial, outcome) for trial, outcome in zip(trials, outcomes, strict=True)]
        optimizer.tell(rows_of(study, done))


STREAMS: dict[str, Callable[[Study, int, int], Stream]] = {
    "sensitivity scan": scan,
    "level_switch, one budget": partial(level_switch, niches=1),
    "level_switch, 16 budgets": partial(level_switch, niches=16),
}


def replay(stream: list[IntArray]) -> Generator[IntArray, list[Measurement], None]:
    """The same candidates again, whatever they score."""
    for candidates in stream:
        _ = yield candidates


def run(study: Study, evaluator: Evaluator, stream: Stream, count: bool) -> dict[str, Any]:
    """Score a stream: its candidates and scores, multiply-accumulates if they are to be counted, and seconds."""
    evaluator.prepare(study.context)
    outcomes: list[Measurement] = []
    seen: list[IntArray] = []
    counter = FlopCounterMode(display=False)
    wall, cpu = time.perf_counter(), time.process_time()
    with counter if count else nullcontext(), suppress(StopIteration):
        candidates = next(stream)
        while True:
            order = evaluator.order(candidates)
            found = evaluator.evaluate(candidates[order])
            outcomes += [found[i] for i in np.argsort(order)]
            seen.append(candidates)
            candidates = stream.send(outcomes[-len(candidates) :])
    cache = evaluator._adapted._cache
    return {
        "stream": seen,
        "macs": counter.get_total_flops() // 2,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_bytes": cache.store.peak,
        "cuts": len(cache.cuts),
        "signals": [outcome.signal for outcome in outcomes],
    }


def compare(
    kind: type[Evaluator], name: str, seed: int, n: int, samples: int, share_bytes: int, timed: bool
) -> dict[str, Any]:
    """One stream with and without: counted first, timed afterwards if that is wanted."""
    study = make_study(samples, kind(share_bytes=0))
    rows = {("naive", True): run(study, kind(share_bytes=0), STREAMS[name](study, seed, n), True)}
    stream = rows["naive", True]["stream"]
    rows["shared", True] = run(study, kind(share_bytes=share_bytes), replay(stream), True)
    if timed:
        for label, memory in (("naive", 0), ("shared", share_bytes)):
            rows[label, False] = run(study, kind(share_bytes=memory), replay(stream), False)
    equal = all(
        np.array_equal(a, b)
        for row in rows.values()
        for a, b in zip(rows["naive", True]["signals"], row["signals"], strict=True)
    )
    shared = rows["shared", True]
    took = {key: rows["shared", False][key] / rows["naive", False][key] for key in ("wall_s", "cpu_s")} if timed else {}
    return {
        "evaluator": kind.__name__,
        "stream": name,
        "seed": seed,
        "macs": shared["macs"] / rows["naive", True]["macs"],
        "wall": took.get("wall_s"),
        "cpu": took.get("cpu_s"),
        "peak": shared["peak_bytes"] / share_bytes,
        "cuts": shared["cuts"],
        "identical": equal,
    }


def report(rows: list[dict[str, Any]], n: int, samples: int, limit: float) -> str:
    lines = []
    for kind, name in dict.fromkeys((row["evaluator"], row["stream"]) for row in rows):
        own = [row for row in rows if (row["evaluator"], row["stream"]) == (kind, name)]

        def each(key: str, own: list[dict[str, Any]] = own) -> str:
            values = [row[key] for row in own if row[key] is not None]
            return f"{np.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})" if values else ""

        target = f"<= {MOST[name]:.0%}" if name in MOST else ""
        peak = f"{max(row['peak'] for row in own):.0%}"
        same = "yes" if all(row["identical"] for row in own) else "NO"
        lines.append([kind, name, len(own), each("macs"), target, each("cpu"), each("wall"), peak, same])
    header = ["evaluator", "stream", "seeds", "MACs executed", "target", "processor time", "wall time", "memory"]
    header += ["same scores"]
    return (
        f"Shares of what an evaluator takes that does not share, mean over seeds (lowest to highest); {n} candidates "
        f"each, {samples} samples, and as many outputs kept as with {limit:.3g} GiB and {DEFAULT_SAMPLES} samples. "
        f"Memory is the most that was kept, as a share of the limit.\n\n{table(header, lines)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=12, help="calibration (a third) and validation samples")
    parser.add_argument("--candidates", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--timed", type=int, default=1, help="seeds that run once more, to be timed")
    parser.add_argument("--gib", type=float, default=ROOM_BYTES / 2**30, help="memory limit at 1,536 samples")
    parser.add_argument("--evaluators", nargs="+", choices=EVALUATORS, default=list(EVALUATORS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    where = environment(" ".join([COMMAND, *sys.argv[1:]]))
    share_bytes = int(given.gib * 2**30 * given.samples / DEFAULT_SAMPLES)
    settings = {"samples": given.samples, "candidates": given.candidates, "gib": given.gib}
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    rows = stored["rows"] if stored.get("settings") == settings else []
    for seed in range(given.seeds):
        for kind in given.evaluators:
            for name in STREAMS:
                if any((row["evaluator"], row["stream"], row["seed"]) == (kind, name, seed) for row in rows):
                    continue
                timed = seed < given.timed
                rows.append(compare(EVALUATORS[kind], name, seed, given.candidates, given.samples, share_bytes, timed))
                met = targets_met(rows)
                text = report(rows, given.candidates, given.samples, given.gib)
                text += f"\n\nAll targets {'met' if met else 'NOT met'}."
                found = {"environment": where, "settings": settings, "met": met, "rows": rows}
                write("sharing", "Shared computation", found, text)
    return 0 if targets_met(rows) else 1


def targets_met(rows: list[dict[str, Any]]) -> bool:
    """Return whether scores agree, memory is within the limit, and every stream so far meets its target."""
    streams = {(row["evaluator"], row["stream"]) for row in rows}
    means = {
        (kind, name): np.mean([row["macs"] for row in rows if (row["evaluator"], row["stream"]) == (kind, name)])
        for kind, name in streams
    }
    little = all(mean <= MOST[name] for (_, name), mean in means.items())
    return bool(little and all(row["identical"] and row["peak"] <= 1 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
