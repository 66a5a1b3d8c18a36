"""NSGA-II on integer candidates, every one of them feasible."""

from __future__ import annotations

from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from autoprune.optimizers.history import Archive
from autoprune.optimizers.problem import Problem
from autoprune.optimizers.random import draw, draw_costs, fill_up, move_to_costs
from autoprune.pareto import non_dominated
from autoprune.protocols import Evaluations, FloatArray, IntArray

_FEWEST_PARENTS = 4
_ETA = 3.0  # spread of the mutation: wide, because a few hundred trials have no time for small steps
_CROSSED, _SHIFTED, _HELD = 0.9, 0.5, 0.5
_MOST_PAIRED = 256


@final
class NSGA2:
    """Breeds candidates from the best trials so far, ranked by dominance and then by crowding.

    It starts from the problem's seeds, followed by random candidates up to `population` if the seeds are fewer than
    half of that. Then it works in a steady state: the parents are the best `population` of all evaluated trials (raced
    and failed ones never), whenever their results came. Half of the children are shifted as a whole to a cost drawn
    from the budget range, up or down, so that the front spans it and the profile found for one budget serves the
    others. Every child is then raised as far as its cost allows. Crossover exchanges blocks of dimensions that the
    costs couple.

    Args:
        problem: The problem to search.
        seed: Not negative; the same seed gives the same proposals for the same history.
        population: Number of parents; a tenth of the trials serves well.

    Reference:
        Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE Transactions on Evolutionary
        Computation 6(2), 2002, with pymoo's rounded polynomial mutation. The crossover by random blocks
        of coupled dimensions is ours.
    """

    def __init__(self, problem: Problem, seed: int = 0, population: int = 20) -> None:
        if population < _FEWEST_PARENTS:
            raise ValueError(f"population must be at least {_FEWEST_PARENTS}, got {population}")
        self._problem = problem
        self._population = population
        self._archive = Archive(problem, seed)
        self._coupled = find_coupled(problem)
        seeds = len(np.unique(problem.repair(problem.seeds), axis=0))
        self._start = seeds if seeds >= population / 2 else population

    def ask(self, n: int) -> IntArray:
        """Return up to `n` new feasible candidates, int64, shape (<= n, d); empty when none is left."""
        enough = len(self._archive) >= self._start and len(self._archive.ok()[0]) >= _FEWEST_PARENTS
        return self._archive.ask(n, self._children if enough else lambda k, rng: draw(self._problem, k, rng))

    def tell(self, evaluations: Evaluations) -> None:
        """Learn from evaluations, in any order."""
        self._archive.tell(evaluations)

    def pend(self, candidates: IntArray) -> None:
        """Take candidates (n, d) as proposed already."""
        self._archive.pend(candidates)

    def _children(self, n: int, rng: np.random.Generator) -> IntArray:
        candidates, objectives = self._archive.ok()
        return breed(self._problem, candidates, objectives, n, rng, self._population, self._coupled)


