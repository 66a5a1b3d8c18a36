"""Surrogate model of the signal, learnt from trials, that screens proposals once its predictions are good enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, final

import numpy as np

from autoprune.optimizers.problem import Problem
from autoprune.protocols import FloatArray, IntArray

THRESHOLD = 0.4
"""Least rank correlation at which predictions are trusted."""

_FEWEST = 16
_MOST = 300  # more would take longer to learn from than they save
_FOLDS = 4
_PAIRS = 2**20  # compared at once: they fit the cache
_ROBUST = 1.4826  # from the median absolute error to the standard deviation of normal errors
_OFFSET = 0.1  # interquartile ranges between the best signal and where the logarithm ends


@final
class Surrogate:
    """Predicts the signal of candidates, with the model that predicts best in cross-validation.

    The models are ridge regression on levels, their squares and the costs; Gaussian processes with a Matérn kernel of
    few fixed scales; and extremely randomised trees. A fit is a function of the rows that it is given, in any order, so
    that an optimizer may fit again at every ask and still continue a history told in bulk.

    Cheaper candidates nearly always score worse, and a model of only this trend cannot choose among candidates of equal
    cost. So `tau` is computed after a quadratic trend in the costs is removed from both signal and prediction.

    Args:
        problem: The space and its costs.
        threshold: Least `tau` at which predictions are trusted.

    Attributes:
        tau: Kendall's rank correlation of cross-validated predictions with the signal, at equal cost; 0 before a fit.
        model: Name of the model chosen, empty while there is none.
        history: (number of candidates told, tau) of every fit that was told more than the one before.
        spread: Standard deviation of the errors of cross-validated predictions, robust to outliers; 0 before a fit.
    """

    def __init__(self, problem: Problem, threshold: float = THRESHOLD) -> None:
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold must be a rank correlation in [-1, 1], got {threshold}")
        self._problem = problem
        self._threshold = threshold
        self._fitted: Any = None
        self._told = b""
        self.tau = 0.0
        self.model = ""
        self.spread = 0.0
        self._floor = 0.0
        self.history: list[tuple[int, float]] = []

    @property
    def trusted(self) -> bool:
        """True if predictions are good enough to choose by."""
        return self._fitted is not None and self.tau >= self._threshold

    def fit(self, candidates: IntArray, objectives: FloatArray) -> None:
        """Learn from feasible candidates (n, d) with objectives (n, m), the signal first.

        With fewer than 16 candidates, or signals all equal, nothing is learnt and nothing trusted. Of more than 300,
        those that the fewest others dominate are used. A repeated call with the same rows takes no time.
        """
        order = np.lexsort((*objectives.T, *candidates.T))
        candidates, objectives = candidates[order], objectives[order]
        told = candidates.tobytes() + objectives.tobytes()
        if told == self._told:
            return
        self._told = told
        self._fitted = None
        self.tau = 0.0
        self.model = ""
        if len(candidates) >= _FEWEST and np.ptp(objectives[:, 0]) > 0:
            best = _least_dominated(objectives, _MOST)
            signal = objectives[best, 0]
            low, high = np.quantile(signal, [0.25, 0.75])
            self._floor = float(signal.min()) - _OFFSET * float(high - low or np.ptp(signal))
            self._learn(self._features(candidates[best]), self.warp(signal), objectives[best, 1:])
        if not self.history or len(candidates) > self.history[-1][0]:
            self.history.append((len(candidates), self.tau))

    def predict(self, candidates: IntArray) -> FloatArray:
        """Predict the signal of candidates (n, d), shape (n,); lower is better.

        Raises:
            RuntimeError: If there is no model, because `fit` had too few candidates.
        """
        if self._fitted is None:
            raise RuntimeError(
                f"predict needs a fit on at least {_FEWEST} candidates whose signals differ; see trusted"
            )
        predicted: FloatArray = self._fitted.predict(self._features(candidates))
        return np.asarray(np.exp(predicted) + self._floor)

    def warp(self, signal: FloatArray) -> FloatArray:
        """Turn signals into the unit of `spread`, in which models learn: the logarithm of what is above the best."""
        return np.asarray(np.log(np.maximum(signal - self._floor, np.finfo(np.float64).tiny)))

    def _features(self, candidates: IntArray) -> FloatArray:
        """Features: relative levels, a column for each option of a dimension without an order, and relative costs."""
        candidates = np.asarray(self._problem.canonical(candidates))
        ordered, sizes = self._problem.ordered, self._problem.sizes
        levels = candidates[:, ordered] / np.maximum(sizes[ordered] - 1, 1)
        chosen = [candidates[:, [j]] == np.arange(sizes[j]) for j in np.flatnonzero(~ordered)]
        return np.hstack([levels, *chosen, self._problem.costs(candidates) / self._problem.limits])

    def _learn(self, features: FloatArray, signal: FloatArray, costs: FloatArray) -> None:
        from scipy.stats import kendalltau

        folds = np.random.default_rng(0).permutation(len(signal)) % _FOLDS
        costs = costs / self._problem.limits
        truth = _without_trend(signal, costs)
        best = -np.inf
        for name, make in _models():
            predicted = np.empty(len(signal))
            for fold in range(_FOLDS):
                held = folds == fold
                predicted[held] = make().fit(features[~held], signal[~held]).predict(features[held])
            tau = float(np.nan_to_num(kendalltau(_without_trend(predicted, costs), truth).statistic))
            if tau > best:
                best, chosen, self.model = tau, make, name
                self.spread = _ROBUST * float(np.median(np.abs(predicted - signal)))
        self.tau = best
        self._fitted = chosen().fit(features, signal)


def _models() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names of models and functions that make them, the cheapest to fit first, which wins where they tie."""
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    def ridge(penalty: float) -> Any:
        return make_pipeline(FunctionTransformer(_with_squares), StandardScaler(), Ridge(penalty))

    def process(scale: float, noise: float) -> Any:
        return GaussianProcessRegressor(Matern(scale, nu=2.5), alpha=noise, optimizer=None, normalize_y=True)

    for penalty in (0.3, 3.0, 30.0):
        yield f"ridge({penalty})", partial(ridge, penalty)
    for scale, noise in ((3.0, 0.003), (3.0, 0.1), (10.0, 0.1)):
        yield f"gp({scale}, {noise})", partial(process, scale, noise)
    yield "trees", partial(ExtraTreesRegressor, 10, min_samples_leaf=2, random_state=0)


