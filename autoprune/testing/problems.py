"""Search problems with known answers: separable losses over costs of every shape that a budget may meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from autoprune.optimizers.problem import Problem
from autoprune.protocols import FAILED, OK, RACED, Evaluations, FloatArray, IntArray


@final
@dataclass(frozen=True, eq=False)
class KnownProblem:
    """A problem together with the objective that its optimizer does not see.

    Attributes:
        problem: What the optimizer is given.
        losses: Loss of each option of each dimension, 0 for dense; the losses of a candidate add up.
    """

    problem: Problem
    losses: tuple[FloatArray, ...]

    def loss(self, candidates: IntArray) -> FloatArray:
        """The exact loss of candidates (n, d), shape (n,)."""
        return _total(self.losses, self.problem.canonical(candidates))

    def evaluate(self, candidates: IntArray, status: str = OK, reason: str = "") -> Evaluations:
        """Evaluations of candidates (n, d): loss and costs, all rows with one `status`; NaN if it is ``"failed"``."""
        n = len(candidates)
        losses = self.loss(candidates) if status != FAILED else np.full(n, np.nan)
        objectives = np.column_stack([losses, self.problem.costs(candidates)])
        if status == FAILED:
            objectives = np.full_like(objectives, np.nan)
        samples = np.full(n, {OK: 100, RACED: 10, FAILED: 0}[status])
        exact = np.zeros_like(objectives)
        return Evaluations(candidates, objectives, exact, samples, (status,) * n, (reason,) * n, losses)

    def feasible_candidates(self) -> IntArray:
        """Every canonical feasible candidate of a small space, without duplicates, shape (n, d)."""
        everything = np.unique(self.problem.canonical(self.problem.enumerate()), axis=0)
        return everything[self.problem.feasible(everything)]


def additive_problem(sizes: Sequence[int], seed: int, budget: float = 0.5) -> KnownProblem:
    """Cost adds up over the dimensions and falls evenly along the options, as with numbers of weights."""
    weights = np.random.default_rng(seed).lognormal(0.0, 1.0, len(sizes))
    tables = tuple(w * _widths(size) for w, size in zip(weights, sizes, strict=True))
    return _known(sizes, seed, budget, ("params",), lambda candidates: _total(tables, candidates)[:, None])


def product_problem(sizes: Sequence[int], seed: int, budget: float = 0.5) -> KnownProblem:
    """A chain of layers: MACs are sums of products of neighbouring widths; both MACs and widths are limited."""
    weights = np.random.default_rng(seed).lognormal(0.0, 1.0, len(sizes) + 1)
    tables = tuple(_widths(size) for size in sizes)

    def costs(candidates: IntArray) -> FloatArray:
        widths = np.stack([table[candidates[:, j]] for j, table in enumerate(tables)], axis=1)
        ends = np.ones((len(widths), 1))
        flops = (np.hstack([ends, widths]) * np.hstack([widths, ends])) @ weights
        return np.stack([flops, widths.sum(axis=1)], axis=1)

    return _known(sizes, seed, budget, ("flops", "width"), costs)


def staircase_problem(sizes: Sequence[int], seed: int, budget: float = 0.5) -> KnownProblem:
    """Latency of a device that rounds every width up to the next quarter: most single steps save nothing."""
    weights = np.random.default_rng(seed).lognormal(0.0, 1.0, len(sizes))
    tables = tuple(w * np.ceil(4 * _widths(size)) for w, size in zip(weights, sizes, strict=True))
    return _known(sizes, seed, budget, ("latency_ms",), lambda candidates: _total(tables, candidates)[:, None])


def table_problem(sizes: Sequence[int], seed: int, budget: float = 0.5) -> KnownProblem:
    """Measured tables that are not monotone: a narrower layer may cost more, and the last option is rarely cheapest."""
    rng = np.random.default_rng(seed)
    tables = tuple(_widths(size) * rng.uniform(0.5, 2.0, size) + rng.uniform(0.0, 0.3, size) for size in sizes)
    return _known(sizes, seed, budget, ("energy_mj",), lambda candidates: _total(tables, candidates)[:, None])


def blocks_problem(blocks: int, seed: int, budget: float = 0.5) -> KnownProblem:
    """Blocks of two widths that may be dropped whole, which makes the widths irrelevant, and a choice without an order.

    Dimensions: for each block whether it is dropped and two widths of five options, then four unordered variants.
    """
    rng = np.random.default_rng(seed)
    weights, variants = rng.lognormal(0.0, 1.0, blocks), rng.uniform(0.3, 1.5, 4)

    def canonical(candidates: IntArray) -> IntArray:
        relevant = np.ones_like(candidates)
        relevant[:, 1:-1:3] = relevant[:, 2:-1:3] = 1 - candidates[:, 0:-1:3]
        return candidates * relevant

    def costs(candidates: IntArray) -> FloatArray:
        widths = 1 - candidates / 5
        flops = ((1 - candidates[:, 0:-1:3]) * widths[:, 1:-1:3] * widths[:, 2:-1:3]) @ weights
        return (flops + variants[candidates[:, -1]])[:, None]

    ordered = np.array([True] * 3 * blocks + [False])
    return _known([2, 5, 5] * blocks + [4], seed, budget, ("flops",), costs, ordered, canonical)


PROBLEMS: dict[str, Callable[..., KnownProblem]] = {
    "additive": additive_problem,
    "product": product_problem,
    "staircase": staircase_problem,
    "table": table_problem,
}
"""The kinds of cost, by name: functions of (sizes, seed, budget)."""


def _known(
    sizes: Sequence[int],
    seed: int,
    budget: float,
    names: tuple[str, ...],
    cost_function: Callable[[IntArray], FloatArray],
    ordered: NDArray[np.bool_] | None = None,
    canonical: Callable[[IntArray], IntArray] | None = None,
) -> KnownProblem:
    limits = budget * cost_function(np.zeros((1, len(sizes)), dtype=np.int64))[0]
    problem = Problem(np.array(sizes), names, limits, cost_function)
    if ordered is not None and canonical is not None:
        problem = replace(problem, ordered=ordered, canonical=canonical)
    rng = np.random.default_rng([seed, 1])
    importance, bend = rng.lognormal(0.0, 1.0, len(sizes)), rng.uniform(1.0, 3.0, len(sizes))
    losses = tuple(a * (1 - _widths(size)) ** b for a, b, size in zip(importance, bend, sizes, strict=True))
    return KnownProblem(problem, losses)


def _widths(size: int) -> FloatArray:
    """Relative width of each option, from 1 down to 1/size."""
    return np.arange(size, 0, -1) / size


def _total(tables: Sequence[FloatArray], candidates: IntArray) -> FloatArray:
    total = np.zeros(len(candidates))
    for table, options in zip(tables, candidates.T, strict=True):
        total += table[options]
    return total
