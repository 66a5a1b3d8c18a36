"""Training steps that rungs save in a search with ``FineTune``, and their price, on handwritten digits.

Every search runs twice, with whole trainings for every candidate and with rungs. Candidates drawn at random are the
same in both, so it is known what those that were stopped would have scored.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import autoprune
from autoprune.evaluators import FineTune
from autoprune.pareto import hypervolume
from autoprune.protocols import RACED
from autoprune.result import SearchResult
from benchmarks.evaluators.audit import Case, demo
from benchmarks.support.common import environment, table, write
from benchmarks.support.trained import train
from examples import quickstart
from zoo import ZOO

BUDGET = "flops <= 50%"


@dataclass(frozen=True)
class Pair:
    """One search without rungs and one with them.

    Attributes:
        steps: Training steps taken, relative to whole trainings of all candidates.
        stopped: Candidates whose training was stopped, of all trials.
        lost: Of the candidates on the front without rungs, how many were stopped; None if other ones were proposed.
        front: Candidates on the front without rungs.
        volume: Hypervolume of the front in loss and FLOPs, relative to that without rungs.
        validation: Score of the best candidate on validation data, without rungs and with them.
        test: The same candidates on held-out data.
        cpu: CPU time relative to the search without.
    """

    optimizer: str
    seed: int
    steps: float
    stopped: int
    lost: int | None
    front: int
    volume: float
    validation: tuple[float, float]
    test: tuple[float, float]
    cpu: float


def layers() -> Case:
    """A network of linear layers for the same digits, which trains in a second."""
    data = {name: (x.flatten(1), y) for name, (x, y) in quickstart.digits().items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ZOO["mlp"].build()
        train(model, data["train"], epochs=20, lr=0.01)
    return model, data, lambda small: train(small, data["train"], epochs=4, lr=0.003)


NETWORKS = {"demo": demo, "layers": layers}


def search(
    case: Case, seed: int, trials: int, optimizer: str, steps: int, **options: Any
) -> tuple[SearchResult, float]:
    """A search with fine-tuning, and its CPU seconds."""
    model, data, _ = case
    samples = autoprune.Data(calibration=data["train"], validation=data["validation"], test=data["test"])
    began = time.process_time()
    result = autoprune.search(
        model,
        BUDGET,
        samples,
        trials=trials,
        seed=seed,
        optimizer=optimizer,
        evaluator=FineTune(steps=steps),
        execution=autoprune.Execution(progress=False),
        **options,
    )
    return result, time.process_time() - began


def pair(case: Case, seed: int, trials: int, optimizer: str, steps: int) -> Pair:
    """Search without and with rungs."""
    full, full_cpu = search(case, seed, trials, optimizer, steps)
    short, short_cpu = search(case, seed, trials, optimizer, steps, early_stopping=autoprune.Rungs())
    taken = [max(one.steps or steps for one in trial.evaluations) for trial in short.trials]
    stopped = {trial.candidate for trial in short.trials if trial.status == RACED}
    same = {trial.candidate for trial in full.trials} == {trial.candidate for trial in short.trials}
    best = [result.best() for result in (full, short)]
    return Pair(
        optimizer=optimizer,
        seed=seed,
        steps=float(np.mean(taken) / steps),
        stopped=len(stopped),
        lost=sum(trial.candidate in stopped for trial in full.front) if same else None,
        front=len(full.front),
        volume=_volume(short, full) / _volume(full, full),
        validation=(best[0].score, best[1].score),
        test=(float(best[0].test_score or 0), float(best[1].test_score or 0)),
        cpu=short_cpu / full_cpu,
    )


def _volume(result: SearchResult, full: SearchResult) -> float:
    """Hypervolume in units of the largest loss and cost of any trial without rungs."""
    most = np.max([(trial.signal, trial.costs["flops"]) for trial in full.trials], axis=0)
    return hypervolume([(trial.signal, trial.costs["flops"]) / most for trial in result.front], [1.0, 1.0])


def report(pairs: list[Pair], trials: int) -> str:
    """A row for each pair."""
    header = ["optimizer", "seed", "training steps", "stopped", "of the front", "hypervolume", "CPU time"]
    header += ["best, validation", "the same, held out"]
    rows = [
        [
            p.optimizer,
            p.seed,
            f"{p.steps:.0%}",
            f"{p.stopped} of {trials}",
            "" if p.lost is None else f"{p.lost} of {p.front}",
            f"{p.volume:.1%}",
            f"{p.cpu:.2f}",
            *(f"{100 * a:.2f} to {100 * b:.2f} %" for a, b in (p.validation, p.test)),
        ]
        for p in pairs
    ]
    return table(header, rows)


def main() -> None:
    """Run all pairs and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--network", default="demo", choices=NETWORKS)
    parser.add_argument("--optimizers", nargs="+", default=["random"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = (
        f"python -m benchmarks.evaluators.rungs --seeds {arguments.seeds} --trials {arguments.trials} "
        f"--steps {arguments.steps} "
        f"--network {arguments.network} --optimizers {' '.join(arguments.optimizers)}"
    )
    results: dict[str, Any] = {"environment": environment(command)}
    case, pairs = NETWORKS[arguments.network](), []
    for seed in range(arguments.seeds):
        for optimizer in arguments.optimizers:
            pairs.append(pair(case, seed, arguments.trials, optimizer, arguments.steps))
            print(pairs[-1], flush=True)
    results["pairs"] = [asdict(p) for p in pairs]
    rungs = ", ".join(map(str, autoprune.Rungs().steps(arguments.steps)))
    text = (
        f"Network {arguments.network!r} on clean digits, {arguments.trials} trials under {BUDGET}, rungs at {rungs} "
        "steps. Hypervolume and CPU time are relative to the search without rungs; scores are its accuracy and then "
        f"that with rungs.\n\n{report(pairs, arguments.trials)}"
    )
    write("rungs" if arguments.network == "demo" else f"rungs_{arguments.network}", "Rungs", results, text)


if __name__ == "__main__":
    main()
