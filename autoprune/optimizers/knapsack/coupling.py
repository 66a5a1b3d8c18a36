"""Costs of a problem as sums over single and paired dimensions, and its front by the exact choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autoprune.optimizers.knapsack.local_moves import Moves
from autoprune.optimizers.knapsack.milp import Pair, Silence, choose_coupled, gap_of, spent
from autoprune.optimizers.knapsack.relinearise import front_of
from autoprune.optimizers.position import position_of
from autoprune.optimizers.problem import Problem
from autoprune.protocols import FloatArray, IntArray

_ENTRIES = 2**18  # most products of options of pairs: beyond, the program takes longer than it is worth
_ROWS = 2**14  # candidates priced at once
_ROUNDING = 1e-9  # of a cost: less is no coupling
_NODES = 500  # some seconds; SciPy hands over no choice where a tree is cut off, so the knapsack stands then
_ROUNDS = 2


@dataclass(frozen=True)
class Coupling:
    """Costs around a candidate, exact where no three dimensions meet in one product.

    Attributes:
        base: Costs of that candidate, shape (c,).
        costs: Change by each option of each dimension alone, d arrays of shape (sizes[j], c).
        pairs: Change by options of two dimensions in addition to both alone, for dimensions where there is one.
        silences: Options that make another dimension irrelevant.
    """

    base: FloatArray
    costs: tuple[FloatArray, ...]
    pairs: tuple[Pair, ...]
    silences: tuple[Silence, ...]


@dataclass(frozen=True)
class Front:
    """Answer of `coupled_front`.

    Attributes:
        candidates: One canonical candidate for each budget, int64, shape (m, d).
        gaps: Proven gap of the table's loss for each budget, under the costs of the `Coupling`, shape (m,); NaN where
            nothing is proven, because the program is too large or was given up.
    """

    candidates: IntArray
    gaps: FloatArray


def coupled_front(problem: Problem, losses: Sequence[ArrayLike], budgets: ArrayLike, nodes: int = _NODES) -> Front:
    """Find the candidate of least additive loss within each budget: the knapsack's, or a better exact choice.

    Both are compared under the true cost, so that the answer is never worse than that of `front_of`.

    Args:
        problem: The space, its true costs and its canonical form.
        losses: Loss of each option, lower is better, d arrays of shape (sizes[j],).
        budgets: Largest costs of each candidate, shape (m, c).
        nodes: Most nodes of each search tree.

    Raises:
        InfeasibleBudgetError: If no candidate was found within a budget.
        ValueError: If the shapes disagree.
    """
    tables = [np.asarray(row, dtype=np.float64) for row in losses]
    limits = np.asarray(budgets, dtype=np.float64)
    best = front_of(problem, tables, limits)
    gaps = np.full(len(limits), np.nan)
    silences = silences_of(problem)
    dense = coupling_of(problem, silences)
    moves = Moves(problem, tables, "sum")
    for i, limit in enumerate(limits):
        coupling = dense
        for _ in range(_ROUNDS):
            if coupling is None:
                break
            before = best[i].copy()
            best[i], gaps[i], exact = _improved(problem, moves, tables, coupling, limit, before, nodes)
            if exact or np.array_equal(best[i], before):
                break
            # Where three dimensions meet, costs are exact only around a candidate; the one just found is nearer.
            coupling = coupling_of(problem, silences, best[i])
    return Front(best, gaps)


def _improved(
    problem: Problem,
    moves: Moves,
    tables: Sequence[FloatArray],
    coupling: Coupling,
    limit: FloatArray,
    known: IntArray,
    nodes: int,
) -> tuple[IntArray, float, bool]:
    """Find a better candidate than a known one, if any, its gap, and whether the choice costs what was expected."""
    loss = float(moves.loss(known[None])[0])
    room = limit - coupling.base
    most = loss + _ROUNDING * abs(loss)
    choice = choose_coupled(tables, coupling.costs, room, coupling.pairs, coupling.silences, most, nodes)
    if choice is None:  # nothing is better, by these costs
        return known, 0.0, True
    if choice.options is None:
        return known, gap_of(loss, choice.bound) if np.isfinite(choice.bound) else np.nan, True
    expected = coupling.base + spent(choice.options, coupling.costs, coupling.pairs, coupling.silences)
    exact = np.allclose(problem.costs(choice.options[None])[0], expected, rtol=1e-6, atol=0)
    settled = moves.settle(choice.options[None], limit[None])[0]
    better = float(moves.loss(settled[None])[0])
    if better > loss:
        return known, gap_of(loss, choice.bound), exact
    return settled, gap_of(better, choice.bound), exact


def silences_of(problem: Problem) -> tuple[Silence, ...]:
    """Options that make another dimension irrelevant, whatever its option, by the canonical form."""
    d = len(problem.sizes)
    found = []
    for i in range(d):
        # Most dimensions silence nothing in their last option, and then in none; those without an order may in any.
        last = [int(problem.sizes[i]) - 1] if problem.ordered[i] else range(1, int(problem.sizes[i]))
        if any(_silenced_by(problem, i, option).any() for option in last):
            for option in range(1, int(problem.sizes[i])):
                found += [Silence(i, option, j) for j in np.flatnonzero(_silenced_by(problem, i, option)).tolist()]
    return tuple(found)


def _silenced_by(problem: Problem, dimension: int, option: int) -> NDArray[np.bool_]:
    """Mark the dimensions whose first and last option an option of another sets to 0, shape (d,)."""
    d = len(problem.sizes)
    marked = problem.sizes > 1
    if option == 0 or not marked.any():
        return np.zeros(d, dtype=np.bool_)
    marked[dimension] = False
    for options in (np.ones(d, dtype=np.int64), problem.sizes - 1):
        trials = np.zeros((d, d), dtype=np.int64)
        np.fill_diagonal(trials, np.minimum(options, problem.sizes - 1))
        trials[:, dimension] = option
        canonical = problem.canonical(trials)
        marked &= (canonical.diagonal() == 0) & (canonical[:, dimension] == option)
    return marked


def coupling_of(
    problem: Problem, silences: Sequence[Silence], around: IntArray | None = None, most: int = _ENTRIES
) -> Coupling | None:
    """Take the costs of a problem apart, around a candidate (d,); the dense one by default.

    Returns:
        The parts; None if pairs have more than `most` products of options.
    """
    sizes = problem.sizes
    base = np.zeros(len(sizes), dtype=np.int64) if around is None else around.copy()
    base[[silence.dimension for silence in silences]] = 0  # around kept parts, where all dimensions count
    parts = _Parts(problem, base, silences)
    first, second = np.triu_indices(len(sizes), 1)
    coupled = np.zeros(len(first), dtype=np.bool_)
    for probe in (sizes - 1, sizes // 2, np.minimum(1, sizes - 1)):
        coupled |= parts.together(first, second, probe[first], probe[second]).any(axis=1)
    first, second = first[coupled], second[coupled]
    if int((sizes[first] * sizes[second]).sum()) > most:
        return None
    pairs = []
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        a, b = (grid.ravel() for grid in np.indices((sizes[i], sizes[j])))
        costs = parts.together(np.full_like(a, i), np.full_like(b, j), a, b)
        pairs.append(Pair(i, j, costs.reshape(sizes[i], sizes[j], -1)))
    return Coupling(parts.at, parts.alone(), tuple(pairs), tuple(silences))


@final
class _Parts:
    """Changes of the costs of a candidate, shape (d,), by one option and by two.

    Attributes:
        at: Costs of the candidate, shape (c,).
    """

    def __init__(self, problem: Problem, base: IntArray, silences: Sequence[Silence]) -> None:
        sizes = problem.sizes
        dims = np.repeat(np.arange(len(sizes)), sizes)
        self._problem = problem
        self._base = base
        self._starts: IntArray = np.cumsum(sizes) - sizes
        self.at: FloatArray = problem.costs(base[None])[0]
        options = np.arange(len(dims)) - self._starts[dims]
        self._alone = position_of(problem, base[None]).after(np.zeros_like(dims), dims, options) - self.at
        self._silent = np.zeros((len(dims), len(sizes)), dtype=np.bool_)  # options x dimensions that they silence
        for silence in silences:
            self._silent[self._starts[silence.dimension] + silence.option, silence.silenced] = True

    def alone(self) -> tuple[FloatArray, ...]:
        """Change by each option of each dimension, d arrays of shape (sizes[j], c)."""
        return tuple(np.split(self._alone, self._starts[1:]))

    def together(self, first: IntArray, second: IntArray, a: IntArray, b: IntArray) -> FloatArray:
        """Change by options ``a[i]`` and ``b[i]`` of two dimensions in addition to both alone, shape (k, c)."""
        change = np.empty((len(a), len(self.at)))
        for start in range(0, len(a), _ROWS):
            part = slice(start, start + _ROWS)
            rows = np.tile(self._base, (len(a[part]), 1))
            rows[np.arange(len(rows)), first[part]] = a[part]
            rows[np.arange(len(rows)), second[part]] = b[part]
            change[part] = self._problem.costs(rows)
        one = self._starts[first] + a
        other = self._starts[second] + b
        change -= self.at + self._alone[one] + self._alone[other]
        none = np.abs(change) <= _ROUNDING * np.abs(self.at)
        return np.where(none | (self._silent[one, second] | self._silent[other, first])[:, None], 0.0, change)
