"""Overhead of the engine over the forward pass: time of a candidate, of a surgery, of the costs of a population.

Run ``python -m benchmarks.execution.overhead`` from the root of the repository, about 10 minutes; exits with 1 when a
target is missed. Evaluation and bare forward pass of a candidate alternate, and their ratio is taken from processor
time, so that other programs on the machine disturb it least; wall time is reported next to it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune.data.batch import Batch, default_forward
from autoprune.data.subsets import Data
from autoprune.evaluators import AdaptiveBN
from autoprune.evaluators.adaptive_bn import recalibrate
from autoprune.evaluators.scoring.scorer import DENSE_BYTES
from autoprune.protocols import IntArray
from autoprune.structure.slicing.slicing import Slicer
from autoprune.study.study import Study
from autoprune.testing.contexts import study_for
from benchmarks.support.common import environment, table, write
from zoo.mobile import mobilenet_v2
from zoo.resnet import resnet

COMMAND = "python -m benchmarks.execution.overhead"
MOST_RATIO, MOST_SURGERY_MS, FEWEST_PER_SECOND = 1.10, 20.0, 200_000
SAMPLES = 512  # what `Data` draws for calibration by default
SURGERIES, POPULATION = 50, 40_000


def make_study(model: nn.Module) -> Study:
    """A search of a model with random weights on random images of 32x32: times do not depend on the values."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2 * SAMPLES + 8, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (len(images),), generator=generator)
    parts = [(images[i], labels[i]) for i in torch.tensor_split(torch.arange(len(images)), (SAMPLES, 2 * SAMPLES))]
    return study_for(
        model,
        "flops <= 100%",
        Data(parts[0], parts[1], parts[2], validation_samples=SAMPLES),
        metric="accuracy",
        evaluator=AdaptiveBN(),
    )


def random_candidates(study: Study, n: int, seed: int = 0) -> IntArray:
    return np.random.default_rng(seed).integers(0, study.problem.sizes, (n, len(study.problem.sizes)))


def clock(call: Callable[[], object]) -> tuple[float, float]:
    """Processor and wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


@torch.no_grad()
def forward(module: nn.Module, batches: Sequence[Batch]) -> None:
    for batch in batches:
        default_forward(module, batch)


@torch.no_grad()
def calibrate_natively(module: nn.Module, batches: Sequence[Batch]) -> None:
    """The passes in training mode with PyTorch's own batch norm."""
    for part in module.modules():
        part.training = isinstance(part, _BatchNorm)
    forward(module, batches)
    module.eval()


def time_candidate(study: Study, candidate: IntArray, rounds: int, parts: bool) -> dict[str, Any]:
    """Seconds of (processor, wall) of an evaluation, of the bare forward pass, and of the parts, in each round."""
    context = study.context
    calibration, validation = context.subsets.calibration, context.subsets.validation
    module = study.evaluator.build(candidate).eval()
    slicer = Slicer(context.model)
    dense = context.judge.dense_outputs(lambda batch: default_forward(module, batch), validation, DENSE_BYTES)

    def cut() -> nn.Module:
        return slicer.cut(context.structure.edit(context.space.pruning(candidate.tolist())))

    calls: dict[str, Callable[[], object]] = {
        "evaluation": lambda: study.evaluator.evaluate(candidate[None]),
        "bare": lambda: forward(module, (*calibration, *validation)),
        "surgery": cut,
        "calibration": lambda: recalibrate(module, calibration, lambda batch: default_forward(module, batch)),
        "bare_calibration": lambda: forward(module, calibration),
        "native_calibration": lambda: calibrate_natively(module, calibration),
        "scoring": lambda: context.judge.measure(lambda batch: default_forward(module, batch), validation, dense),
        "bare_validation": lambda: forward(module, validation),
    }
    if not parts:
        calls = {name: calls[name] for name in ("evaluation", "bare")}
    # Either side would pay alike for the convolution kernels of new shapes, but only the first one does.
    forward(module, calibration[:1])
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in calls if i % 2 == 0 else reversed(calls):
            seconds[name].append(clock(calls[name]))
    return {"seconds": seconds, "flops": float(study.costs["flops"](candidate[None])[0])}


