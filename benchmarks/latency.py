"""Latencies: predicted against measured, beside two simple predictions, and what budgets on them give.

``python -m benchmarks.latency``: every network at batch 1 and 32 with 1 and 2 threads (a process each), 40 random
candidates that no fit has seen; then searches under 75, 50 and 35 % of the dense latency. ``--quick`` takes one
network, batch and thread, 12 candidates and one seed. ``--part table`` or ``--part budgets`` makes one of the two;
``--part onnxruntime`` the table at batch 1 with 1 thread for the networks exported to ONNX, in results of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import autoprune
from autoprune.costs import StructuralCosts
from autoprune.costs.parts import draw_widths, prefixes
from autoprune.costs.profile import profile_structure, time_networks, with_batch
from autoprune.costs.runtimes import TORCH, network_call, runtime_of
from autoprune.costs.timing import CpuClock
from autoprune.protocols import IntArray
from autoprune.structure.analysis import analyse
from autoprune.structure.slicing import build
from benchmarks.common import environment, table, write
from benchmarks.trained import trained
from tests.zoo import mobilenet_v2, resnet

COMMAND = "python -m benchmarks.latency"
HELD_OUT = 40
SHARES = (0.75, 0.5, 0.35)
SLACK = 1.03
TRIALS = 100


class Block(nn.Module):
    """Attention and a perceptron, each after a norm, each added to what came in."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        split = [f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        read = nn.functional.scaled_dot_product_attention(*split)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        return x + self.feed(self.after(x))


