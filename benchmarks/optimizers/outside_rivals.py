"""Samplers of Optuna and pymoo on a table, as their own documentation runs them.

They see the cost of a candidate with its score, because they have no place for a cost that is known before. A candidate
that they propose again is answered and not counted, which favours them: an evaluation is a distinct candidate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from autoprune.protocols import IntArray
from benchmarks.optimizers.outside_tables import OutsideTable

POPULATION = 20  # a tenth of the evaluations; their defaults of 50 and 100 are for thousands
MOST_REPEATS = 10  # proposals for each distinct candidate wanted


class Seen:
    """Distinct candidates in the order of their first proposal."""

    def __init__(self, table: OutsideTable, most: int) -> None:
        self.table, self.most = table, most
        self.rows: dict[tuple[int, ...], list[float]] = {}
        self.asked = 0

    def __call__(self, options: tuple[int, ...]) -> list[float]:
        """Score and cost of one candidate."""
        self.asked += 1
        if options not in self.rows and len(self.rows) < self.most:
            self.rows[options] = self.table.points[self.table.rows(np.array([options]))[0]].tolist()
        return self.rows.get(options) or self.table.points[self.table.rows(np.array([options]))[0]].tolist()

    @property
    def done(self) -> bool:
        """Return whether enough was seen, or nothing new comes."""
        return len(self.rows) >= self.most or self.asked >= MOST_REPEATS * self.most

    def candidates(self) -> IntArray:
        """Stack what was seen, shape (<= most, d)."""
        return np.array(list(self.rows), dtype=np.int64)


def suggested(trial: Any, table: OutsideTable) -> tuple[int, ...]:
    """Options that a trial of Optuna suggests: integers where they have an order, else categories."""
    each = enumerate(zip(table.sizes.tolist(), table.ordered, strict=True))
    return tuple(
        trial.suggest_int(str(j), 0, size - 1) if ordered else trial.suggest_categorical(str(j), range(size))
        for j, (size, ordered) in each
    )


def optuna_rival(sampler: Callable[[Any, int], Any]) -> Callable[[OutsideTable, int, int], IntArray]:
    """Make a search by a sampler, a function of (optuna.samplers, seed): (table, seed, trials) to candidates."""

    def search(table: OutsideTable, seed: int, trials: int) -> IntArray:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(sampler=sampler(optuna.samplers, seed), directions=["minimize"] * 2)
            seen = Seen(table, trials)
            while not seen.done:
                trial = study.ask()
                study.tell(trial, seen(suggested(trial, table)))
        return seen.candidates()

    return search


def pymoo_nsga2(table: OutsideTable, seed: int, trials: int) -> IntArray:
    """Search by pymoo's NSGA-II with its operators for mixed variables."""
    from pymoo.algorithms.moo.nsga2 import NSGA2, RankAndCrowdingSurvival
    from pymoo.core.mixed import MixedVariableDuplicateElimination, MixedVariableMating, MixedVariableSampling
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.core.variable import Choice, Integer

    seen = Seen(table, trials)

    class Lookup(ElementwiseProblem):
        def _evaluate(self, x: dict[str, int], out: dict[str, Any], *_: Any, **__: Any) -> None:
            out["F"] = seen(tuple(int(x[str(j)]) for j in range(len(table.sizes))))

    each = enumerate(zip(table.sizes.tolist(), table.ordered, strict=True))
    variables = {
        str(j): Integer(bounds=(0, size - 1)) if ordered else Choice(options=list(range(size)))
        for j, (size, ordered) in each
    }
    algorithm = NSGA2(
        pop_size=POPULATION,
        sampling=MixedVariableSampling(),
        mating=MixedVariableMating(eliminate_duplicates=MixedVariableDuplicateElimination()),
        eliminate_duplicates=MixedVariableDuplicateElimination(),
        survival=RankAndCrowdingSurvival(),
    )
    algorithm.setup(Lookup(vars=variables, n_obj=2), termination=("n_eval", MOST_REPEATS * trials), seed=seed)
    while not seen.done and algorithm.has_next():
        algorithm.next()
    return seen.candidates()


RIVALS: dict[str, Callable[[OutsideTable, int, int], IntArray]] = {
    "Optuna NSGA-II": optuna_rival(lambda s, seed: s.NSGAIISampler(population_size=POPULATION, seed=seed)),
    "Optuna TPE": optuna_rival(lambda s, seed: s.TPESampler(multivariate=True, seed=seed)),
    "Optuna GP": optuna_rival(lambda s, seed: s.GPSampler(seed=seed)),
    "pymoo NSGA-II": pymoo_nsga2,
}