def _with_squares(x: FloatArray) -> FloatArray:
    return np.hstack([x, x**2])


def _without_trend(values: FloatArray, costs: FloatArray) -> FloatArray:
    """Residuals of values (n,) after a quadratic fit in each of the costs (n, c)."""
    basis = np.hstack([np.ones((len(values), 1)), costs, costs**2])
    rest: FloatArray = values - basis @ np.linalg.lstsq(basis, values, rcond=None)[0]
    return rest


def _least_dominated(objectives: FloatArray, n: int) -> IntArray:
    """Positions of the `n` rows that the fewest others dominate, in their order."""
    if len(objectives) <= n:
        return np.arange(len(objectives))
    dominating = np.concatenate(
        [_count_dominating(objectives, part) for part in np.array_split(objectives, 1 + len(objectives) ** 2 // _PAIRS)]
    )
    return np.sort(np.argsort(dominating, kind="stable")[:n])


def _count_dominating(objectives: FloatArray, rows: FloatArray) -> IntArray:
    """Count the objectives (n, m) that are no worse in all columns than each row (k, m), shape (k,)."""
    no_worse = np.ones((len(rows), len(objectives)), dtype=np.bool_)
    for column, values in zip(objectives.T, rows.T, strict=True):
        no_worse &= column <= values[:, None]
    count: IntArray = no_worse.sum(axis=1)
    return count
