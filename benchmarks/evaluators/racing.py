"""Savings of racing, and its choice compared with that of full evaluation: a trained network, ten seeds.

A seed draws the samples of the search, their order, and what the optimizer does. Every search runs twice, with all
samples for every candidate and with racing; afterwards each candidate that was dropped is scored on all samples, to see
whether it was dropped rightly. Pairs are kept, and those that are there for the same settings are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import autoprune
from autoprune.optimizers import Problem
from autoprune.protocols import RACED, Evaluations, IntArray
from autoprune.result import SearchResult
from benchmarks.support.common import RESULTS, environment, table, write
from benchmarks.support.trained import Trained, trained

STORED = RESULTS / "racing.json"
BUDGETS = (50, 45, 40, 35, 30)
"""Per cent of the FLOPs; the search has the first, and the best candidates within each are compared."""
OPTIMIZERS = ("random", "nsga2", "level_switch", "auto")
TOLERANCE = 0.01
"""Largest loss of the metric allowed for a chosen candidate, on validation data: 1 point of accuracy."""


class Listed:
    """An optimizer that asks for given candidates."""

    def __init__(self, candidates: IntArray) -> None:
        self.left = candidates

    def ask(self, n: int) -> IntArray:
        """Return the next ones."""
        asked, self.left = self.left[:n], self.left[n:]
        return asked

    def tell(self, evaluations: Evaluations) -> None:
        """Nothing to learn."""


@dataclass(frozen=True)
class Pair:
    """One search without racing and one with it.

    Attributes:
        validation: Validation score of the raced search's choice less that of the other, for each of `BUDGETS`.
        test: The same on held-out data, for the search's own budget.
        dropped: Candidates dropped of all trials.
        wrong: Of these, how many score no worse on all samples than the trial that they lost against.
        validation_share: Validation samples scored, of all trials times all samples.
        share: The same with calibration samples.
        cpu: CPU time of the raced search relative to the other.
    """

    optimizer: str
    seed: int
    trials: int
    validation: tuple[float, ...]
    test: float
    dropped: int
    wrong: int
    validation_share: float
    share: float
    cpu: float


def search(case: Trained, seed: int, trials: int, **options: Any) -> tuple[SearchResult, float]:
    """A search at half of the FLOPs, and its CPU seconds."""
    data = autoprune.Data(calibration=case.data["train"], validation=case.data["validation"], test=case.data["test"])
    began = time.process_time()
    result = autoprune.search(
        case.model,
        f"flops <= {BUDGETS[0]}%",
        data,
        trials=trials,
        seed=seed,
        execution=autoprune.Execution(progress=False),
        **options,
    )
    return result, time.process_time() - began


def pair(case: Trained, optimizer: str, seed: int, trials: int, evaluator: str) -> Pair:
    """Search without and with racing, and check what was dropped."""
    (full, full_cpu), (raced, raced_cpu) = (
        search(case, seed, trials, optimizer=optimizer, evaluator=evaluator, early_stopping=racing)
        for racing in (False, True)
    )
    lost = [trial for trial in raced.trials if trial.status == RACED]
    samples = np.array([trial.evaluations[-1].samples for trial in raced.trials])
    calibration = autoprune.Data().samples("calibration")
    return Pair(
        optimizer=optimizer,
        seed=seed,
        trials=len(raced.trials),
        validation=tuple(chosen(raced, budget) - chosen(full, budget) for budget in BUDGETS),
        test=float(raced.best().test_score or 0) - float(full.best().test_score or 0),
        dropped=len(lost),
        wrong=wrongly_dropped(case, seed, raced, evaluator) if lost else 0,
        validation_share=float(samples.mean() / samples.max()),
        share=float((samples.mean() + calibration) / (samples.max() + calibration)),
        cpu=raced_cpu / full_cpu,
    )


def chosen(result: SearchResult, budget: int) -> float:
    """Validation score of the best candidate within a budget; NaN if there is none."""
    try:
        return result.best(f"flops <= {budget}%").score
    except autoprune.InfeasibleBudgetError:
        return float("nan")


def wrongly_dropped(case: Trained, seed: int, raced: SearchResult, evaluator: str) -> int:
    """Score what was dropped on all samples, and compare with the trials that it lost against."""
    lost = [trial for trial in raced.trials if trial.status == RACED]
    candidates = np.array([trial.candidate for trial in lost], dtype=np.int64)

    def listed(problem: Problem, seed: int) -> Listed:
        return Listed(candidates)

    full, _ = search(case, seed, len(lost), optimizer=listed, evaluator=evaluator)
    signal = {trial.id: trial.signal for trial in raced.trials}
    rivals = [signal[int(trial.reason.split()[3])] for trial in lost]
    return sum(trial.signal <= rival for trial, rival in zip(full.trials, rivals, strict=True))


def report(pairs: Iterable[Pair]) -> str:
    """One row for each optimizer."""
    rows = []
    groups = {name: [p for p in pairs if p.optimizer == name] for name in OPTIMIZERS}
    for name, found in ((name, found) for name, found in groups.items() if found):
        differences = np.array([p.validation for p in found])
        differences = differences[np.isfinite(differences)]
        rows.append(
            [
                name,
                len(found),
                f"{np.mean([p.dropped / p.trials for p in found]):.0%}",
                sum(p.wrong for p in found),
                f"{np.mean([p.validation_share for p in found]):.0%}",
                f"{np.mean([p.share for p in found]):.0%}",
                f"{np.mean([p.cpu for p in found]):.2f}",
                f"{100 * differences.mean():+.2f}",
                f"{100 * differences.min():+.2f}",
                f"{np.mean(differences >= -TOLERANCE):.0%}",
                f"{100 * np.mean([p.test for p in found]):+.2f}",
            ]
        )
    header = ["optimizer", "seeds", "dropped", "wrongly", "validation samples", "with calibration", "CPU time"]
    header += ["validation, mean", "worst", f"within {100 * TOLERANCE:g} point", "held out, mean"]
    return table(header, rows)


def main() -> None:
    """Run all pairs and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--evaluator", default="adaptive_bn", choices=("adaptive_bn", "compensated"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = (
        f"python -m benchmarks.evaluators.racing --seeds {arguments.seeds} --trials {arguments.trials} "
        f"--network {arguments.network} --evaluator {arguments.evaluator} --optimizers {' '.join(arguments.optimizers)}"
    )
    settings = {"trials": arguments.trials, "network": arguments.network, "evaluator": arguments.evaluator}
    results: dict[str, Any] = {"environment": environment(command), "settings": settings}
    case = trained(arguments.network, 0)
    pairs = stored(settings)
    for seed in range(arguments.seeds):
        for optimizer in arguments.optimizers:
            if not any((p.optimizer, p.seed) == (optimizer, seed) for p in pairs):
                pairs.append(pair(case, optimizer, seed, arguments.trials, arguments.evaluator))
                results["pairs"] = [asdict(p) for p in pairs]
                write("racing", "Racing", results, text_of(case, pairs, arguments.trials, arguments.evaluator))


def stored(settings: dict[str, Any]) -> list[Pair]:
    """The pairs of earlier runs with the same settings."""
    found = json.loads(STORED.read_text()) if STORED.exists() else {}
    rows = found["pairs"] if found.get("settings") == settings else []
    return [Pair(**row | {"validation": tuple(row["validation"])}) for row in rows]


def text_of(case: Trained, pairs: Iterable[Pair], trials: int, evaluator: str) -> str:
    """Text of the report."""
    budgets = ", ".join(map(str, BUDGETS))
    return (
        f"{case.name}, {evaluator}, {trials} trials at {BUDGETS[0]} % of the FLOPs, delta 0.05. Differences are raced "
        f"less full, in points of accuracy, of the best candidates within {budgets} % of the FLOPs.\n\n"
        f"{report(pairs)}"
    )


if __name__ == "__main__":
    main()
