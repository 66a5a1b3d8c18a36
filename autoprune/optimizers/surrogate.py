"""A model of the signal, learnt from the trials, that screens many cheap proposals; distrusted until it has shown skill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from autoprune.optimizers.problem import Problem
from autoprune.protocols import FloatArray, IntArray

_FEWEST = 16
_MOST = 300  # rows learnt from: beyond them the fit would take longer than it saves
_FOLDS = 4


@final
class Surrogate:
    """Predicts the signal of candidates, with the model that predicts best in cross-validation.

    The models are ridge regression on levels, their squares and costs; Gaussian processes of three length scales; and
    extremely randomised trees. All of it is a function of what it is given, whatever the order of rows, so that an
    optimizer may fit anew at every ask and still continue a history told in bulk.

    What costs less nearly always scores worse, and predicting that helps nobody choose among candidates of equal cost.
    So `tau` is taken after a quadratic trend in the costs is removed from the signal and from the prediction alike.

    Args:
        problem: The space and its costs.
        threshold: The least `tau` at which predictions are trusted.

    Attributes:
        tau: Kendall's rank correlation of cross-validated predictions with the signal, at equal cost; 0 before a fit.
        model: Name of the model chosen, empty before a fit.
        history: (number of candidates fitted, tau) for each fit that saw more candidates than the one before.
    """

    def __init__(self, problem: Problem, threshold: float = 0.3) -> None:
        if not -1 <= threshold <= 1:
            raise ValueError(f"threshold must be a rank correlation in [-1, 1], got {threshold}")
        self._problem = problem
        self._threshold = threshold
        self._fitted: Any = None
        self._told = b""
        self.tau = 0.0
        self.model = ""
        self.history: list[tuple[int, float]] = []

    @property
    def trusted(self) -> bool:
        """Whether predictions are good enough to choose by."""
        return self._fitted is not None and self.tau >= self._threshold

    def fit(self, candidates: IntArray, objectives: FloatArray) -> None:
        """Learn from candidates (n, d) with objectives (n, m), the signal first; the same rows again cost nothing.

        With fewer than 16 candidates there is nothing to trust yet. Of more than 300, the 300 nearest to the front of
        signal and costs are used.
        """
        rows = np.lexsort(candidates.T[::-1])
        candidates, objectives = candidates[rows], objectives[rows]
        told = candidates.tobytes() + objectives.tobytes()
        if told == self._told:
            return
        self._told, n = told, len(candidates)
        self._fitted, self.tau, self.model = None, 0.0, ""
        if n >= _FEWEST and np.ptp(objectives[:, 0]) > 0:
            self._choose(*self._nearest(candidates, objectives))
        if not self.history or n > self.history[-1][0]:
            self.history.append((n, self.tau))

    def _nearest(self, candidates, objectives):
        if len(candidates) <= _MOST:
            return candidates, objectives
        scaled = np.argsort(np.argsort(objectives, axis=0), axis=0)
        better = (scaled[:, None] >= scaled[None]).all(axis=2).sum(axis=1)
        chosen = np.sort(np.argsort(better, kind="stable")[:_MOST])
        return candidates[chosen], objectives[chosen]

    def _choose(self, candidates, objectives):
        from scipy.stats import kendalltau

        features, signal = self.features(candidates), TRANSFORM(objectives[:, 0])
        folds = np.random.default_rng(0).permutation(len(signal)) % _FOLDS
        self.scores = {}
        best = -2.0
        for name, make in models().items():
            predicted = np.empty(len(signal))
            for fold in range(_FOLDS):
                held = folds == fold
                predicted[held] = make().fit(features[~held], signal[~held]).predict(features[held])
            costs = objectives[:, 1:] / self._problem.limits
            tau = float(np.nan_to_num(kendalltau(_detrended(predicted, costs), _detrended(signal, costs)).statistic))
            self.scores[name] = tau
            if tau > best:
                best, self.model = tau, name
        self.tau = best
        self._fitted = models()[self.model]().fit(features, signal)

    def features(self, candidates: IntArray) -> FloatArray:
        candidates = np.asarray(self._problem.canonical(candidates))
        ordered, sizes = self._problem.ordered, self._problem.sizes
        levels = candidates[:, ordered] / np.maximum(sizes[ordered] - 1, 1)
        hot = [candidates[:, [j]] == np.arange(sizes[j]) for j in np.flatnonzero(~ordered)]
        costs = self._problem.costs(candidates) / self._problem.limits
        return np.hstack([levels, *hot, costs]).astype(np.float64)

    def predict(self, candidates):
        return self._fitted.predict(self.features(candidates))


def _detrended(values, costs):
    basis = np.hstack([np.ones((len(values), 1)), costs, costs**2])
    return values - basis @ np.linalg.lstsq(basis, values, rcond=None)[0]


TRANSFORM = lambda y: y


def models() -> dict[str, Callable[[], Any]]:
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, Matern
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    def square(x):
        return np.hstack([x, x**2])

    out = {}
    for alpha in (0.3, 3.0, 30.0):
        out[f"ridge lin {alpha}"] = lambda alpha=alpha: make_pipeline(StandardScaler(), Ridge(alpha))
        out[f"ridge quad {alpha}"] = lambda alpha=alpha: make_pipeline(
            FunctionTransformer(square), StandardScaler(), Ridge(alpha)
        )
    for scale in (0.5, 1.0, 2.0, 4.0):
        for noise in (1e-3, 1e-2, 1e-1):
            out[f"gp {scale} {noise}"] = lambda scale=scale, noise=noise: GaussianProcessRegressor(
                Matern(scale * 3, nu=2.5), alpha=noise, optimizer=None, normalize_y=True
            )
    out["trees"] = lambda: ExtraTreesRegressor(30, min_samples_leaf=2, random_state=0)
    return out
