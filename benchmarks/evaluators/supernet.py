"""A supernet for three budgets against pruning the trained network and fine-tuning for each, at the same total work.

Run ``python -m benchmarks.evaluators.supernet`` from the root of the repository; ``--seeds 1 --steps 60`` for a look.
ResNet-20 on hard digits (`benchmarks.support.trained`), and a vision transformer without batch norm on clean ones, of
which heads and inner widths are pruned. Work is counted, not timed: multiply-accumulates of all forward and backward
passes, a backward pass being two forward passes. The supernet's are shared out equally to the three budgets, and spent
there on fine-tuning by the same recipe: labels and the dense network's outputs, AdamW, the same learning rate falling
to 0, the same batches. Candidates are uniform, ranked by l2; accuracy is that of test samples.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune import Channels, Data
from autoprune.evaluators import AdaptiveBN, Compensated, Evaluator, FineTune, Supernet
from autoprune.evaluators.training.loader import mixed
from autoprune.evaluators.training.sandwich import random_candidates
from autoprune.optimizers import uniform_seeds
from autoprune.protocols import Failure, IntArray
from autoprune.study.study import Study
from autoprune.testing.contexts import study_for
from benchmarks.evaluators.compensation import interval, plain
from benchmarks.support.common import environment, table, write
from benchmarks.support.trained import Part, trained

BUDGETS = (0.7, 0.5, 0.3)
BATCH, SUBNETS = 64, 2
MOST_BEHIND = 0.01
CASES = {
    "ResNet-20 on hard digits": (Channels(min_fraction=0.25), 0.01),
    "vision transformer on clean digits": (Channels(min_fraction=0.25, ignore=["embed"]), 0.003),
}
"""Widths of a quarter and more: the smallest candidate is trained in every step, and 30 % of the FLOPs need half. The
learning rates are those that the dense networks were trained with."""
ROWS = ("adaptive BN", "compensated", "adaptive BN, fine-tuned", "compensated, fine-tuned", "supernet")


def network(name: str, seed: int) -> tuple[nn.Module, dict[str, Part]]:
    if name.startswith("ResNet"):
        known = trained("resnet20", seed)
        return known.model, known.data
    return plain("vision transformer", seed)


def distil(teacher: nn.Module, data: Part, lr: float, seed: int, model: nn.Module, steps: int) -> None:
    """Train in place on labels and on what the teacher gives, as the largest candidate of a supernet is."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order: list[Tensor] = []
    model.train()
    for _ in range(steps):
        order = order or list(torch.randperm(len(y), generator=generator).split(BATCH))[: len(y) // BATCH]
        rows = order.pop()
        with torch.no_grad():
            given = teacher(x[rows]).log_softmax(1)
        logits = model(x[rows])
        loss = F.cross_entropy(logits, y[rows])
        loss = loss + F.kl_div(logits.log_softmax(1), given, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def supernet_macs(study: Study, steps: int, seed: int) -> float:
    """Multiply-accumulates of a supernet's training, by drawing its candidates once more."""
    space, flops = study.context.space, study.costs["flops"]
    fixed = flops(np.stack([np.zeros_like(space.sizes), space.sizes - 1]))
    total = 0.0
    for step in range(steps):
        drawn = random_candidates(space, SUBNETS, np.random.default_rng(mixed(seed, step)))
        total += float(fixed[0] + 3 * (fixed.sum() + flops(drawn).sum()))
    return BATCH * total


def accuracies(evaluator: Evaluator, candidates: list[IntArray]) -> list[float]:
    """Test accuracy of each candidate."""
    outcomes = [evaluator.test(candidate) for candidate in candidates]
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    assert not failed, failed
    return [float(outcome.metric.mean()) for outcome in outcomes if not isinstance(outcome, Failure)]


def run(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Accuracies (rows, 1 + budgets), the dense network first, and what they took."""
    (space, lr), (model, data) = CASES[name], network(name, seed)
    source = Data(calibration=data["train"], validation=data["validation"], test=data["test"], test_samples=2000)
    study = study_for(
        model,
        f"flops <= {BUDGETS[0]:.0%}",
        source,
        metric="accuracy",
        space=space,
        evaluator="adaptive_bn",
        seed=seed,
    )
    candidates = [np.zeros(len(study.problem.sizes), dtype=np.int64)]
    candidates += [uniform_seeds(study.problem, (budget / BUDGETS[0],))[-1] for budget in BUDGETS]
    flops = study.costs["flops"](np.stack(candidates))
    work = supernet_macs(study, steps, seed)
    tuned_steps = [int(work / len(BUDGETS) / BATCH / (3 * own + flops[0])) for own in flops[1:]]

    found, seconds = [], []
    for start in (AdaptiveBN(), Compensated()):
        start.prepare(study.context)
        found.append(accuracies(start, candidates))
    for make in (AdaptiveBN, Compensated):
        began, row = time.process_time(), [found[0][0]]
        for candidate, count in zip(candidates[1:], tuned_steps, strict=True):
            tuned = FineTune(count, partial(distil, model, data["train"], lr, seed), make(), seed=seed)
            tuned.prepare(study.context)
            row += accuracies(tuned, [candidate])
        found.append(row)
        seconds.append(time.process_time() - began)
    began, wall = time.process_time(), time.perf_counter()
    supernet = Supernet(steps, data["train"], subnets=SUBNETS, lr=lr, batch_size=BATCH, seed=seed)
    supernet.prepare(study.context)
    seconds.append(time.process_time() - began)
    found.append(accuracies(supernet, candidates))
    return {
        "accuracy": found,
        "flops": (flops / flops[0]).tolist(),
        "macs": work,
        "fine_tune_steps": tuned_steps,
        "cpu_seconds": dict(zip(ROWS[2:], seconds, strict=True)),
        "supernet_wall_seconds": time.perf_counter() - wall,
    }


def section(name: str, runs: list[dict[str, Any]], steps: int) -> tuple[str, bool]:
    """The table of one network, and whether the largest candidate is good enough."""
    found = np.array([run["accuracy"] for run in runs])  # (seeds, rows, 1 + budgets)
    rows = []
    for i, label in enumerate(ROWS):
        cells = [label]
        for j in range(found.shape[2]):
            cells.append(f"{100 * found[:, i, j].mean():.1f}")
            behind = interval(found[:, -1, j] - found[:, i, j]) if len(found) > 1 and i < len(ROWS) - 1 else ""
            cells.append(behind)
        rows.append(cells)
    shares = np.mean([run["flops"] for run in runs], axis=0)
    header = ["", *(cell for share in shares for cell in (f"{share:.0%} of the FLOPs", "supernet ahead by"))]
    change = float((found[:, -1, 0] - found[:, 0, 0]).mean())
    took = {label: np.mean([run["cpu_seconds"][label] for run in runs]) for label in ROWS[2:]}
    text = (
        f"## {name}\n\n{table(header, rows)}\n\nThe largest candidate of the supernet is {100 * change:+.1f} points "
        f"from the dense network. The supernet took {steps} steps, {took['supernet']:.0f} CPU seconds "
        f"(at most {max(run['supernet_wall_seconds'] for run in runs):.0f} s by the clock), and "
        f"{np.mean([run['macs'] for run in runs]):.2e} multiply-accumulates; fine-tuning got as many, that is "
        f"{', '.join(map(str, np.mean([r['fine_tune_steps'] for r in runs], axis=0).astype(int)))} steps for the three "
        f"budgets, {took[ROWS[2]]:.0f} CPU seconds in all."
    )
    return text, change >= -MOST_BEHIND


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = "" if options == parser.parse_args([]) else f" --seeds {options.seeds} --steps {options.steps}"
    where = environment(f"python -m benchmarks.evaluators.supernet{given}")
    runs = {name: [run(name, seed, options.steps) for seed in range(options.seeds)] for name in CASES}
    sections = {name: section(name, each, options.steps) for name, each in runs.items()}
    lost = [name for name, (_, good) in sections.items() if not good]
    text = (
        f"Test accuracy in %, mean of {options.seeds} networks (own seed and split), with 95 % t-intervals over the "
        "pairs, in points. Adaptive BN leaves the transformer, which has no batch norm, as it was cut.\n\n"
        + "\n\n".join(text for text, _ in sections.values())
        + f"\n\nLargest candidate more than {100 * MOST_BEHIND:.0f} point below the dense network: "
        f"{'; '.join(lost) or 'none'}."
    )
    write("supernet", "A supernet against fine-tuning, at the same work", {"environment": where, "runs": runs}, text)


if __name__ == "__main__":
    main()
