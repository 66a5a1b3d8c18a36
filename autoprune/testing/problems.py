"""Search problems with known answers: costs of every shape that a budget may meet, under landscapes of losses.

The problems have separable losses, whose additive optimum is the true one. `interacting`, `deceptive` and `noisy` put
another landscape over the costs of any of them. `KnownProblem.best` is the answer of those that can be enumerated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from autoprune.optimizers.problem import Problem, uniform_seeds
from autoprune.protocols import FAILED, OK, RACED, Evaluations, FloatArray, IntArray


def _nothing(candidates: IntArray) -> FloatArray:
    return np.zeros(len(candidates))


@final
@dataclass(frozen=True, eq=False)
class KnownProblem:
    """Problem together with the objective that its optimizer does not see.

    Attributes:
        problem: The problem given to the optimizer.
        losses: Loss of each option of each dimension alone, 0 for dense.
        joint: Loss of canonical candidates (n, d) in addition to the sum of these, shape (n,); 0 for single changes.
        noise: Standard deviation of the error of a full evaluation, in the unit of the losses.
        noise_seed: Seed of the errors.
    """

    problem: Problem
    losses: tuple[FloatArray, ...]
    joint: Callable[[IntArray], FloatArray] = _nothing
    noise: float = 0.0
    noise_seed: int = 0

    def loss(self, candidates: IntArray) -> FloatArray:
        """Compute the exact loss of candidates (n, d), shape (n,)."""
        canonical = self.problem.canonical(candidates)
        return _total(self.losses, canonical) + self.joint(canonical)

    def evaluate(self, candidates: IntArray, status: str = OK, reason: str = "") -> Evaluations:
        """Evaluate candidates (n, d): loss and costs, all rows with one `status`; NaN if it is ``"failed"``.

        With noise, a candidate has the same error in every evaluation, as on a fixed set of samples; the error of raced
        ones, on a tenth of the samples, is larger by the square root of ten. The distortion equals the loss.
        """
        n = len(candidates)
        samples = np.full(n, {OK: 100, RACED: 10, FAILED: 0}[status])
        stderr = np.zeros((n, 1 + len(self.problem.limits)))
        if status == FAILED:
            losses, objectives = np.full(n, np.nan), np.full_like(stderr, np.nan)
        else:
            stderr[:, 0] = self.noise * np.sqrt(100 / samples)
            losses = self.loss(candidates) + stderr[:, 0] * self._errors(candidates)
            objectives = np.column_stack([losses, self.problem.costs(candidates)])
        return Evaluations(candidates, objectives, stderr, samples, (status,) * n, (reason,) * n, losses)

    def _errors(self, candidates: IntArray) -> FloatArray:
        """Standard normal, one for each candidate (n, d), shape (n,)."""
        if not self.noise:
            return np.zeros(len(candidates))
        canonical = self.problem.canonical(candidates).tolist()
        return np.array([np.random.default_rng([self.noise_seed, *row]).standard_normal() for row in canonical])

    def best(self, limits: FloatArray | None = None) -> IntArray:
        """Find the candidate of least exact loss within `limits`, by default the problem's, shape (d,); enumerates."""
        candidates = self.feasible_candidates()
        within = candidates[self.problem.feasible(candidates, limits)]
        best: IntArray = within[self.loss(within).argmin()]
        return best

    def feasible_candidates(self) -> IntArray:
        """Every canonical feasible candidate of a small space, without duplicates, shape (n, d)."""
        everything = np.unique(self.problem.canonical(self.problem.enumerate()), axis=0)
        return everything[self.problem.feasible(everything)]


def additive_problem(sizes: Sequence[int], seed: int, budget: float = 0.5) -> KnownProblem:
    """Make a problem whose cost is a sum over the dimensions and falls evenly along the options, like parameters."""
    weights = np.random.default_rng(seed).lognormal(0.0, 1.0, len(sizes))
    tables = tuple(w * _widths(size) for w, size in zip(weights, sizes, strict=True))
    return _known(sizes, seed, budget, ("params",), lambda candidates: _total(tables, candidates)[:, None])


def product_problem(sizes: Sequence[int], seed: int, budget: float = 0.5) -> KnownProblem:
    """A chain of layers: MACs are sums of products of neighbouring widths; both MACs and widths are limited."""
    weights = np.random.default_rng(seed).lognormal(0.0, 1.0, len(sizes) + 1)
    options = np.array(sizes)

    def costs(candidates: IntArray) -> FloatArray:
        widths = (options - candidates) / options
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
    weights = rng.lognormal(0.0, 1.0, blocks)
    variants = rng.uniform(0.3, 1.5, 4)

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


def interacting(known: KnownProblem, seed: int, strength: float = 0.8) -> KnownProblem:
    """Add interactions: neighbouring dimensions lose more together, or less, by up to `strength` of their mean loss.

    The geometric mean of two losses, times a factor from -`strength` to `strength` for each pair of neighbours, so the
    loss of a candidate is between 1 - `strength` and 1 + `strength` of the sum of single losses.
    """
    factors = np.random.default_rng([seed, 2]).uniform(-strength, strength, len(known.losses) - 1)

    def joint(candidates: IntArray) -> FloatArray:
        roots = np.sqrt([row[options] for row, options in zip(known.losses, candidates.T, strict=True)])
        extra: FloatArray = factors @ (roots[:-1] * roots[1:])
        return extra

    return replace(known, joint=joint)


def deceptive(known: KnownProblem, seed: int, share: float = 0.5) -> KnownProblem:
    """Add traps: in a share of the pairs of neighbours, removing one alone is ruinous, and removing both nearly free.

    In such a trap the losses of either dimension are scaled up, to three times those of it or the median dimension at
    the last option, so that single changes discourage it. Only with both at their last option is the loss at most a
    twentieth of the original one. Every dimension needs at least two options.
    """
    d = len(known.losses)
    first = 2 * np.random.default_rng([seed, 3]).permutation(d // 2)[: max(int(share * (d // 2)), 1)]
    trapped = {*first.tolist(), *(first + 1).tolist()}
    last = np.array([row[-1] for row in known.losses])
    ruinous = 3 * np.maximum(last, np.median(last))
    losses = tuple(row * (ruinous[j] / last[j]) if j in trapped else row for j, row in enumerate(known.losses))
    refund = (ruinous - 0.05 * last)[first] + (ruinous - 0.05 * last)[first + 1]

    def joint(candidates: IntArray) -> FloatArray:
        removed = candidates == known.problem.sizes - 1
        free: FloatArray = -((removed[:, first] & removed[:, first + 1]) @ refund)
        return free

    return replace(known, losses=losses, joint=joint)


def noisy(known: KnownProblem, seed: int, share: float = 0.1) -> KnownProblem:
    """Add noise: evaluations err by a `share` of the loss of uniform pruning at the limits, and report the error."""
    uniform = uniform_seeds(known.problem)[-1:]
    return replace(known, noise=share * float(known.loss(uniform)[0]), noise_seed=seed)


LANDSCAPES: dict[str, Callable[..., KnownProblem]] = {
    "interacting": interacting,
    "deceptive": deceptive,
    "noisy": noisy,
}
"""Other losses over the same costs, by name: functions of (known problem, seed, strength)."""

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
