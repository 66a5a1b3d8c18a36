"""Does a cheap score rank pruned networks as fine-tuning does, and does it need batch-norm statistics of its own?

Run ``python -m benchmarks.evaluators.adaptive_bn_fidelity`` from the root of the repository, about 11 minutes on one
thread.

A small residual network is trained on noisy digits, and random candidates are scored on validation data without any
training: with statistics re-estimated for the candidate (`AdaptiveBN`), and with those inherited from the dense
network. Then every candidate gets the same short fine-tune. Kendall's tau says how well each cheap score, and the plain
number of FLOPs, orders the candidates as their fine-tuned test accuracy does; a second fine-tune with another seed
shows what the noise of fine-tuning leaves to be predicted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.data.batch import default_forward
from autoprune.data.subsets import Data
from autoprune.evaluators import AdaptiveBN, Evaluator
from autoprune.evaluators.adaptive_bn import recalibrate
from autoprune.protocols import Failure, IntArray, Measurement
from autoprune.study.study import Study
from autoprune.testing.contexts import study_for
from benchmarks.support.common import RESULTS, environment, table, write
from examples.quickstart import ResNet, train

COMMAND = "python -m benchmarks.evaluators.adaptive_bn_fidelity"
NETWORKS = 3
CANDIDATES = 32
POOL = 200_000
TRAINING_SAMPLES, VALIDATION_SAMPLES, TEST_COPIES = 500, 400, 4
NOISES = (0.3, 0.7)  # standard deviations, for pixels in [0, 1]; networks reach about 81 % and 40 %
EPOCHS, FINETUNE_EPOCHS, FINETUNE_LR = 20, 4, 0.003
RESAMPLES = 2000
SETS = {"30-70 %": (0.30, 0.70), "47.5-52.5 %": (0.475, 0.525)}
PREDICTORS = {
    "adaptive_accuracy": "accuracy, adaptive BN",
    "adaptive_loss": "loss, adaptive BN",
    "stale_accuracy": "accuracy, stale BN",
    "stale_loss": "loss, stale BN",
    "flops": "FLOPs alone",
    "again": "a second fine-tune",
}
DIFFERENCES = (("adaptive_accuracy", "stale_accuracy"), ("adaptive_loss", "stale_loss"), ("adaptive_loss", "flops"))
LOWER_IS_BETTER = ("adaptive_loss", "stale_loss")

Part = tuple[Tensor, Tensor]


def noisy_digits(seed: int, noise: float) -> dict[str, Part]:
    """Digits with Gaussian noise and few training samples: clean ones end near 99 % whatever is pruned.

    Test images come several times, with other noise, so that chance moves the accuracies less.
    """
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    fit, rest = train_test_split(np.arange(len(y)), train_size=TRAINING_SAMPLES, random_state=seed, stratify=labels)
    check, test = train_test_split(rest, train_size=VALIDATION_SAMPLES, random_state=seed, stratify=labels[rest])
    parts = {"train": fit, "validation": check, "test": np.tile(test, TEST_COPIES)}
    return {name: (x[i] + noise * torch.randn(x[i].shape, generator=generator), y[i]) for name, i in parts.items()}


@torch.no_grad()
def score(model: nn.Module, data: Part) -> tuple[float, float]:
    """Accuracy and loss."""
    outputs = model.eval()(data[0])
    return (outputs.argmax(1) == data[1]).float().mean().item(), F.cross_entropy(outputs, data[1]).item()


def make_study(model: nn.Module, data: dict[str, Part]) -> Study:
    return study_for(
        model,
        "flops <= 100%",
        Data(calibration=data["train"], validation=data["validation"], test=data["test"]),
        metric="accuracy",
        evaluator=AdaptiveBN(),
    )


def stale_evaluator(study: Study) -> Evaluator:
    """Scores candidates with the statistics of the dense network: without calibration data nothing is re-estimated."""
    evaluator = AdaptiveBN()
    evaluator.prepare(replace(study.context, subsets=replace(study.context.subsets, calibration=())))
    return evaluator


def choose(study: Study, low: float, high: float, seed: int) -> IntArray:
    """Random candidates whose share of the FLOPs is spread evenly between two limits."""
    rng = np.random.default_rng(seed)
    pool = rng.integers(0, study.problem.sizes, (POOL, len(study.problem.sizes)))
    shares = study.costs["flops"](pool) / study.costs["flops"](np.zeros((1, pool.shape[1]), dtype=np.int64))
    edges = np.linspace(low, high, CANDIDATES + 1)
    return pool[[np.flatnonzero((shares >= a) & (shares < b))[0] for a, b in pairwise(edges)]]


def finetuned(study: Study, candidate: IntArray, data: dict[str, Part], seed: int) -> tuple[float, float]:
    """Test accuracy and loss after the fixed fine-tune; exact statistics, so that those at the start leave no trace."""
    module = study.evaluator.build(candidate)
    train(module, data["train"], FINETUNE_EPOCHS, FINETUNE_LR, seed)
    recalibrate(module, study.context.subsets.calibration, lambda batch: default_forward(module, batch))
    return score(module, data["test"])


def run_network(seed: int, noise: float) -> dict[str, Any]:
    """Train a network, then score and fine-tune the candidates of every set."""
    data = noisy_digits(seed, noise)
    torch.manual_seed(seed)
    model = ResNet()
    train(model, data["train"], EPOCHS, lr=0.01, seed=seed)
    study = make_study(model, data)
    stale = stale_evaluator(study)
    sets: dict[str, dict[str, list[float]]] = {}
    for number, (name, limits) in enumerate(SETS.items()):
        candidates = choose(study, *limits, seed=10 * seed + number)
        after = [finetuned(study, candidate, data, seed=100) for candidate in candidates]
        again = [finetuned(study, candidate, data, seed=101) for candidate in candidates]
        adaptive, inherited = study.evaluator.evaluate(candidates), stale.evaluate(candidates)
        sets[name] = {
            "adaptive_accuracy": _means(adaptive, "metric"),
            "adaptive_loss": _means(adaptive, "signal"),
            "stale_accuracy": _means(inherited, "metric"),
            "stale_loss": _means(inherited, "signal"),
            "flops": study.costs["flops"](candidates).tolist(),
            "again": [accuracy for accuracy, _ in again],
            "finetuned_accuracy": [accuracy for accuracy, _ in after],
            "finetuned_loss": [loss for _, loss in after],
        }
    return {"seed": seed, "dense_accuracy": score(model, data["test"])[0], "sets": sets}


def _means(measured: Sequence[Measurement | Failure], field: str) -> list[float]:
    failed = [m.reason for m in measured if isinstance(m, Failure)]
    if failed:
        raise RuntimeError(f"a candidate could not be scored: {failed[0]}")
    return [float(getattr(m, field).mean()) for m in measured]


def tau(scores: dict[str, list[float]], predictor: str, rows: np.ndarray | slice = slice(None)) -> float:
    """Kendall's tau-b of a predictor with fine-tuned accuracy, positive when the predictor is right."""
    values = np.array(scores[predictor])[rows] * (-1 if predictor in LOWER_IS_BETTER else 1)
    found = stats.kendalltau(values, np.array(scores["finetuned_accuracy"])[rows]).statistic
    return 0.0 if np.isnan(found) else float(found)  # all values tie: nothing is predicted


