"""Latencies: predicted against measured, next to two simple predictions, and the results of budgets on them.

``python -m benchmarks.costs.latency`` makes five tables, each of which can be made alone (``python -m
benchmarks.costs.latency table``); on a machine that does nothing else. ``--quick`` for a look.

- table: small networks at batch 1 and 32, ResNet-50 at batch 1, on one thread (a process each), 40 random candidates
  in no fit.
- threads: the small ones on two threads.
- onnxruntime: the small ones exported to ONNX, under onnxruntime on one thread.
- budgets: searches under 75, 50 and 35 % of the dense latency, and of the FLOPs with as many trials.
- rounding: widths at the right edges of measured steps against multiples of 8, at 50 %.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import autoprune
from autoprune.costs import StructuralCosts
from autoprune.costs.latency.profile import profile_structure, time_networks
from autoprune.costs.latency.timing import CpuClock
from autoprune.costs.operations.parts import draw_widths, prefixes
from autoprune.costs.operations.runtimes import TORCH, network_call, runtime_of
from autoprune.protocols import IntArray
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import build
from benchmarks.support.common import RESULTS, environment, interval, table, write
from benchmarks.support.trained import trained
from zoo import mobilenet_v2, resnet

COMMAND = "python -m benchmarks.costs.latency"
HELD_OUT = 40
CANDIDATES = 4321  # seed of the candidates that predictions are judged on; 1234 was used to develop them
SHARES = (0.75, 0.5, 0.35)
SLACK = 1.03
ROUNDED_SHARE = 0.5
THIN = 0.4  # of the FLOPs
MOST_MEDIAN, MOST_P95, LEAST_SPEARMAN = 0.05, 0.15, 0.97
TRIALS = 60


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


def resnet50() -> nn.Module:
    """ResNet-50 with random weights."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


LARGE = "ResNet-50, 224x224"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20, 32x32": (partial(resnet, 20, width=16), 32),
    "MobileNetV2, 64x64": (mobilenet_v2, 64),
    "ViT, 32x32": (ViT, 32),
    LARGE: (resnet50, 224),
}


def accuracy_of_predictions(name: str, batch: int, held_out: int, runtime: str = TORCH) -> dict[str, Any]:
    """Measure a network's table and candidates that it has not seen, in this process with its threads."""
    make, side = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    two = Example(model, (torch.randn(2, 3, side, side),))
    structure = analyse(two)
    example = two.resized(batch)
    began = time.perf_counter()
    latency = profile_structure(example, structure, runtime=runtime)
    seconds = time.perf_counter() - began
    widths = draw_widths(structure, held_out + 1, np.random.default_rng(CANDIDATES))
    widths[-1] = structure.sizes

    def call(row: IntArray) -> Callable[[], Any]:
        net = build(model, structure.edit(prefixes(structure, row))).eval()
        return runtime_of(runtime).network(example.of(net))

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
        "factors": {"constant_ms": latency.correction.constant_ms, **latency.correction.factors},
        "candidates": {"measured_ms": measured.tolist(), "predicted_ms": latency.predict(own[:-1]).tolist()},
        "notes": list(latency.notes),
        "said_by_the_model": latency.correction.median_error,
        "predictions": {key: errors(values[:-1], measured) for key, values in predictions.items()},
    }


