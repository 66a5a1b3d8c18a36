"""Evolution by exchange within a budget: some dimensions move towards dense, and others are lowered to pay for it."""

from __future__ import annotations

from typing import final

import numpy as np
from numpy.typing import NDArray

from autoprune.optimizers.history import Archive
from autoprune.optimizers.position import position_of
from autoprune.optimizers.problem import Problem
from autoprune.optimizers.random import draw, fill_up, move_to_costs
from autoprune.protocols import Evaluations, FloatArray, IntArray

_START = 12  # candidates known before evolution starts, random ones where there are fewer seeds
_EXCHANGE = 0.7  # of the parents come from any niche: a good candidate for one budget mostly suits its neighbours
_MOST_SWITCHES = 3
_STEP = 0.25  # mean step, as a share of a dimension's options: a few hundred trials have no time for small steps


@final
class LevelSwitch:
    """(1 + lambda) or small-population evolution in several budgets at once, by trading one dimension for another.

    The budget range holds `niches` budgets. The elites of each are the `population` best trials within it, whatever
    niche they were made for, so a good candidate for one budget serves all larger ones at once. A child is made for one
    niche. Its parent is an elite of that niche, or of any, then shifted as a whole to this niche's cost. The child
    raises few dimensions and lowers others until it is within the budget again (`switch_levels`). The search starts
    from the problem's seeds, and from random candidates while fewer than 12 are known.

    Departures from the paper: it switches levels of equal cost one for one, where here the true cost decides how far
    others must fall; steps may be longer than one level; one search serves many budgets; and every child is scored at
    the same fidelity, because here early stopping is not a task of optimizers.

    Args:
        problem: The problem to search.
        seed: Not negative; the same seed gives the same proposals for the same history.
        population: Elites that each niche breeds from; 1 is the paper's (1 + lambda).
        niches: Budgets, evenly spaced over the budget range; a single one is the limit.
        begin: Candidates that are known before evolution begins.
        step: Mean step of a switch beyond the first option, as a share of a dimension's options; 0 for single steps.

    Reference:
        Sieberling, Kuznedelev, Kurtic and Alistarh, "EvoPress: Accurate Dynamic Model Compression via Evolutionary
        Search", ICML 2025, arXiv:2410.14649.
    """

    def __init__(
        self,
        problem: Problem,
        seed: int = 0,
        population: int = 1,
        niches: int = 16,
        begin: int = _START,
        step: float = _STEP,
    ) -> None:
        if population < 1 or niches < 1:
            raise ValueError(f"population and niches must be at least 1, got {population} and {niches}")
        if begin < 1 or not 0 <= step <= 1:
            raise ValueError(f"begin must be at least 1 and step a share from 0 to 1, got {begin} and {step}")
        self._begin = begin
        self._step = step
        self._problem = problem
        self._population = population
        self._niches = niches
        self._archive = Archive(problem, seed)

    def ask(self, n: int) -> IntArray:
        """Return up to `n` new feasible candidates, int64, shape (<= n, d); empty when none is left."""
        enough = len(self._archive) >= self._begin and len(self._archive.ok()[0]) > 0
        return self._archive.ask(n, self._children if enough else lambda k, rng: draw(self._problem, k, rng))

    def tell(self, evaluations: Evaluations) -> None:
        """Learn from evaluations, in any order."""
        self._archive.tell(evaluations)

    def pend(self, candidates: IntArray) -> None:
        """Take candidates (n, d) as proposed already."""
        self._archive.pend(candidates)

    def _children(self, n: int, rng: np.random.Generator) -> IntArray:
        return evolve(self._problem, *self._archive.ok(), n, rng, self._population, self._niches, self._step)


def evopress(problem: Problem, seed: int = 0) -> LevelSwitch:
    """EvoPress' settings: one budget, one parent, single steps, from the seeds on; ``search(optimizer=evopress)``.

    With ``evaluator=Growing(Masked("sparsegpt"))``, ``early_stopping=Rungs(3)`` and ``metric="agreement"`` it is the
    scheme of the paper on a layer database, see docs/sparsity.md.

    Args:
        problem: The problem to search; only its limits matter, not its budget range.
        seed: Not negative.

    Reference:
        Sieberling et al., "EvoPress", ICML 2025, arXiv:2410.14649.
    """
    return LevelSwitch(problem, seed, population=1, niches=1, begin=1, step=0.0)


