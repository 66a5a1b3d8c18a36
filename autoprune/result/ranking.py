"""Rank agreement of two scores: Kendall's tau, regret, and bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoprune.protocols import FloatArray, IntArray

BAND = 0.05
"""Costs that differ by no more than this share of the larger one count as equal."""

FEWEST = 4
"""Least number of candidates for a ranking."""

FEWEST_PAIRS = 10
"""Least number of pairs of equal cost for a tau over them."""

RESAMPLES = 2000
CHOICES = (1, 3)
"""Numbers of candidates trained, by the best cheap score, in the regret."""


class Estimate(NamedTuple):
    """Value with its 95 % bootstrap interval; NaN where there is too little data."""

    value: float
    low: float = np.nan
    high: float = np.nan


@dataclass(frozen=True)
class Ranking:
    """Rank agreement of a cheap score with the trained score.

    Intervals come from drawing the candidates again, with replacement, 2,000 times. They do not cover other models,
    data or recipes, and those of the regret are one-sided in effect: a drawn set may lack the best candidate.

    Attributes:
        candidates: Number of candidates with both scores.
        tau: Kendall's tau-b over all pairs: 1 for the same order, 0 for none in common. Of (1 + tau) / 2 of the pairs
            that do not tie, the cheap score names the better candidate.
        pairs_in_band: Number of pairs that differ in cost by at most `BAND`.
        tau_in_band: Tau over these pairs alone, where the cost does not determine the order.
        regret: By the number of candidates trained, those of the best cheap score: gap between the best trained score
            among them and the best of all, in units of the metric, at least 0.
    """

    candidates: int
    tau: Estimate
    pairs_in_band: int
    tau_in_band: Estimate
    regret: Mapping[int, Estimate]


def rank(cheap: FloatArray, trained: FloatArray, costs: FloatArray, seed: int = 0) -> Ranking:
    """Compare two scores of the same candidates, both higher is better; those where either is NaN are left out.

    Args:
        cheap: Shape (n,).
        trained: Shape (n,).
        costs: For the band, and to choose the cheaper one where cheap scores tie, shape (n,).
        seed: Seed of the bootstrap.

    Reference:
        Kendall, "The treatment of ties in ranking problems", Biometrika 33(3), 1945, for tau-b.
    """
    known = np.isfinite(cheap) & np.isfinite(trained)
    cheap, trained, costs = cheap[known], trained[known], costs[known]
    n, near = len(cheap), _near(costs)
    x, y = _signs(cheap), _signs(trained)
    pairs = int(np.triu(near, 1).sum())
    if n < FEWEST:
        nothing = Estimate(np.nan)
        return Ranking(n, nothing, pairs, nothing, dict.fromkeys(CHOICES, nothing))
    draws = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    everything = np.arange(n)
    order = np.lexsort((costs, -cheap))
    place = np.empty(n, dtype=np.int64)
    place[order] = everything

    def estimate(statistic: Callable[[IntArray], float]) -> Estimate:
        return Estimate(statistic(everything), *_interval(np.array([statistic(rows) for rows in draws])))

    def regret(most: int) -> Callable[[IntArray], float]:
        return lambda rows: float(trained[rows].max() - trained[rows[np.argsort(place[rows])[:most]]].max())

    few = pairs < FEWEST_PAIRS
    return Ranking(
        candidates=n,
        tau=estimate(lambda rows: _tau(x, y, rows)),
        pairs_in_band=pairs,
        tau_in_band=Estimate(np.nan) if few else estimate(lambda rows: _tau(x * near, y * near, rows)),
        regret={most: estimate(regret(most)) for most in CHOICES},
    )


def tau_difference(first: FloatArray, second: FloatArray, trained: FloatArray, seed: int = 0) -> Estimate:
    """Compute Kendall's tau of one cheap score minus that of another, over candidates with all three scores.

    Args:
        first: Shape (n,), higher is better.
        second: The same.
        trained: The same.
        seed: Seed of the bootstrap, which draws the same candidates for both.
    """
    known = np.isfinite(first) & np.isfinite(second) & np.isfinite(trained)
    a, b, y = (_signs(values[known]) for values in (first, second, trained))
    n = len(y)
    if n < FEWEST:
        return Estimate(np.nan)

    def statistic(rows: IntArray) -> float:
        return _tau(a, y, rows) - _tau(b, y, rows)

    draws = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    return Estimate(statistic(np.arange(n)), *_interval(np.array([statistic(rows) for rows in draws])))


def _signs(values: FloatArray) -> FloatArray:
    return np.sign(values[:, None] - values[None, :])


def _near(costs: FloatArray) -> NDArray[np.bool_]:
    """Mark the pairs that count as of equal cost."""
    a = costs[:, None]
    b = costs[None, :]
    near: NDArray[np.bool_] = np.abs(a - b) <= BAND * np.maximum(np.abs(a), np.abs(b))
    return near


def _tau(x: FloatArray, y: FloatArray, rows: IntArray) -> float:
    """Compute tau-b from the signs of all differences. A candidate drawn twice ties with itself in both scores."""
    x, y = x[np.ix_(rows, rows)], y[np.ix_(rows, rows)]
    untied = float((x * x).sum() * (y * y).sum()) ** 0.5
    return float((x * y).sum()) / untied if untied else np.nan


def _interval(values: FloatArray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return np.nan, np.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
