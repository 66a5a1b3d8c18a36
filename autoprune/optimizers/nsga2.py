"""NSGA-II on integer candidates, every one of them feasible."""

from __future__ import annotations

from typing import Any, final

import numpy as np

from autoprune.optimizers.archive import Archive
from autoprune.optimizers.problem import Problem
from autoprune.optimizers.random import draw, draw_costs, move_to_costs
from autoprune.protocols import Evaluations, IntArray

_FEWEST_PARENTS = 4
_ETA = 3.0  # spread of the mutation: wide, because a few hundred trials have no time for small steps


@final
class NSGA2:
    """Breeds candidates from the best trials so far, ranked by dominance and then by crowding.

    It starts as random search until `population` candidates are known, and then works in a steady state: the parents
    are the best `population` of all evaluated trials (raced and failed ones never), whenever their results came. Half
    of the children are shifted as a whole to a cost drawn from the budget range, up or down, so that the front spans
    it and the profile found for one budget serves the others; the rest is only repaired.

    Args:
        problem: What to search.
        seed: Not negative; the same seed gives the same proposals for the same history.
        population: Number of parents; a tenth of the trials serves well.

    Reference:
        Deb et al., "A fast and elitist multiobjective genetic algorithm: NSGA-II", IEEE Transactions on Evolutionary
        Computation 6(2), 2002, with pymoo's operators: uniform crossover and rounded polynomial mutation.
    """

    def __init__(self, problem: Problem, seed: int = 0, population: int = 20) -> None:
        if population < _FEWEST_PARENTS:
            raise ValueError(f"population must be at least {_FEWEST_PARENTS}, got {population}")
        self._problem = problem
        self._population = population
        self._archive = Archive(problem, seed)

    def ask(self, n: int) -> IntArray:
        """Return up to `n` new feasible candidates, int64, shape (<= n, d); empty when none is left."""
        enough = len(self._archive) >= self._population and len(self._archive.ok()[0]) >= _FEWEST_PARENTS
        return self._archive.ask(n, self._breed if enough else lambda k, rng: draw(self._problem, k, rng))

    def tell(self, evaluations: Evaluations) -> None:
        """Learn from evaluations, in any order."""
        self._archive.tell(evaluations)

    def _breed(self, n: int, rng: np.random.Generator) -> IntArray:
        """Return `n` feasible children, shape (n, d); some may be known already."""
        from pymoo.core.population import Population
        from pymoo.core.problem import Problem as Bounds
        from pymoo.operators.crossover.ux import UX
        from pymoo.operators.mutation.pm import PM
        from pymoo.operators.selection.tournament import TournamentSelection
        from pymoo.operators.survival.rank_and_crowding import RankAndCrowding

        candidates, objectives = self._archive.ok()
        last = self._problem.sizes - 1
        bounds = Bounds(n_var=len(last), xl=np.zeros(len(last)), xu=last.astype(np.float64))
        trials = Population.new(X=candidates.astype(np.float64), F=objectives)
        parents = RankAndCrowding().do(bounds, trials, n_survive=self._population, random_state=rng)
        pairs = TournamentSelection(_fitter)(bounds, parents, n_select=(n + 1) // 2, n_parents=2, random_state=rng)
        children = UX(prob=0.9)(bounds, pairs, random_state=rng)
        children = PM(prob=1.0, eta=_ETA, at_least_once=True)(bounds, children, random_state=rng)
        options = np.rint(children.get("X")[:n]).astype(np.int64)

        bred = self._problem.repair(options)
        shift = rng.random(n) < 0.5
        levels = options[shift] / np.maximum(last, 1)
        bred[shift] = move_to_costs(self._problem, levels, draw_costs(self._problem, n, rng)[shift])
        return bred


def _fitter(population: Any, pairs: IntArray, **_: Any) -> IntArray:
    """Winner of each pair (n, 2) of positions in the population, shape (n, 1): lower rank, then less crowded."""
    rank, crowding = population.get("rank")[pairs], population.get("crowding")[pairs]
    second = (rank[:, 1] < rank[:, 0]) | ((rank[:, 1] == rank[:, 0]) & (crowding[:, 1] > crowding[:, 0]))
    return np.where(second, pairs[:, 1], pairs[:, 0])[:, None]
