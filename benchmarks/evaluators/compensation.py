"""Gain of compensation before any training: statistics, biases, least squares, one after the other.

Run ``python -m benchmarks.evaluators.compensation`` from the root of the repository, about 10 minutes on one thread,
most of it training networks, which are kept. A network with batch norm (ResNet-20 on hard digits,
`benchmarks.support.trained`), and two without, on which biases matter: a vision transformer on clean digits, whose
heads and inner widths are pruned, and a plain network of linear layers. Each is pruned uniformly (l2) to 50 and 30 % of
its FLOPs and scored on test samples.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune import Channels, Data
from autoprune.evaluators import Compensated
from autoprune.optimizers import uniform_seeds
from autoprune.protocols import Measurement
from autoprune.testing.contexts import study_for
from benchmarks.support.common import environment, interval, table, write
from benchmarks.support.trained import FOLDER, Part, digits, train, trained

COMMAND = "python -m benchmarks.evaluators.compensation"
SEEDS, BUDGETS = 5, (0.5, 0.3)
MOST_WORSE = 0.005
STEPS: dict[str, dict[str, dict[str, bool]]] = {
    "batch norm": {
        "none": {"bn": False, "bias": False, "least_squares": False},
        "BN": {"bias": False, "least_squares": False},
        "BN + least squares": {},
    },
    "none": {
        "none": {"bias": False, "least_squares": False},
        "bias": {"least_squares": False},
        "bias + least squares": {},
    },
}


class Block(nn.Module):
    """Attention and two linear layers, each behind a layer norm."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.enter, self.leave = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        parts = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.leave(F.gelu(self.enter(self.norms[1](x))))


class Vit(nn.Module):
    """Patches of 4x4 pixels, three blocks, the mean of all tokens."""

    def __init__(self, width: int = 48, heads: int = 4, inner: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(Block(width, heads, inner) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def mlp() -> nn.Module:
    widths = (768, 256, 128, 64)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 10))


PLAIN: dict[str, tuple[Callable[[], nn.Module], float, float, Channels]] = {
    "vision transformer": (Vit, 25, 0.003, Channels(ignore=["embed"])),
    "linear layers": (mlp, 12, 0.001, Channels()),
}
"""Networks without batch norm: how to make them, epochs, learning rate, and what is pruned."""


def plain(name: str, seed: int) -> tuple[nn.Module, dict[str, Part]]:
    """A trained network without batch norm and its data, kept like those of `benchmarks.support.trained`."""
    make, epochs, lr, _ = PLAIN[name]
    data = digits(seed, hard=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    path = FOLDER / f"compensation-{name.replace(' ', '-')}-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train(model, data["train"], epochs, lr, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model.eval(), data


def accuracies(model: nn.Module, data: dict[str, Part], space: Channels, kind: str) -> list[list[float]]:
    """Test accuracy after each step, at each budget, the dense network's first."""
    study = study_for(
        model,
        "flops <= 50%",
        Data(calibration=data["train"], validation=data["validation"], test=data["test"]),
        metric="accuracy",
        space=space,
        evaluator="adaptive_bn",
    )
    chosen = [np.zeros(len(study.problem.sizes), dtype=np.int64)]
    chosen += [uniform_seeds(study.problem, (2 * budget,))[0] for budget in BUDGETS]
    rows = []
    for settings in STEPS[kind].values():
        evaluator = Compensated(**settings)
        evaluator.prepare(study.context)
        found = [evaluator.test(candidate) for candidate in chosen]
        assert all(isinstance(outcome, Measurement) for outcome in found), found
        rows.append([float(outcome.metric.mean()) for outcome in found if isinstance(outcome, Measurement)])
    return rows


def section(name: str, kind: str, found: np.ndarray) -> str:
    """Tables of one network; `found` has the shape (seeds, steps, 1 + budgets)."""
    steps = list(STEPS[kind])
    rows = []
    for i, step in enumerate(steps):
        row = [step]
        for j in range(len(BUDGETS)):
            row.append(f"{100 * found[:, i, 1 + j].mean():.1f}")
            row.append(interval(found[:, i, 1 + j] - found[:, i - 1, 1 + j]) if i else "")
        rows.append(row)
    header = ["step", *(cell for b in BUDGETS for cell in (f"{b:.0%} of the FLOPs", "over the step before"))]
    return f"## {name}\n\nDense: {100 * found[:, 0, 0].mean():.1f} %.\n\n{table(header, rows)}"


def main() -> None:
    torch.set_num_threads(1)
    where, began = environment(COMMAND), time.perf_counter()
    found: dict[str, tuple[str, np.ndarray]] = {}
    runs: list[list[list[float]]] = []
    for seed in range(SEEDS):
        known = trained("resnet20", seed)
        runs.append(accuracies(known.model, known.data, Channels(), "batch norm"))
    found["ResNet-20 on hard digits"] = "batch norm", np.array(runs)
    for name, (*_, space) in PLAIN.items():
        runs = [accuracies(*plain(name, seed), space, "none") for seed in range(SEEDS)]
        found[f"{name} on digits, no batch norm"] = "none", np.array(runs)
    worse = [
        f"{name}, {list(STEPS[kind])[i]} at {budget:.0%}"
        for name, (kind, values) in found.items()
        for i in (1, 2)
        for j, budget in enumerate(BUDGETS)
        if (values[:, i, 1 + j] - values[:, i - 1, 1 + j]).mean() < -MOST_WORSE
    ]
    text = (
        f"Test accuracy in %, mean of {SEEDS} networks (own seed and split), before any training; uniform widths; 512 "
        "calibration samples. Differences in points with 95 % t-intervals over the pairs.\n\n"
        + "\n\n".join(section(name, *each) for name, each in found.items())
        + f"\n\nWorse than the step before by more than {100 * MOST_WORSE} points: {'; '.join(worse) or 'none'}."
    )
    results: dict[str, Any] = {"environment": where, "seconds": time.perf_counter() - began, "worse": worse}
    results["accuracy"] = {name: values.tolist() for name, (_, values) in found.items()}
    write("compensation", "Compensation before fine-tuning", results, text)


if __name__ == "__main__":
    main()
