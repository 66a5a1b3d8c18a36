"""Do losses of single layers add up? Summed against joint losses of trained networks, for widths and for zeros.

Run ``python -m benchmarks.optimizers.additivity`` from the root of the repository, about 2 minutes on one thread. On
each network every single change is measured, then 100 random candidates under a budget, all in one `autoprune.search`,
and `SearchResult.additivity` says how the sums go with what was measured.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import autoprune
from autoprune.data.subsets import Data
from autoprune.optimizers import Problem
from autoprune.optimizers.random import draw
from autoprune.protocols import Evaluations, FloatArray, IntArray
from autoprune.result import SearchResult
from autoprune.search_spaces import Channels, Sparsity
from benchmarks.support.common import environment, table, write
from benchmarks.support.trained import NETWORKS, trained

COMMAND = "python -m benchmarks.optimizers.additivity"
CALIBRATION, VALIDATION = 256, 512
ASSEMBLED, RESAMPLED = 100, 1000
MEASURED = {"distortion": "distortion", "signal": "loss", "metric": "accuracy"}
SPACES: dict[str, tuple[Any, str]] = {
    "channels": (Channels(step=0.125), "flops <= 50%"),
    "sparsity": (Sparsity(levels=(0.0, 0.5, 0.7, 0.8, 0.9)), "nonzero_params <= 30%"),
}


class Script:
    """Asks for every single change, feasible or not, then for random feasible candidates."""

    def __init__(self, problem: Problem, seed: int) -> None:
        d = len(problem.sizes)
        alone = [option * np.eye(d, dtype=np.int64)[j] for j in range(d) for option in range(1, problem.sizes[j])]
        drawn = np.unique(draw(problem, 2 * ASSEMBLED, np.random.default_rng(seed)), axis=0)
        self._waiting = np.concatenate([alone, np.random.default_rng(seed).permutation(drawn)[:ASSEMBLED]])

    def ask(self, n: int) -> IntArray:
        asked, self._waiting = self._waiting[:n], self._waiting[n:]
        return asked

    def tell(self, evaluations: Evaluations) -> None:
        pass


def measured(network: str, space: str) -> SearchResult:
    """A search that measures what the script asks for."""
    made = trained(network, seed=0)
    settings, budget = SPACES[space]
    calibration, validation = (
        tuple(tensor[:count] for tensor in made.data[part])
        for part, count in (("train", CALIBRATION), ("validation", VALIDATION))
    )
    return autoprune.search(
        made.model,
        budget,
        Data(calibration=calibration, validation=validation, test=made.data["test"]),
        metric="accuracy",
        space=settings,
        evaluator="adaptive_bn",
        optimizer=Script,
        trials=10**6,  # the script ends by itself
        execution=autoprune.Execution(progress=False),
    )


def interval(summed: FloatArray, joint: FloatArray) -> FloatArray:
    """95 % interval of the rank correlation, by resampling candidates."""
    rng = np.random.default_rng(0)
    rows = rng.integers(len(joint), size=(RESAMPLED, len(joint)))
    return np.quantile([spearmanr(summed[row], joint[row]).statistic for row in rows], [0.025, 0.975])


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {"environment": environment(COMMAND), "fits": []}
    rows = []
    for network in NETWORKS:
        for space, (_, budget) in SPACES.items():
            result = measured(network, space)
            name = budget.split()[0]
            joint = [t for t in result.trials if t.feasible and np.count_nonzero(t.candidate) > 1]
            cost = np.array([t.costs[name] for t in joint])
            for key, fit in result.additivity().fits.items():
                low, high = interval(fit.summed, fit.joint)
                assert len(fit.joint) == len(cost)
                alone = float(spearmanr(-cost, fit.joint).statistic)
                figures = {"r2": fit.r2, "slope": fit.slope, "spearman": fit.spearman, "interval": [low, high]}
                figures |= {
                    "cost alone": alone,
                    "summed": fit.summed.round(4).tolist(),
                    "joint": fit.joint.round(4).tolist(),
                }
                results["fits"].append({"network": network, "space": space, "of": MEASURED[key], **figures})
                ranked = f"{fit.spearman:.2f} [{low:.2f}, {high:.2f}]"
                means = (f"{fit.summed.mean():.2f}", f"{fit.joint.mean():.2f}")
                row = (f"{fit.r2:.2f}", f"{fit.slope:.2f}", ranked, f"{alone:.2f}", *means, len(fit.joint))
                rows.append((network, budget, MEASURED[key], *row))
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    header = (
        "network",
        "budget",
        "of",
        "R2",
        "slope",
        "Spearman",
        "cost alone",
        "mean sum",
        "mean joint",
        "candidates",
    )
    text = (
        f"Up to {ASSEMBLED} random candidates between half the budget and the budget: what they lose against the sum "
        "of what each of their options loses alone, in outputs (KL divergence in nats), validation loss (nats) and "
        "accuracy (share). R2 and slope of a line; rank correlation with a 95 % interval from resampling candidates, "
        f"and that of the cost alone. Networks on hard digits, {CALIBRATION} calibration and {VALIDATION} validation "
        f"samples.\n\n{table(header, rows)}"
    )
    write("additivity", "Do losses of single layers add up?", results, text)


if __name__ == "__main__":
    main()
