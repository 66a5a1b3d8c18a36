"""Cases of `equal_evaluations`: problems with known answers, and trained networks scored as by default."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from autoprune.data.subsets import Data
from autoprune.optimizers import Problem, uniform_seeds
from autoprune.pareto import hypervolume, non_dominated
from autoprune.protocols import OK, Evaluations, FloatArray, IntArray, Measurement
from autoprune.search_spaces import Channels
from autoprune.study.study import Study
from autoprune.testing.contexts import study_for
from autoprune.testing.problems import (
    KnownProblem,
    additive_problem,
    blocks_problem,
    deceptive,
    interacting,
    noisy,
    product_problem,
    staircase_problem,
    table_problem,
)
from benchmarks.support.trained import trained

STORE = Path("runs") / "optimizers"
LIMIT = "flops <= 50%"
CALIBRATION, VALIDATION = 256, 512
STARTS = (1.0, 0.75, 0.5)  # shares of the limit that uniform pruning just meets: what `autoprune.search` starts from


@dataclass(frozen=True, eq=False)
class Case:
    """A problem, and how a search of it is judged.

    Attributes:
        problem: Without seeds.
        evaluate: What an optimizer is told of candidates (n, d).
        loss: The exact loss of candidates (n, d), shape (n,).
        dense: The loss of the dense model.
    """

    problem: Problem
    evaluate: Callable[[IntArray], Evaluations]
    loss: Callable[[IntArray], FloatArray]
    dense: float

    @cached_property
    def starts(self) -> IntArray:
        """The dense model where it is feasible, and uniform pruning."""
        return uniform_seeds(self.problem, STARTS)

    @cached_property
    def uniform(self) -> dict[float, float]:
        """Loss of uniform pruning at shares of the limits, in addition to that of the dense model."""
        found = {share: uniform_seeds(self.problem, (share,))[-1:] for share in (1.0, 0.5)}
        return {share: float(self.loss(candidate)[0]) - self.dense for share, candidate in found.items()}

    def volume(self, seen: IntArray) -> float:
        """Hypervolume of the front of candidates (n, d) that a user would be shown, by exact losses, from 0 to 1.

        The box lies between the loss of the dense model at the lowest cost of the budget range, and uniform pruning
        there at the limits. What costs less than the budget range asks for counts as if it cost that much.
        """
        low, high = self.problem.budget_range.T
        feasible = seen[self.problem.feasible(seen)]
        told = self.evaluate(feasible).objectives
        told[:, 1:] = np.maximum(told[:, 1:], low)
        front = non_dominated(told)
        lost = (self.loss(feasible[front]) - self.dense) / self.uniform[0.5]
        floor = np.concatenate([[0.0], low / high])
        points = np.column_stack([np.maximum(lost, 0.0), told[front, 1:] / high])
        reference = np.concatenate([[1.0], np.full(len(low), 1.0 + 1e-9)])
        return hypervolume(points, reference) / float(np.prod(reference - floor))

    def best(self, seen: IntArray, share: float) -> float:
        """Exact loss of the best of candidates (n, d) in a share of the limits, as a share of uniform pruning's there.

        With nothing found there, the cheapest candidate counts.
        """
        limits = np.maximum(share * self.problem.limits, self.problem.costs(self.problem.cheapest[None])[0])
        within = seen[self.problem.feasible(seen, limits)]
        chosen = self.problem.cheapest
        if len(within):
            chosen = within[self.evaluate(within).objectives[:, 0].argmin()]
        return (float(self.loss(chosen[None])[0]) - self.dense) / self.uniform[share]


def known_case(known: KnownProblem) -> Case:
    return Case(known.problem, known.evaluate, known.loss, dense=0.0)


def study_of(network: str, budget: str, space: Channels) -> Study:
    """A trained network with its data, laid out as `autoprune.search` does."""
    made = trained(network, seed=0)
    parts = {"train": CALIBRATION, "validation": VALIDATION, "test": VALIDATION}
    own = {name: tuple(tensor[:count] for tensor in made.data[name]) for name, count in parts.items()}
    return study_for(
        made.model,
        budget,
        Data(calibration=own["train"], validation=own["validation"], test=own["test"]),
        metric="accuracy",
        space=space,
    )


class Stored:
    """Evaluations of a network, each made once: only their order matters here.

    The file is named after the weights, the options and the evaluator, so that others do not meet these scores.
    """

    def __init__(self, network: str) -> None:
        self.study = study_of(network, LIMIT, Channels())
        digest = hashlib.sha1(self.study.problem.sizes.tobytes())
        for parameter in self.study.context.model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        STORE.mkdir(parents=True, exist_ok=True)
        name = f"{network}-{type(self.study.evaluator).__name__}-{digest.hexdigest()[:8]}.sqlite"
        self._file = sqlite3.connect(STORE / name)
        self._file.execute("CREATE TABLE IF NOT EXISTS seen (candidate BLOB PRIMARY KEY, loss, stderr, distortion)")

    def measure(self, candidates: IntArray) -> FloatArray:
        """Loss, its standard error and distortion of candidates (n, d), shape (n, 3)."""
        return np.array([self._row(candidate) for candidate in candidates]).reshape(-1, 3)

    def _row(self, candidate: IntArray) -> tuple[float, float, float]:
        key = candidate.tobytes()
        query = "SELECT loss, stderr, distortion FROM seen WHERE candidate = ?"
        found: tuple[float, float, float] | None = self._file.execute(query, (key,)).fetchone()
        if found is None:
            (outcome,) = self.study.evaluator.evaluate(candidate[None])
            assert isinstance(outcome, Measurement), outcome
            signal = outcome.signal
            found = (signal.mean(), signal.std(ddof=1) / len(signal) ** 0.5, outcome.distortion.mean())
            with self._file:
                self._file.execute("INSERT INTO seen VALUES (?, ?, ?, ?)", (key, *map(float, found)))
        return found

    def evaluate(self, candidates: IntArray) -> Evaluations:
        """Return the evaluations that a search would tell its optimizer."""
        n, measured = len(candidates), self.measure(candidates)
        objectives = np.column_stack([measured[:, 0], self.study.problem.costs(candidates)])
        stderr = np.zeros_like(objectives)
        stderr[:, 0] = measured[:, 1]
        return Evaluations(candidates, objectives, stderr, np.full(n, VALIDATION), (OK,) * n, ("",) * n, measured[:, 2])


@cache
def network_case(network: str) -> Case:
    stored = Stored(network)
    problem = replace(stored.study.problem, seeds=None)
    dense = np.zeros((1, len(problem.sizes)), dtype=np.int64)
    return Case(problem, stored.evaluate, lambda c: stored.measure(c)[:, 0], float(stored.measure(dense)[0, 0]))


WIDE = [16] * 24
KNOWN: dict[str, Callable[[int], KnownProblem]] = {
    "small": lambda seed: product_problem([8] * 8, seed),
    "additive": lambda seed: additive_problem(WIDE, seed),
    "product": lambda seed: product_problem(WIDE, seed),
    "staircase": lambda seed: staircase_problem(WIDE, seed),
    "table": lambda seed: table_problem([8] * 24, seed, budget=0.6),
    "blocks": lambda seed: blocks_problem(8, seed),
    "interacting": lambda seed: interacting(product_problem(WIDE, seed), seed),
    "noisy": lambda seed: noisy(staircase_problem(WIDE, seed), seed),
    "large": lambda seed: interacting(product_problem([16] * 60, seed), seed),
    "deceptive": lambda seed: deceptive(product_problem(WIDE, seed), seed),
}
"""The problem of each seed; `small` is for samplers that take seconds for each candidate."""

NETWORKS = ("resnet20", "mobilenet_v2")
DECEPTIVE = ("deceptive",)
CASES: dict[str, Callable[[int], Case]] = {
    **{name: (lambda seed, make=make: known_case(make(seed))) for name, make in KNOWN.items()},
    **{name: (lambda seed, name=name: network_case(name)) for name in NETWORKS},
}