def time_evaluations(model: nn.Module, candidates: int, rounds: int, parts: bool) -> dict[str, Any]:
    study = make_study(model)
    timed = [time_candidate(study, candidate, rounds, parts) for candidate in random_candidates(study, candidates)]
    # Candidates, rounds, (processor, wall).
    spent = {name: np.array([t["seconds"][name] for t in timed]) for name in timed[0]["seconds"]}
    ratios = spent["evaluation"] / spent["bare"]
    added = {}
    if parts:
        added = {
            "surgery": spent["surgery"],
            "batch norm in training mode": spent["calibration"] - spent["bare_calibration"],
            "scoring": spent["scoring"] - spent["bare_validation"],
            "(batch norm by PyTorch's kernel)": spent["native_calibration"] - spent["bare_calibration"],
        }
    return {
        "rounds": rounds,
        "ratio": float(np.median(ratios[..., 0])),
        "ratio_candidates": np.median(ratios[..., 0], axis=1).tolist(),
        "wall_ratio": float(np.median(ratios[..., 1])),
        "wall_ratio_candidates": np.median(ratios[..., 1], axis=1).tolist(),
        "bare_seconds": float(np.median(spent["bare"][..., 0])),
        "added": {name: float(np.median((s / spent["bare"])[..., 0])) for name, s in added.items()},
        "candidates": timed,
    }


def time_surgery(study: Study) -> dict[str, float]:
    """Milliseconds of wall time from a candidate to a module ready to score."""
    slicer, context = Slicer(study.context.model), study.context

    def cut(candidate: list[int]) -> nn.Module:
        return slicer.cut(context.structure.edit(context.space.pruning(candidate)))

    spent = [clock(partial(cut, candidate))[1] * 1e3 for candidate in random_candidates(study, SURGERIES).tolist()]
    return {"median_ms": float(np.median(spent)), "max_ms": max(spent)}


def time_costs(study: Study) -> dict[str, float]:
    """Candidates per second of wall time, median of 5."""
    population = random_candidates(study, POPULATION)
    return {
        name: POPULATION / float(np.median([clock(partial(cost, population))[1] for _ in range(5)]))
        for name, cost in study.costs.items()
    }


def report(networks: dict[str, Any], surgery: dict[str, float], rates: dict[str, float]) -> str:
    def spread(ratio: float, of: Sequence[float]) -> str:
        return f"{ratio:.3f} ({min(of):.3f} to {max(of):.3f})"

    ratios = table(
        ["network", "evaluation / bare forward, processor time", "wall time", "bare forward", "pairs", "target"],
        [
            [
                name,
                spread(r["ratio"], r["ratio_candidates"]),
                spread(r["wall_ratio"], r["wall_ratio_candidates"]),
                f"{r['bare_seconds']:.2f} s",
                len(r["candidates"]) * r["rounds"],
                f"<= {MOST_RATIO:.2f}",
            ]
            for name, r in networks.items()
        ],
    )
    parts = list(next(iter(networks.values()))["added"])
    added = table(
        ["network", *parts],
        [[name, *(f"{r['added'][p]:+.1%}" for p in parts)] for name, r in networks.items() if r["added"]],
    )
    engine = table(
        ["ResNet-56", "seen", "target"],
        [
            ["surgery, median of 50", f"{surgery['median_ms']:.2f} ms (max {surgery['max_ms']:.1f})", "< 20 ms"],
            *([f"{name}, candidates a second", f"{rate:,.0f}", "> 200,000"] for name, rate in rates.items()),
        ],
    )
    return (
        "Median of all pairs (lowest to highest median of a candidate), random candidates, "
        f"{SAMPLES} calibration and {SAMPLES} validation samples of 3x32x32.\n\n{ratios}\n\n"
        "What is added to the bare forward pass, in shares of it; the last column is what the second would be with "
        f"PyTorch's kernel, and is no part of the sum:\n\n{added}\n\n{engine}"
    )


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where = environment(COMMAND)
    deep = make_study(resnet(56))
    surgery, rates = time_surgery(deep), time_costs(deep)
    networks = {
        "ResNet-20": time_evaluations(resnet(20), candidates=10, rounds=4, parts=True),
        "MobileNetV2": time_evaluations(mobilenet_v2(), candidates=6, rounds=4, parts=False),
    }
    met = (
        all(r["ratio"] <= MOST_RATIO for r in networks.values())
        and surgery["median_ms"] < MOST_SURGERY_MS
        and min(rates.values()) > FEWEST_PER_SECOND
    )
    results = {"environment": where, "met": met, "networks": networks, "surgery": surgery, "costs_per_second": rates}
    text = report(networks, surgery, rates) + f"\n\nAll targets {'met' if met else 'NOT met'}."
    write("overhead", "Overhead of an evaluation", results, text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