def evolve(
    problem: Problem,
    candidates: IntArray,
    objectives: FloatArray,
    n: int,
    rng: np.random.Generator,
    population: int = 1,
    niches: int = 16,
    step: float = _STEP,
) -> IntArray:
    """Make children of the elites of each budget; `LevelSwitch` does this after its start.

    Args:
        problem: The space and its costs.
        candidates: Candidates evaluated in full, shape (k, d), k >= 1.
        objectives: Of the candidates: the signal, then the costs, lower is better, shape (k, m).
        n: Number of children.
        rng: Source of randomness.
        population: Elites of each niche.
        niches: Budgets, evenly spaced over the budget range.
        step: As of `LevelSwitch`.

    Returns:
        Feasible children, shape (n, d); some may be known already, or equal.
    """
    low, high = problem.budget_range.T
    shares = np.linspace(0.0, 1.0, niches)[::-1, None] if niches > 1 else np.ones((1, 1))  # a single one is the limit
    budgets = low + shares * (high - low)
    budgets = np.minimum(np.maximum(budgets, problem.costs(problem.cheapest[None])), problem.limits)
    ranked = np.argsort(objectives[:, 0], kind="stable")
    affordable = (objectives[ranked, None, 1:] <= budgets).all(axis=2)
    elites = [ranked[met][:population] if met.any() else ranked[-1:] for met in affordable.T]

    niche = rng.integers(niches, size=n)
    source = np.where(rng.random(n) < _EXCHANGE, rng.integers(niches, size=n), niche)
    parents = candidates[[rng.choice(elites[k]) for k in source]]
    moved = (source != niche) | ~problem.feasible(parents, budgets[niche])
    levels = parents[moved] / np.maximum(problem.sizes - 1, 1)
    parents[moved] = move_to_costs(problem, levels, budgets[niche[moved]])
    return switch_levels(problem, parents, budgets[niche], rng, step)


def switch_levels(
    problem: Problem, parents: IntArray, limits: FloatArray, rng: np.random.Generator, step: float = _STEP
) -> IntArray:
    """Raise one to three dimensions of every parent, and lower as few others as needed to meet the limits again.

    Few switches are more likely than many: their number is the lesser of two uniform draws, as in EvoPress. A dimension
    without an order takes another option at random, which may raise or lower the cost. The first of the others, in
    random order, is lowered alone if that is enough. The excess that the last step down freed is returned to the
    lowered ones, then to dimensions in random order, as far as it goes. So children stay near their parents, and resume
    late where candidates share computation, although no place in the network is preferred.

    Args:
        problem: The space and its costs.
        parents: Shape (n, d), feasible within `limits`.
        limits: Largest costs of each child, shape (n, c).
        rng: Source of randomness.
        step: As of `LevelSwitch`.

    Returns:
        One child for each parent, canonical and within its limits, shape (n, d); rarely the parent itself, where no
        other exchange meets the limits.
    """
    children = parents.copy()
    order = np.argsort(rng.random(parents.shape), axis=1)
    raised = _raise_some(problem, children, order, rng, step)
    _pay(problem, children, raised, order[:, ::-1], limits)
    within = problem.repair(children, limits)
    return fill_up(problem, within, limits, rng, first=within > parents)


def _raise_some(
    problem: Problem, children: IntArray, order: IntArray, rng: np.random.Generator, step: float
) -> NDArray[np.bool_]:
    """Raise the first dimensions in order (n, d) that can be raised, in place; return which, shape (n, d)."""
    rows = np.arange(len(children))
    last = problem.sizes - 1
    switches = rng.integers(1, _MOST_SWITCHES + 1, size=(len(children), 2)).min(axis=1)
    raised = np.zeros(children.shape, dtype=np.bool_)
    for dim in order.T:
        options = children[rows, dim]
        other = (options + rng.integers(1, np.maximum(last[dim], 1) + 1)) % (last[dim] + 1)
        value = np.where(problem.ordered[dim], np.maximum(options - _steps(last[dim], rng, step), 0), other)
        move = (value != options) & (raised.sum(axis=1) < switches)
        children[rows[move], dim[move]] = value[move]
        raised[rows[move], dim[move]] = True
    return raised


def _pay(problem: Problem, children: IntArray, raised: NDArray[np.bool_], order: IntArray, limits: FloatArray) -> None:
    """Lower dimensions that were not raised, in order (n, d), in place, each as far as needed to meet the limits."""
    rows = np.arange(len(children))
    last = problem.sizes - 1
    over = ~problem.feasible(children, limits)
    position = position_of(problem, children)
    for dim in order.T:
        able = problem.ordered[dim] & ~raised[rows, dim]
        while (move := np.flatnonzero(over & able & (children[rows, dim] < last[dim]))).size:
            lower = children[move, dim[move]] + 1
            over[move] = (position.after(move, dim[move], lower) > limits[move]).any(axis=1)
            position.move(move, dim[move], lower)
            children[move, dim[move]] = lower


def _steps(last: IntArray, rng: np.random.Generator, mean: float) -> IntArray:
    """Draw the number of options to move at once, at least one, for dimensions of last + 1 options; shape (n,)."""
    steps: IntArray = 1 + np.floor(rng.exponential(mean, len(last)) * last).astype(np.int64)
    return steps