def compare(networks: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Mean over networks of tau within a network, with percentile intervals from candidates drawn again in each."""
    scores = [network["sets"][name] for network in networks]
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, CANDIDATES, (RESAMPLES, len(scores), CANDIDATES))
    taus, spread = {}, {}
    for predictor in PREDICTORS:
        taus[predictor] = [tau(s, predictor) for s in scores]
        spread[predictor] = np.array(
            [np.mean([tau(s, predictor, r) for s, r in zip(scores, rows, strict=True)]) for rows in drawn]
        )

    def interval(values: np.ndarray) -> list[float]:
        low, high = np.percentile(values, [2.5, 97.5])
        return [float(low), float(high)]

    return {
        "tau": {
            p: {"networks": taus[p], "mean": float(np.mean(taus[p])), "interval": interval(spread[p])}
            for p in PREDICTORS
        },
        "difference": {
            f"{a} - {b}": {
                "mean": float(np.mean(taus[a]) - np.mean(taus[b])),
                "interval": interval(spread[a] - spread[b]),
            }
            for a, b in DIFFERENCES
        },
    }


def section(noise: float, networks: Sequence[dict[str, Any]], compared: dict[str, Any]) -> str:
    """The tables of one level of noise."""

    def cell(found: dict[str, Any]) -> str:
        low, high = found["interval"]
        each = f"; {', '.join(f'{t:.2f}' for t in found['networks'])}" if "networks" in found else ""
        return f"{found['mean']:+.2f} [{low:+.2f}, {high:+.2f}]{each}"

    taus = table(
        ["predictor", *(f"tau, {name} of the FLOPs" for name in SETS)],
        [[label, *(cell(compared[name]["tau"][p]) for name in SETS)] for p, label in PREDICTORS.items()],
    )
    differences = table(
        ["difference of tau", *SETS],
        [
            [f"{PREDICTORS[a]} - {PREDICTORS[b]}", *(cell(compared[n]["difference"][f"{a} - {b}"]) for n in SETS)]
            for a, b in DIFFERENCES
        ],
    )
    fields = ("adaptive_accuracy", "stale_accuracy", "finetuned_accuracy")
    ranges = table(
        ["network", "dense", *(f"{f.replace('_', ' ')}, {name}" for name in SETS for f in fields)],
        [
            [
                network["seed"],
                f"{network['dense_accuracy']:.3f}",
                *(
                    f"{min(network['sets'][name][f]):.3f} to {max(network['sets'][name][f]):.3f}"
                    for name in SETS
                    for f in fields
                ),
            ]
            for network in networks
        ],
    )
    return f"## Noise of {noise}\n\n{taus}\n\n{differences}\n\nLowest to highest accuracies:\n\n{ranges}"


def report(runs: dict[float, Any]) -> str:
    sections = "\n\n".join(section(noise, run["networks"], run["compared"]) for noise, run in runs.items())
    return (
        f"{NETWORKS} networks (own seed, split and noise) for each of two levels of Gaussian noise on the images, "
        f"{CANDIDATES} random candidates in each of two sets, {TRAINING_SAMPLES} training images, cheap scores on "
        f"{VALIDATION_SAMPLES} validation images, fine-tune of {FINETUNE_EPOCHS} epochs, accuracy after it on "
        f"{1797 - TRAINING_SAMPLES - VALIDATION_SAMPLES} test images with {TEST_COPIES} draws of noise each.\n\n"
        "Kendall's tau with fine-tuned accuracy: mean over networks [95 % bootstrap interval, "
        f"{RESAMPLES} resamples of the candidates within each network]; each network. The intervals say nothing about "
        f"other networks or data.\n\n{sections}\n\n"
        "![scores against fine-tuned accuracy](adaptive_bn_fidelity.png)"
    )


def plot(runs: dict[float, Any]) -> None:
    """Cheap accuracy against fine-tuned accuracy, one colour a network."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    panels = ("adaptive_accuracy", "stale_accuracy", "flops")
    rows = [(noise, name) for noise in runs for name in SETS]
    figure, axes = plt.subplots(len(rows), len(panels), figsize=(11, 12), sharey="row", layout="constrained")
    for row, (noise, name) in zip(axes, rows, strict=True):
        for axis, predictor in zip(row, panels, strict=True):
            for network in runs[noise]["networks"]:
                scores = network["sets"][name]
                x = np.array(scores[predictor]) / (1e6 if predictor == "flops" else 1)
                axis.scatter(x, scores["finetuned_accuracy"], s=14, alpha=0.8, label=f"network {network['seed']}")
            mean = runs[noise]["compared"][name]["tau"][predictor]["mean"]
            axis.set_title(f"noise {noise}, {name} of the FLOPs: tau {mean:.2f}", fontsize=10)
            axis.set_xlabel("MFLOPs (MACs)" if predictor == "flops" else PREDICTORS[predictor] + ", before fine-tune")
        row[0].set_ylabel("test accuracy after fine-tune")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(RESULTS / "adaptive_bn_fidelity.png", dpi=90)


def main() -> None:
    torch.set_num_threads(1)
    where, began = environment(COMMAND), time.perf_counter()
    runs: dict[float, Any] = {}
    for noise in NOISES:
        networks = [run_network(seed, noise) for seed in range(NETWORKS)]
        runs[noise] = {"networks": networks, "compared": {name: compare(networks, name) for name in SETS}}
    results = {"environment": where, "seconds": time.perf_counter() - began, "noise": runs}
    write("adaptive_bn_fidelity", "Cheap scores against fine-tuned accuracy", results, report(runs))
    plot(runs)


if __name__ == "__main__":
    main()