def errors(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    off = np.abs(predicted / measured - 1)
    return {
        "median": float(np.median(off)),
        "p95": float(np.quantile(off, 0.95)),
        "spearman": float(spearmanr(predicted, measured).statistic),
    }


class Timed:
    """A trained network, its latency table, and what measures networks pruned from it against it.

    Args:
        network: Name in `benchmarks.support.trained`.
        seed: Of the network's data.
        latency: The table; of any seed, as times do not depend on weights.
    """

    def __init__(self, network: str, seed: int, latency: autoprune.Latency):
        case = trained(network, seed)
        x, y = case.data["train"]
        self.name, self.model, self.latency, self.batch = case.name, case.model, latency, latency.setting.batch
        self.data = autoprune.Data(
            calibration=(x[:256], y[:256]), validation=case.data["validation"], test=case.data["test"]
        )
        self._example = Example(case.model, (x[:2],)).resized(self.batch)
        self._dense = self._call(build_dense(case.model, x[:2]))

    def search(self, budget: str, trials: int, seed: int, **options: Any) -> autoprune.SearchResult:
        if not budget.startswith("flops"):
            options |= {"costs": {"latency_ms": self.latency}, "example": autoprune.Call(cost_batch=self.batch)}
        return autoprune.search(
            self.model,
            budget,
            self.data,
            trials=trials,
            seed=seed,
            execution=autoprune.Execution(progress=False),
            **options,
        )

    def measure(self, result: autoprune.SearchResult, trials: Sequence[autoprune.Trial]) -> list[float]:
        """Time of each as a share of the dense network's, all in one interleaved run."""
        calls = [self._call(result.build(trial)) for trial in trials]
        return [timing.ratio for timing in time_networks(calls, self._dense, CpuClock())]

    def _call(self, model: nn.Module) -> Callable[[], Any]:
        return network_call(self._example.of(model.eval()))


def profiled(network: str, batch: int) -> autoprune.Latency:
    case = trained(network, 0)
    return autoprune.profile(case.model, case.data["train"][0][:2], batch=batch)


def budgets(network: str, batch: int, seeds: Sequence[int], trials: int) -> list[dict[str, Any]]:
    """Search trained networks under shares of the latency, and under the same shares of the FLOPs, then measured."""
    latency = profiled(network, batch)
    rows = []
    for seed in seeds:
        timed = Timed(network, seed, latency)
        by_flops = []
        for share in SHARES:
            result = timed.search(f"flops <= {share:.0%}", trials, seed)
            ratios = timed.measure(result, result.front)
            by_flops.append([(t, ratio, flops_share(result, t)) for t, ratio in zip(result.front, ratios, strict=True)])
        thin = max(((t.score, ratio) for front in by_flops for t, ratio, flops in front if flops <= THIN), default=None)
        for share, front in zip(SHARES, by_flops, strict=True):
            fitting = max(((t.score, t.test_score) for t, ratio, _ in front if ratio <= share), default=None)
            row = {"network": timed.name, "batch": batch, "seed": seed, "share": share, "by_flops": fitting}
            rows.append(row | under_a_budget(timed, share, trials, seed, thin))
            print(rows[-1], flush=True)
    return rows


def under_a_budget(
    timed: Timed, share: float, trials: int, seed: int, thin: tuple[float, float] | None
) -> dict[str, Any]:
    """Search under a share of the dense latency; `thin` is a network by FLOPs, its score and time."""
    try:
        result = timed.search(f"latency <= {share:.0%}", trials, seed)
        best = result.best()
    except autoprune.InfeasibleBudgetError as error:
        return {"error": str(error)}
    (again,) = timed.measure(result, [best])
    dense_ms = timed.latency.dense_ms
    as_good = [t.costs["latency_ms"] / dense_ms for t in result.front if thin and t.score >= thin[0]]
    return {
        "score": best.score,
        "test": best.test_score,
        "predicted": best.predicted["latency_ms"] / dense_ms,
        "verified": best.costs["latency_ms"] / dense_ms,
        "measured_again": again,
        "flops": flops_share(result, best),
        "within": again <= SLACK * share,
        "thin_by_flops": thin,
        "as_good_takes": min(as_good, default=None),
        "notes": [note for note in result.notes if note.startswith("latency: ")],
    }


def flops_share(result: autoprune.SearchResult, trial: autoprune.Trial) -> float:
    return float(trial.costs["flops"] / result.dense.costs["flops"])


def rounding(network: str, batch: int, seeds: Sequence[int], trials: int) -> list[dict[str, Any]]:
    """The same search with widths at the right edges of measured steps, and with multiples of 8."""
    latency = profiled(network, batch)
    found = []
    for seed, round_to in product(seeds, ("auto", 8)):
        timed = Timed(network, seed, latency)
        row: dict[str, Any] = {"network": timed.name, "batch": batch, "seed": seed, "share": ROUNDED_SHARE}
        row["round_to"] = round_to
        try:
            space = autoprune.Channels(round_to=round_to)
            result = timed.search(f"latency <= {ROUNDED_SHARE:.0%}", trials, seed, space=space)
            best = result.best()
        except (autoprune.InfeasibleBudgetError, ValueError) as error:
            found.append(row | {"error": str(error)})
            continue
        (again,) = timed.measure(result, [best])
        options = math.prod(len(d.options) for d in result.space.dimensions)
        row |= {"score": best.score, "test": best.test_score, "measured_again": again, "candidates": float(options)}
        found.append(row)
        print(row, flush=True)
    return found


def build_dense(model: nn.Module, inputs: Tensor) -> nn.Module:
    structure = analyse(Example(model, (inputs,)))
    return build(model, structure.edit(prefixes(structure, structure.sizes))).eval()


def in_a_process(name: str, batch: int, threads: int, held_out: int, runtime: str = TORCH) -> list[dict[str, Any]]:
    """The row of `accuracy_of_predictions`, made with its own number of threads."""
    case = [name, str(batch), str(threads), str(held_out), runtime]
    where = [sys.executable, "-m", "benchmarks.costs.latency", "--one", *case]
    finished = subprocess.run(where, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(finished.stderr)
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    print(name, batch, threads, found["predictions"]["autoprune"], flush=True)
    return [found]


def predictions_text(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["predictions"])
    cases = [f"{r['network']}, batch {r['batch']}, {r['threads']} threads" for r in rows]
    cells = [
        (
            case,
            f"{r['dense_ms']:.3g}",
            f"{r['profile_seconds']:.0f}",
            f"{r['uncertainty']:.1%}",
            *(f"{p['median']:.1%} / {p['p95']:.1%} / {p['spearman']:.3f}" for p in r["predictions"].values()),
        )
        for case, r in zip(cases, rows, strict=True)
    ]
    text = "Error of the prediction for random candidates in no fit: median / 95th percentile / rank correlation.\n\n"
    text += table(["case", "dense ms", "seconds to measure", "candidates known to", *names], cells)
    own = [r["predictions"]["autoprune"] for r in rows]
    missed = [
        case
        for case, p in zip(cases, own, strict=True)
        if p["median"] > MOST_MEDIAN or p["p95"] > MOST_P95 or p["spearman"] < LEAST_SPEARMAN
    ]
    text += f"\n\nMissing {MOST_MEDIAN:.0%} / {MOST_P95:.0%} / {LEAST_SPEARMAN}: {'; '.join(missed) or 'none'}.\n\n"
    at_30 = [
        (case, f"{min(x):.0%} to {max(x):.0%}")
        for case, r in zip(cases, rows, strict=True)
        if (x := r["ratio_at_30_percent_flops"])
    ]
    text += "Measured time of random candidates with 20 to 40 % of the FLOPs, of the dense network's.\n\n"
    return text + table(["case", "time"], at_30)


def budgets_text(rows: list[dict[str, Any]]) -> str:
    cells = []
    for r in rows:
        case = (f"{r['network']}, batch {r['batch']}", f"{r['share']:.0%}")
        by_flops = "none fits" if r["by_flops"] is None else "{:.4f} ({:.4f})".format(*r["by_flops"])
        if "error" in r:
            cells.append((*case, r["error"], "", "", by_flops, "", ""))
            continue
        thin, as_good = r["thin_by_flops"], r["as_good_takes"]
        times = f"{r['predicted']:.1%} / {r['verified']:.1%} / {r['measured_again']:.1%}"
        cells.append(
            (
                *case,
                times + " MISSED" * (not r["within"]),
                f"{r['flops']:.1%}",
                f"{r['score']:.4f} ({r['test']:.4f})",
                by_flops,
                "none" if thin is None else f"{thin[0]:.4f} in {thin[1]:.0%}",
                "none as good" if as_good is None else f"{as_good:.0%}",
            )
        )
    header = ["network", "budget", "predicted / verified / measured again", "FLOPs", "accuracy (held out)"]
    header += ["by FLOPs", f"best with {THIN:.0%} of the FLOPs", "as good by latency in"]
    found = [r for r in rows if "error" not in r]
    both = [r for r in found if r["by_flops"] is not None]
    worse = sum(r["score"] < r["by_flops"][0] for r in both)
    ahead = [interval([r[key] - r["by_flops"][i] for r in both]) for i, key in enumerate(("score", "test"))]
    return (
        "Searches under shares of the dense latency; beside them searches under the same shares of the FLOPs with as "
        f"many trials, whose fronts were measured afterwards. {sum(not r['within'] for r in found)} of {len(found)} "
        f"returned networks take more than {SLACK:g} times the budget; {worse} are less accurate than what the other "
        f"search has within it, and for {len(found) - len(both)} that has none. Where it has one, they are ahead by "
        f"{ahead[0]} points on the data that chooses, and by {ahead[1]} held out (mean and 95 % t-interval).\n\n"
        + table(header, cells)
    )


def rounding_text(rows: list[dict[str, Any]]) -> str:
    cells = [
        (
            f"{r['network']}, batch {r['batch']}",
            f"{r['share']:.0%}",
            r["round_to"],
            *(
                [r["error"]]
                if "error" in r
                else [f"{r['measured_again']:.1%}", f"{r['score']:.4f}", f"{r['test']:.4f}"]
            ),
            "" if "error" in r else f"{r['candidates']:.1e}",
        )
        for r in rows
    ]
    header = ["network", "budget", "round_to", "measured", "accuracy", "held out", "candidates"]
    pairs = [pair for pair in zip(rows[::2], rows[1::2], strict=True) if not any("error" in r for r in pair)]
    score, test, time_ = (interval([a[key] - b[key] for a, b in pairs]) for key in ("score", "test", "measured_again"))
    return (
        "Searches with widths at the right edges of measured steps, and with multiples of 8. The former are ahead in "
        f"accuracy by {score} points on the data that chooses and by {test} held out, and take {time_} points of the "
        f"dense network's time more (mean and 95 % t-interval over {len(pairs)} pairs).\n\n" + table(header, cells)
    )


PARTS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], str]]] = {
    "table": ("PyTorch, one thread", predictions_text),
    "threads": ("PyTorch, two threads", predictions_text),
    "onnxruntime": ("Exported to ONNX, under onnxruntime", predictions_text),
    "budgets": ("Budgets", budgets_text),
    "rounding": ("Sets of widths", rounding_text),
}
SMALL = [name for name in NETWORKS if name != LARGE]
TRAINED = [("resnet20_wide", 32, (0, 1, 2)), ("mobilenet_v2_wide", 32, (0, 1, 2)), ("resnet20_wide", 1, (0,))]
"""Trained networks with batch and seeds: at batch 1, small networks take as long to start as to compute."""