class ViT(nn.Module):
    """A small vision transformer that averages its tokens."""

    def __init__(self, width: int = 96, heads: int = 6, depth: int = 4, classes: int = 10):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.places = nn.Parameter(torch.randn(64, width) / 10)
        self.blocks = nn.Sequential(*[Block(width, heads, 4 * width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(tokens)).mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20, 32x32": (partial(resnet, 20, width=16), 32),
    "MobileNetV2, 64x64": (mobilenet_v2, 64),
    "ViT, 32x32": (ViT, 32),
}


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def accuracy_of_predictions(name: str, batch: int, held_out: int, runtime: str = TORCH) -> dict[str, Any]:
    """Measure a network's table and candidates that it has not seen, in this process with its threads."""
    make, side = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    inputs = torch.randn(2, 3, side, side)
    structure = analyse(model, (inputs,))
    began = time.perf_counter()
    latency = profile_structure(model, structure, (inputs,), {}, run, batch=batch, runtime=runtime)
    seconds = time.perf_counter() - began
    widths = draw_widths(structure, held_out + 1, np.random.default_rng(1234))
    widths[-1] = structure.sizes
    args, kwargs = with_batch((inputs,), {}, batch)

    def call(row: IntArray) -> Callable[[], Any]:
        net = build(model, structure.edit(prefixes(structure, row))).eval()
        return runtime_of(runtime).network(net, run, args, kwargs)

    dense = call(widths[-1])
    # All in one interleaved run: what else runs on the machine slows down large networks more than small ones.
    timings = time_networks([call(row) for row in widths[:-1]], dense, CpuClock())
    measured = latency.dense_ms * np.array([timing.ratio for timing in timings])
    own = widths.astype(np.float64)
    flops = StructuralCosts(structure).flops(own)
    parts = np.sum(list(latency.by_kind(own).values()), axis=0)
    predictions = {
        "autoprune": latency.predict(own),
        "FLOPs": flops / flops[-1] * latency.dense_ms,
        "sum of parts": parts,
        "sum of parts, scaled to the dense network": parts / parts[-1] * latency.dense_ms,
    }
    near = np.abs(flops[:-1] / flops[-1] - 0.3) < 0.1
    return {
        "network": name,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "runtime": f"{latency.setting.runtime} {latency.setting.runtime_version}",
        "dense_ms": latency.dense_ms,
        "profile_seconds": seconds,
        "uncertainty": float(np.median([timing.uncertainty for timing in timings])),
        "ratio_at_30_percent_flops": (measured[near] / latency.dense_ms).tolist(),
        "factors": {
            "constant_ms": latency.correction.constant_ms,
            **latency.correction.factors,
            "growth": latency.correction.growth,
        },
        "candidates": {"measured_ms": measured.tolist(), "predicted_ms": latency.predict(own[:-1]).tolist()},
        "notes": list(latency.notes),
        "held_out_by_the_model": latency.correction.median_error,
        "predictions": {key: errors(values[:-1], measured) for key, values in predictions.items()},
    }


def errors(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    off = np.abs(predicted / measured - 1)
    return {
        "median": float(np.median(off)),
        "p95": float(np.quantile(off, 0.95)),
        "spearman": float(spearmanr(predicted, measured).statistic),
    }


def budgets(network: str, seed: int, shares: tuple[float, ...], trials: int) -> list[dict[str, Any]]:
    """Search a trained network under latency budgets, and under FLOPs with as many evaluations, then measured."""
    case = trained(network, seed)
    x, y = case.data["train"]
    data = autoprune.Data(calibration=(x[:512], y[:512]), validation=case.data["validation"], test=case.data["test"])
    latency = autoprune.profile(case.model, x[:2])
    dense = network_call(build_dense(case.model), run, (x[:1],), {})
    settings: dict[str, Any] = {"trials": trials, "seed": seed, "progress": False}
    by_flops = autoprune.search(case.model, "flops <= 90%", data, **settings)
    nets = [network_call(by_flops.build(trial), run, (x[:1],), {}) for trial in by_flops.front]
    ratios = [timing.ratio for timing in time_networks(nets, dense, CpuClock())]
    rows = []
    for share in shares:
        fitting = [t.score for t, ratio in zip(by_flops.front, ratios, strict=True) if ratio <= share]
        row: dict[str, Any] = {
            "network": case.name,
            "seed": seed,
            "share": share,
            "by_flops": max(fitting, default=None),
        }
        try:
            result = autoprune.search(case.model, f"latency <= {100 * share:g}%", data, latency=latency, **settings)
            best = result.best()
        except autoprune.InfeasibleBudgetError as error:
            rows.append(row | {"error": str(error)})
            continue
        (again,) = time_networks([network_call(result.build(best), run, (x[:1],), {})], dense, CpuClock())
        rows.append(
            row
            | {
                "score": best.score,
                "predicted": best.predicted["latency_ms"] / latency.dense_ms,
                "verified": best.costs["latency_ms"] / latency.dense_ms,
                "measured_again": again.ratio,
                "flops": best.costs["flops"] / result.dense.costs["flops"],
                "within": again.ratio <= SLACK * share,
                "notes": [note for note in result.notes if note.startswith("latency: ")],
            }
        )
    return rows


def build_dense(model: nn.Module) -> nn.Module:
    structure = analyse(model, (torch.randn(2, 3, 16, 16),))
    return build(model, structure.edit(prefixes(structure, structure.sizes))).eval()


def in_a_process(name: str, batch: int, threads: int, held_out: int, runtime: str = TORCH) -> dict[str, Any]:
    """`accuracy_of_predictions` with its own number of threads."""
    case = [name, str(batch), str(threads), str(held_out), runtime]
    where = [sys.executable, "-m", "benchmarks.latency", "--one", *case]
    finished = subprocess.run(where, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    print(name, batch, threads, found["predictions"]["autoprune"], flush=True)
    return found


def report(results: dict[str, Any]) -> str:
    rows = [
        (
            f"{r['network']}, batch {r['batch']}, {r['threads']} threads",
            f"{r['dense_ms']:.3g}",
            f"{r['profile_seconds']:.0f}",
            f"{r['uncertainty']:.1%}",
            *(f"{p['median']:.1%} / {p['p95']:.1%} / {p['spearman']:.3f}" for p in r["predictions"].values()),
        )
        for r in results["table"]
    ]
    names = list(results["table"][0]["predictions"]) if results["table"] else []
    text = "Error of the prediction for random candidates in no fit: median / 95th percentile / rank correlation.\n\n"
    text += table(["case", "dense ms", "seconds to measure", "candidates known to", *names], rows)
    at_30 = [
        (f"{r['network']}, batch {r['batch']}, {r['threads']} threads", f"{min(x):.0%} to {max(x):.0%}")
        for r in results["table"]
        if (x := r["ratio_at_30_percent_flops"])
    ]
    text += "\n\nMeasured time of random candidates with 20 to 40 % of the FLOPs, of the dense network's.\n\n"
    text += table(["case", "time"], at_30)
    if not results["budgets"]:
        return text
    rows = [
        (
            r["network"],
            f"{r['share']:.0%}",
            r.get("error")
            or f"{r['predicted']:.1%} / {r['verified']:.1%} / {r['measured_again']:.1%}"
            + " MISSED" * (not r["within"]),
            "" if "error" in r else f"{r['flops']:.1%}",
            "" if "error" in r else f"{r['score']:.4f}",
            "none fits" if r["by_flops"] is None else f"{r['by_flops']:.4f}",
        )
        for r in results["budgets"]
    ]
    text += (
        "\n\nSearches under latency budgets at batch 1; beside them a search under FLOPs with as many trials, whose "
    )
    text += "front was measured afterwards.\n\n"
    header = ["network", "budget", "predicted / verified / measured again", "FLOPs", "accuracy", "by FLOPs"]
    return text + table(header, rows)


def show(quick: bool, name: str, title: str, results: dict[str, Any]) -> None:
    if quick:
        print(report(results))
    else:
        write(name, title, results, report(results))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--part", choices=["table", "budgets", "both", "onnxruntime"], default="both")
    parser.add_argument("--one", nargs=5, metavar=("NETWORK", "BATCH", "THREADS", "CANDIDATES", "RUNTIME"))
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(int(given.one[2]))
        print(json.dumps(accuracy_of_predictions(given.one[0], int(given.one[1]), int(given.one[3]), given.one[4])))
        return
    torch.set_num_threads(1)
    arguments = "".join(f" {argument}" for argument in sys.argv[1:])
    results: dict[str, Any] = {"environment": environment(COMMAND + arguments), "table": [], "budgets": []}
    held_out = 12 if given.quick else HELD_OUT
    if given.part == "onnxruntime":
        names = list(NETWORKS)[:1] if given.quick else list(NETWORKS)
        results["table"] = [in_a_process(name, 1, 1, held_out, "onnxruntime") for name in names]
        show(given.quick, "latency_onnxruntime", "Latency under onnxruntime, predicted and measured", results)
        return
    cases = [(name, batch, threads) for name in NETWORKS for batch in (1, 32) for threads in (1, 2)]
    if given.part != "budgets":
        results["table"] = [in_a_process(*case, held_out) for case in (cases[:1] if given.quick else cases)]
    if given.part != "table":
        searches = [(network, seed) for network in ("resnet20", "mobilenet_v2") for seed in (0, 1, 2)]
        for network, seed in searches[:1] if given.quick else searches:
            results["budgets"] += budgets(network, seed, SHARES, 30 if given.quick else TRIALS)
    show(given.quick, "latency", "Latency, predicted and measured", results)


if __name__ == "__main__":
    main()