def breed(
    problem: Problem,
    candidates: IntArray,
    objectives: FloatArray,
    n: int,
    rng: np.random.Generator,
    population: int = 20,
    coupled: IntArray | None = None,
) -> IntArray:
    """Breed children from the best of the candidates evaluated; `NSGA2` does this after its start.

    The parents are the best by dominance and then by crowding, where costs below the budget range count as its lower
    end. Half of the children are shifted as a whole to a cost drawn from the budget range; the others are repaired.
    All are then raised as far as their cost, or the lower end of the range, allows.

    Args:
        problem: The space and its costs.
        candidates: Candidates evaluated in full, shape (k, d), k >= 2.
        objectives: Of the candidates: the signal, then the costs, lower is better, shape (k, m).
        n: Number of children.
        rng: Source of randomness.
        population: Most candidates that become parents.
        coupled: Pairs of dimensions that tend to be inherited together, from `find_coupled`; None for no such pairs.

    Returns:
        Feasible children, shape (n, d); some may be known already, or equal.
    """
    from pymoo.core.population import Population
    from pymoo.core.problem import Problem as Bounds
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.selection.tournament import TournamentSelection
    from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

    coupled = np.zeros((0, 2), dtype=np.int64) if coupled is None else coupled
    last = problem.sizes - 1
    bounds = Bounds(n_var=len(last), xl=np.zeros(len(last)), xu=last.astype(np.float64))
    signal = objectives[:, :1]
    costs = np.maximum(objectives[:, 1:], problem.budget_range[:, 0])
    points = np.hstack([signal, costs])
    best = _first_fronts(points, population)  # the others cannot survive, and pymoo makes an object of each
    trials = Population.new(X=candidates[best].astype(np.float64), F=points[best])
    parents = RankAndCrowding().do(bounds, trials, n_survive=population, random_state=rng)
    pairs = TournamentSelection(_fitter)(
        bounds, parents, n_select=(n + 1) // 2, n_parents=2, random_state=rng, to_pop=False
    )
    options = parents.get("X")[pairs]
    swapped = _blocks(coupled, len(pairs), len(last), rng) & (rng.random((len(pairs), 1)) < _CROSSED)
    crossed = np.concatenate([np.where(swapped, options[:, 1 - k], options[:, k]) for k in (0, 1)])
    children = PM(prob=1.0, eta=_ETA, at_least_once=True)(bounds, Population.new(X=crossed), random_state=rng)
    options = np.rint(children.get("X")[:n]).astype(np.int64)

    bred = problem.repair(options)
    shift = rng.random(n) < _SHIFTED
    bred[shift] = move_to_costs(problem, options[shift] / np.maximum(last, 1), draw_costs(problem, n, rng)[shift])
    spent = np.maximum(problem.costs(bred), problem.budget_range[:, 0])
    return fill_up(problem, bred, np.minimum(spent, problem.limits), rng)


def _first_fronts(points: FloatArray, n: int) -> IntArray:
    """Positions of the best finite points (k, m) by dominance: whole fronts, until they hold `n`, ascending."""
    taken = np.zeros(len(points), dtype=np.bool_)
    waiting = np.arange(len(points))
    while len(waiting) and taken.sum() < n:
        front = non_dominated(points[waiting])
        taken[waiting[front]] = True
        waiting = waiting[~front]
    return np.flatnonzero(taken)


def find_coupled(problem: Problem) -> IntArray:
    """Find the pairs of dimensions whose savings depend on each other, as in products of neighbouring widths.

    Each dimension goes half-way down its options, alone and together with each other one; where the two savings do not
    add up in some cost, the pair is coupled. Takes d^2 / 2 costs; above 256 dimensions that is too many, and no pair is
    returned.

    Returns:
        Pairs of dimensions, int64, shape (pairs, 2).
    """
    d = len(problem.sizes)
    if d > _MOST_PAIRED:
        return np.zeros((0, 2), dtype=np.int64)
    pairs = np.stack(np.triu_indices(d, 1), axis=1)
    moved = np.diag(problem.sizes // 2)
    dense = problem.costs(np.zeros((1, d), dtype=np.int64))
    alone = problem.costs(moved)
    both = [problem.costs(moved[part].sum(axis=1)) for part in np.array_split(pairs, 1 + len(pairs) // 1024)]
    excess = np.concatenate(both) + dense - alone[pairs].sum(axis=1)
    found: IntArray = pairs[(np.abs(excess) > 1e-9 * dense).any(axis=1)]
    return found


def _blocks(coupled: IntArray, n: int, d: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw the entries that n crossovers exchange, shape (n, d): half of the blocks of coupled dimensions.

    Each coupling holds with probability a half, drawn again in every crossover, so that blocks of all sizes occur;
    dimensions without couplings are blocks of one, as in uniform crossover.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    row, pair = np.nonzero(rng.random((n, len(coupled))) < _HELD)
    ends = row[:, None] * d + coupled[pair]
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(n * d, n * d))
    count, block = connected_components(graph, directed=False)
    swapped: NDArray[np.bool_] = (rng.random(count) < 0.5)[block].reshape(n, d)
    return swapped


def _fitter(population: Any, pairs: IntArray, **_: Any) -> IntArray:
    """Winner of each pair (n, 2) of positions in the population, shape (n, 1): lower rank, then less crowded."""
    rank, crowding = population.get("rank")[pairs], population.get("crowding")[pairs]
    second = (rank[:, 1] < rank[:, 0]) | ((rank[:, 1] == rank[:, 0]) & (crowding[:, 1] > crowding[:, 0]))
    return np.where(second, pairs[:, 1], pairs[:, 0])[:, None]
