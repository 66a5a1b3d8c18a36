"""Correction of tables of single losses by evaluations of assembled candidates."""

from __future__ import annotations

import numpy as np

from autoprune.optimizers.knapsack.sensitivity import Table
from autoprune.protocols import FloatArray, IntArray

_DOUBT = 0.5  # prior standard deviation of a coefficient, as a share of their common value
_LEAST = 0.05  # a coefficient of zero would empty the dimension at any saving
_FEWEST = 4
_CAP = 0.9  # quantile of the signals: collapsed candidates say little about the good ones


def corrected_tables(
    table: Table, candidates: IntArray, objectives: FloatArray, rng: np.random.Generator
) -> list[FloatArray]:
    """Multiply each dimension's losses by a coefficient drawn from its posterior.

    The signal of assembled candidates is taken as a common multiple of the sum of coefficient times loss, each
    coefficient as normal around 1: Bayesian linear regression in closed form. Drawing, instead of taking the mean,
    tries uncertain options in proportion to the chance that they are best (Thompson sampling; Russo et al., "A Tutorial
    on Thompson Sampling", 2018, arXiv:1707.02038). SPDY (arXiv:2201.13096) searches such coefficients at random.

    Args:
        table: Loss of each option alone.
        candidates: Candidates evaluated in full, shape (n, d).
        objectives: Of the candidates, the signal first, lower is better, shape (n, m).
        rng: Source of randomness.

    Returns:
        Losses, d arrays of shape (sizes[j],), in the unit of the table. Nothing is learnt from fewer than four
        candidates, or where larger sums do not go with larger signals.
    """
    d = len(table.losses)
    mean: FloatArray = np.ones(d)
    root: FloatArray = _DOUBT * np.eye(d)
    if len(candidates) >= _FEWEST:
        losses = np.stack([row[candidates[:, j]] for j, row in enumerate(table.losses)], axis=1)
        signal = np.minimum(objectives[:, 0], np.quantile(objectives[:, 0], _CAP))
        x = losses - losses.mean(axis=0)
        y = signal - signal.mean()
        total = x.sum(axis=1)
        slope = float(total @ y) / (float(total @ total) or 1.0)
        if slope > 0:
            rest = y / slope - total
            noise = max(float(np.var(rest)), 1e-9 * float(np.var(total)))
            covariance = np.linalg.inv(x.T @ x / noise + np.eye(d) / _DOUBT**2)
            mean = np.asarray(1 + covariance @ (x.T @ rest) / noise, dtype=np.float64)
            root = np.asarray(np.linalg.cholesky(covariance + 1e-9 * np.eye(d)), dtype=np.float64)
    drawn = np.maximum(mean + root @ rng.standard_normal(d), _LEAST)
    return [coefficient * row for coefficient, row in zip(drawn, table.losses, strict=True)]
