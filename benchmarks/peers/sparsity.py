"""Spreading of zeros over the weights of a trained network: closed-form rules, and searches over the sparsity space.

Run ``python -m benchmarks.peers.sparsity`` from the root of the repository, about 8 minutes on one thread.

Every method decides how many elements of each weight stay; which ones is the same for all: those of largest magnitude
within the weight. All keep exactly the same number of nonzero weights, get the same batch-norm statistics from the
training data, and are judged on test data before any fine-tune.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

import autoprune
from autoprune.evaluators.adaptive_bn import recalibrate
from autoprune.importance.masks import allocation
from autoprune.importance.masks.allocation import Kept, Weights
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from benchmarks.evaluators.adaptive_bn_fidelity import Part, score
from benchmarks.support.common import environment, table, write
from examples.quickstart import ResNet, digits, train

COMMAND = "python -m benchmarks.peers.sparsity"
NETWORKS = 5
TRIALS = 200
SPARSITIES = (0.8, 0.9)
OPTIMIZERS = ("random", "nsga2", "knapsack", "auto")
LEVELS = tuple(round(1 - 0.9**i, 4) for i in range(38))  # what stays falls by a tenth from level to level, to 2 %
EPOCHS = 15


BASELINES: dict[str, Callable[[Weights, int], Kept]] = {
    "uniform": allocation.uniform,
    "Erdos-Renyi kernel": allocation.erdos_renyi_kernel,
    "LAMP": allocation.lamp,
    "global magnitude": allocation.global_magnitude,
}


def searched(model: nn.Module, data: dict[str, Part], weights: Weights, nonzero: int, optimizer: str) -> Kept:
    """Number of elements that each weight keeps in the trial of least validation loss."""
    others = sum(p.numel() for p in model.parameters()) - sum(weight.numel() for weight in weights.values())
    result = autoprune.search(
        model,
        f"nonzero_params <= {others + nonzero}",
        autoprune.Data(calibration=data["train"], validation=data["validation"]),
        space=autoprune.Sparsity(levels=LEVELS),
        optimizer=optimizer,
        trials=TRIALS,
        execution=autoprune.Execution(progress=False),
    )
    best = min(result.front, key=lambda trial: trial.signal)
    zeroed = result.space.pruning(best.candidate).zeroed
    return {name: weight.numel() - zeroed.get(name, 0) for name, weight in weights.items()}


def run_network(seed: int) -> dict[str, Any]:
    """Train a network, let every method sparsify it, and judge all on test data."""
    data = digits(seed)
    torch.manual_seed(seed)
    model = ResNet()
    train(model, data["train"], EPOCHS, lr=0.01, seed=seed)
    structure = analyse(Example(model, (data["train"][0][:2],)))
    weights = {name: model.get_parameter(name).detach() for name in structure.weights}
    total = sum(weight.numel() for weight in weights.values())
    calibration = data["train"][0].split(100)
    found: dict[str, Any] = {"seed": seed, "weights": total, "dense": score(model, data["test"])}
    for sparsity in SPARSITIES:
        nonzero = round((1 - sparsity) * total)
        methods = {name: rule(weights, nonzero) for name, rule in BASELINES.items()}
        seconds, unused = {}, {}
        for optimizer in OPTIMIZERS:
            began = time.perf_counter()
            kept = searched(model, data, weights, nonzero, optimizer)
            name = f"search, {optimizer}"
            seconds[name] = time.perf_counter() - began
            unused[name] = 1 - sum(kept.values()) / nonzero
            methods[name] = allocation.share_out(kept, weights, nonzero)
        rows: dict[str, dict[str, Any]] = {}
        for name, kept in methods.items():
            zeroed = {weight: weights[weight].numel() - count for weight, count in kept.items()}
            module = structure.build(model, autoprune.Pruning(zeroed=zeroed))
            recalibrate(module, calibration, module)
            nonzeros = sum(int(module.get_parameter(weight).count_nonzero()) for weight in weights)
            accuracy, loss = score(module, data["test"])
            rows[name] = {"accuracy": accuracy, "loss": loss, "nonzero": nonzeros, "kept": kept}
            rows[name] |= {"unused": unused.get(name, 0.0), "seconds": seconds.get(name, 0.0)}
        found[str(sparsity)] = rows
    return found


def mean_and_interval(values: Sequence[float]) -> str:
    """Mean with a 95 % interval of Student's t; of a single value without."""
    mean = np.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def section(sparsity: float, networks: Sequence[Mapping[str, Any]]) -> str:
    """The table of one sparsity; differences are against the baseline of least mean loss."""
    runs = [network[str(sparsity)] for network in networks]
    loss = {name: np.array([run[name]["loss"] for run in runs]) for name in runs[0]}
    best = min(BASELINES, key=lambda name: loss[name].mean())
    rows = []
    for name in runs[0]:
        less = loss[name] - loss[best]
        rows.append(
            [
                name,
                mean_and_interval([run[name]["accuracy"] for run in runs]),
                mean_and_interval(loss[name].tolist()),
                "" if name == best else mean_and_interval(less.tolist()),
                "" if name == best else f"{(less < 0).sum()} of {len(less)}",
                " ".join(sorted({str(run[name]["nonzero"]) for run in runs})),
                f"{np.max([run[name]['unused'] for run in runs]):.1%}",
                f"{np.mean([run[name]['seconds'] for run in runs]):.0f}",
            ]
        )
    header = [
        "method",
        "accuracy",
        "loss, nats",
        f"loss - {best}",
        "networks ahead",
        "nonzero weights",
        "unused",
        "seconds",
    ]
    return f"## {sparsity:.0%} of the weights set to zero\n\n{table(header, rows)}"


def report(networks: Sequence[Mapping[str, Any]]) -> str:
    dense = [network["dense"] for network in networks]
    sections = "\n\n".join(section(sparsity, networks) for sparsity in SPARSITIES)
    return (
        f"{NETWORKS} residual networks (own seed and split), trained on 1,000 digits for {EPOCHS} epochs: dense "
        f"accuracy {mean_and_interval([a for a, _ in dense])}, loss {mean_and_interval([x for _, x in dense])} on 397 "
        f"test digits. A percentage is of the {networks[0]['weights']:,} elements of convolutions and linear layer; "
        "biases and norms stay and are not counted. Every method keeps the same number of them. Searches see 400 "
        f"validation digits and evaluate {TRIALS} candidates; levels leave 0.9^i of a weight, i = 0 to "
        f"{len(LEVELS) - 1}. The best of them on validation data leaves some of the budget unused (at most: column "
        "unused), which goes to all weights in proportion to what they keep. Accuracy and loss before any fine-tune, "
        "with batch-norm statistics from the training digits: mean over networks [95 % interval]; differences are "
        f"paired.\n\n{sections}"
    )


def main() -> None:
    torch.set_num_threads(1)
    where, began = environment(COMMAND), time.perf_counter()
    networks = [run_network(seed) for seed in range(NETWORKS)]
    results = {"environment": where, "seconds": time.perf_counter() - began, "networks": networks}
    write("sparsity", "Where to put the zeros", results, report(networks))


if __name__ == "__main__":
    main()