def jobs(part: str, quick: bool) -> list[Callable[[], list[dict[str, Any]]]]:
    """Jobs of a part; each returns rows of the report."""
    held_out, trials = (12, 30) if quick else (HELD_OUT, TRIALS)
    cases = {
        "table": [(name, batch, 1, held_out) for name in SMALL for batch in (1, 32)] + [(LARGE, 1, 1, held_out)],
        "threads": [(name, batch, 2, held_out) for name in SMALL for batch in (1, 32)],
        "onnxruntime": [
            (name, batch, 1, held_out, "onnxruntime")
            for name in SMALL
            for batch in (1, 32)
            if (name, batch) != ("MobileNetV2, 64x64", 32)  # takes 10 minutes and 5 GB
        ],
    }
    if part in cases:
        found = [partial(in_a_process, *case) for case in cases[part]]
    elif part == "budgets":
        found = [partial(budgets, *case, trials) for case in TRAINED]
    else:
        found = [partial(rounding, name, batch, seeds, trials) for name, batch, seeds in TRAINED[:2]]
    return found[:1] if quick else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="by default all; results of others are kept")
    parser.add_argument("--quick", action="store_true", help="one case of each, small; writes no file")
    parser.add_argument(
        "--one", nargs=5, metavar=("NETWORK", "BATCH", "THREADS", "CANDIDATES", "RUNTIME"), help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(int(given.one[2]))
        print(json.dumps(accuracy_of_predictions(given.one[0], int(given.one[1]), int(given.one[3]), given.one[4])))
        return
    torch.set_num_threads(1)
    kept = RESULTS / "latency.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() and not given.quick else {}
    results["environment"] = environment(COMMAND)
    for part in given.parts or PARTS:
        results[part] = []
        for job in jobs(part, given.quick):
            results[part] += job()
            texts = [
                f"## {title}\n\n{text(results[name])}" for name, (title, text) in PARTS.items() if results.get(name)
            ]
            if not given.quick:
                write("latency", "Latency, predicted and measured", results, "\n\n".join(texts))
    if given.quick:
        print("\n\n".join(texts))


if __name__ == "__main__":
    main()
