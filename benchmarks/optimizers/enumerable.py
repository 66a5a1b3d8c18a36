"""A space small enough to evaluate whole: how far from the best is what each optimizer finds?

Run ``python -m benchmarks.optimizers.enumerable`` from the root of the repository, about 4 minutes on one thread, from
the tables in ``results/enumerable-*.npz``; ``python -m benchmarks.optimizers.enumerable --make`` makes these first (20
minutes): every candidate of four widths in each of six layers of a network trained on hard digits, judged by
`AdaptiveBN`. Candidates are ranked by validation loss, which does not tie. Exits with 1 when `auto` misses its target.

An optimizer may evaluate 5 % of the feasible candidates; what it measures of infeasible ones, to learn what a layer
costs, counts as well. Regret: loss of the best it has found within a budget less that of the best there is, as a share
of the range of losses of feasible candidates.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoprune.data.subsets import Data
from autoprune.evaluators import AdaptiveBN
from autoprune.optimizers import Knapsack, Problem, find_optimizer, uniform_seeds
from autoprune.protocols import OK, Evaluations, FloatArray, IntArray, Measurement
from autoprune.search_spaces import Channels
from autoprune.testing.contexts import study_for
from benchmarks.support.common import RESULTS, environment, table, write
from benchmarks.support.trained import trained

COMMAND = "python -m benchmarks.optimizers.enumerable"
SEEDS_OF_NETWORKS, TUNED = (0, 1, 2), 0
OPTIONS = (1.0, 0.75, 0.5, 0.25)
LIMIT, BUDGETS = 0.7, (0.35, 0.4375, 0.525, 0.6125, 0.7)
SHARE, SEEDS, MOST_REGRET = 0.05, 10, 0.005
ASK = 8
OPTIMIZERS: dict[str, Any] = {
    "random": "random",
    "nsga2": "nsga2",
    "level_switch": "level_switch",
    "bayes": "bayes",
    "knapsack": "knapsack",
    "knapsack, no evaluation": partial(Knapsack, table="prior"),
    "auto": "auto",
}


def file(seed: int) -> Path:
    """File with the table of a network."""
    return Path(RESULTS) / f"enumerable-{seed}.npz"


def make(seed: int) -> None:
    """Evaluate every candidate of the network of a seed once."""
    known = trained("vgg", seed)
    parts = {name: tuple(tensor[:512] for tensor in known.data[name]) for name in ("train", "validation", "test")}
    study = study_for(
        known.model,
        "flops <= 100%",
        Data(calibration=parts["train"], validation=parts["validation"], test=parts["test"]),
        metric="accuracy",
        space=Channels(options=OPTIONS),
        evaluator=AdaptiveBN(),
        trials=200,
    )
    candidates = study.problem.enumerate()
    rows = []
    for i, outcome in enumerate(study.evaluator.evaluate(candidates)):
        assert isinstance(outcome, Measurement), outcome
        rows.append((outcome.signal.mean(), outcome.metric.mean(), outcome.distortion.mean()))
        if i % 256 == 0:
            print(i, rows[-1], file=sys.stderr, flush=True)
    loss, accuracy, distortion = np.array(rows).T
    assert study.problem.prior is not None
    np.savez_compressed(
        file(seed),
        sizes=study.problem.sizes,
        loss=loss,
        accuracy=accuracy,
        distortion=distortion,
        flops=study.costs["flops"](candidates),
        prior=np.stack(study.problem.prior),
    )


class Table:
    """Looks evaluations up.

    Attributes:
        problem: FLOPs limited to `LIMIT` of the dense network; `trials` is what an optimizer may evaluate.
        feasible: Number of feasible candidates.
    """

    def __init__(self, seed: int) -> None:
        stored = np.load(file(seed))
        self.loss, self.distortion, self.flops = stored["loss"], stored["distortion"], stored["flops"]
        self.sizes = stored["sizes"]
        self.feasible = int((self.flops <= LIMIT * self.flops[0]).sum())
        settings: dict[str, Any] = {
            "sizes": self.sizes,
            "cost_names": ("flops",),
            "limits": np.array([LIMIT * self.flops[0]]),
            "cost_function": lambda candidates: self.flops[self.rows(candidates)][:, None],
            "trials": int(SHARE * self.feasible),
            "prior": tuple(stored["prior"]),
        }
        self.problem = Problem(**settings, seeds=uniform_seeds(Problem(**settings), (1.0, 0.75, 0.5)))

    def rows(self, candidates: IntArray) -> IntArray:
        """Rows of candidates (n, d) in the table, shape (n,)."""
        rows: IntArray = np.ravel_multi_index(tuple(candidates.T), tuple(self.sizes))
        return rows

    def evaluate(self, candidates: IntArray) -> Evaluations:
        """Return the evaluations that a search would have measured."""
        rows, n = self.rows(candidates), len(candidates)
        objectives = np.column_stack([self.loss[rows], self.flops[rows]])
        return Evaluations(
            candidates,
            objectives,
            np.zeros_like(objectives),
            np.full(n, 512),
            (OK,) * n,
            ("",) * n,
            self.distortion[rows],
        )

    def regrets(self, candidates: IntArray) -> FloatArray:
        """Regret at every budget, shape (budgets,), of what was evaluated; 1 where nothing was within the budget."""
        met = self.flops <= LIMIT * self.flops[0]
        span = self.loss[met].max() - self.loss[met].min()
        rows = self.rows(candidates)
        found = []
        for budget in BUDGETS:
            limit = budget * self.flops[0]
            own = self.loss[rows][self.flops[rows] <= limit]
            best = self.loss[self.flops <= limit].min()
            found.append((own.min() - best) / span if len(own) else 1.0)
        return np.array(found)


def run(known: Table, optimizer: Any, seed: int) -> FloatArray:
    """Regrets after every ask, shape (asks, budgets)."""
    proposer = find_optimizer(optimizer)(known.problem, seed)
    seen: list[IntArray] = []
    curve = []
    while (done := sum(map(len, seen))) < known.problem.trials:
        candidates = proposer.ask(min(ASK, known.problem.trials - done))
        if not len(candidates):
            break
        proposer.tell(known.evaluate(candidates))
        seen.append(candidates)
        curve.append(known.regrets(np.concatenate(seen)))
    return np.array(curve)


def main() -> int:
    torch.set_num_threads(1)
    where = environment(COMMAND)
    if "--make" in sys.argv:
        for seed in SEEDS_OF_NETWORKS:
            make(seed)
    sections, final, met = [], {}, True
    for network in SEEDS_OF_NETWORKS:
        known = Table(network)
        quarters = [known.problem.trials * k // 4 for k in (1, 2, 3, 4)]
        rows, own = [], {}
        for name, optimizer in OPTIMIZERS.items():
            curves = [run(known, optimizer, seed) for seed in range(SEEDS)]
            own[name] = np.median([curve[-1] for curve in curves], axis=0)
            along = [np.median([curve[min(-(-q // ASK), len(curve)) - 1].max() for curve in curves]) for q in quarters]
            rows.append((name, *(f"{100 * r:.2f}" for r in own[name]), *(f"{100 * r:.2f}" for r in along)))
            print(network, rows[-1], file=sys.stderr, flush=True)
        met &= bool((own["auto"] <= MOST_REGRET).all())
        final[network] = {name: regret.tolist() for name, regret in own.items()}
        header = ("optimizer", *(f"at {100 * b:.4g} %" for b in BUDGETS), *(f"worst after {q}" for q in quarters))
        role = "the settings of `auto` were chosen on it" if network == TUNED else "not used in tuning"
        sections.append(
            f"## Network of seed {network}: {role}\n\n{len(known.loss)} candidates, {known.feasible} within "
            f"{100 * LIMIT:g} % of the FLOPs; {known.problem.trials} evaluations.\n\n{table(header, rows)}"
        )
    text = (
        f"{SEEDS} seeds. Median regret in percent of the range of losses, at five budgets after all evaluations, then "
        "the largest of the five after fewer.\n\n" + "\n\n".join(sections) + "\n\n"
        f"Target (auto at most {100 * MOST_REGRET:g} % at each budget of each network) {'met' if met else 'NOT met'}."
    )
    results = {"environment": where, "met": met, "regrets": final}
    write("enumerable", "Regret on an enumerated space", results, text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
