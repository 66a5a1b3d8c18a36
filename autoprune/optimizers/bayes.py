"""Optuna's samplers behind ask and tell, for searches whose trials are few and expensive."""

from __future__ import annotations

from typing import Any, final

import numpy as np

from autoprune.imports import quiet_optuna
from autoprune.optimizers.history import Archive
from autoprune.optimizers.problem import Problem
from autoprune.optimizers.random import draw, fill_up
from autoprune.protocols import Evaluations, IntArray

SAMPLERS = ("tpe", "gp")
_START = 10  # candidates known before the sampler is asked; random ones where there are fewer seeds


@final
class Bayes:
    """Multi-objective Bayesian optimisation of the signal and the limited costs.

    A new study is told all full evaluations, sorted, at every ask, so that nothing depends on the order of arrival.
    Each sampled candidate is repaired and filled up to its budget, and the study records the result as running, so that
    the batch and the pending candidates repel the next (constant liar). Costs below the budget range count as its lower
    end.

    Args:
        problem: The problem to search.
        seed: Not negative; the same seed gives the same proposals for the same history.
        sampler: ``"tpe"``, multi-objective TPE, or ``"gp"``, Gaussian processes with the expected hypervolume
            improvement: on one core about 10 s for each candidate of 24 dimensions, so for trials that take minutes.

    Reference:
        Ozaki et al., "Multiobjective Tree-Structured Parzen Estimator", Journal of Artificial Intelligence Research 73,
        2022, and Akiba et al., "Optuna", KDD 2019, arXiv:1907.10902.
    """

    def __init__(self, problem: Problem, seed: int = 0, sampler: str = "tpe") -> None:
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {list(SAMPLERS)}, got {sampler!r}")
        self._problem = problem
        self._sampler = sampler
        self._pending: dict[bytes, IntArray] = {}
        self._archive = Archive(problem, seed)

    def ask(self, n: int) -> IntArray:
        """Return up to `n` new feasible candidates, int64, shape (<= n, d); empty when none is left."""
        enough = len(self._archive) >= _START and len(self._archive.ok()[0]) > 1
        asked = self._archive.ask(n, self._sample if enough else lambda k, rng: draw(self._problem, k, rng))
        self._pending.update({candidate.tobytes(): candidate for candidate in asked})
        return asked

    def tell(self, evaluations: Evaluations) -> None:
        """Learn from evaluations, in any order."""
        self._archive.tell(evaluations)
        for candidate in self._problem.canonical(evaluations.candidates):
            self._pending.pop(candidate.tobytes(), None)

    def pend(self, candidates: IntArray) -> None:
        """Take candidates (n, d) as proposed already."""
        self._archive.pend(candidates)
        self._pending.update({candidate.tobytes(): candidate for candidate in self._problem.canonical(candidates)})

    def _sample(self, n: int, rng: np.random.Generator) -> IntArray:
        """Return `n` feasible candidates from the sampler, shape (n, d); some may be known already."""
        with quiet_optuna() as optuna:
            study = self._study(optuna, rng)
            space = _distributions(optuna, self._problem)
            found = []
            for _ in range(n):
                trial = study.ask(space)
                options = np.array([[trial.params[name] for name in space]], dtype=np.int64)
                study.tell(trial, state=optuna.trial.TrialState.FAIL)  # forgotten: it runs as what it is repaired to
                repaired = self._problem.repair(options)
                found.append(fill_up(self._problem, repaired, self._problem.costs(repaired), rng)[0])
                study.add_trial(_trial(optuna, space, found[-1], None))
        return np.array(found)

    def _study(self, optuna: Any, rng: np.random.Generator) -> Any:
        """Make a study of all trials told and pending; shuffled, because TPE weighs late trials more."""
        candidates, objectives = self._archive.ok()
        order = rng.permutation(len(candidates))
        seed = int(rng.integers(2**31))
        candidates, values = candidates[order], objectives[order]
        values[:, 1:] = np.maximum(values[:, 1:], self._problem.budget_range[:, 0])
        if self._sampler == "tpe":
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, constant_liar=True)
        else:
            sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=1)
        study = optuna.create_study(sampler=sampler, directions=["minimize"] * values.shape[1])
        space = _distributions(optuna, self._problem)
        told = zip(candidates, values.tolist(), strict=True)
        study.add_trials(_trial(optuna, space, candidate, row) for candidate, row in told)
        study.add_trials(_trial(optuna, space, self._pending[key], None) for key in sorted(self._pending))
        return study


def _distributions(optuna: Any, problem: Problem) -> dict[str, Any]:
    """Distributions of Optuna: an integer for every dimension with an order, a category for every other one."""
    integer, category = optuna.distributions.IntDistribution, optuna.distributions.CategoricalDistribution
    return {
        str(j): integer(0, size - 1) if ordered else category(list(range(size)))
        for j, (size, ordered) in enumerate(zip(problem.sizes.tolist(), problem.ordered, strict=True))
    }


def _trial(optuna: Any, space: dict[str, Any], candidate: IntArray, values: list[float] | None) -> Any:
    """Make a finished trial, or a running one without values."""
    state = optuna.trial.TrialState.RUNNING if values is None else optuna.trial.TrialState.COMPLETE
    params = dict(zip(space, candidate.tolist(), strict=True))
    return optuna.trial.create_trial(state=state, values=values, params=params, distributions=space)
