"""Correction from the times of parts to the time of a whole network, fitted to measured networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autoprune.protocols import FloatArray, IntArray

_TOWARDS_ONE_FACTOR = 0.2  # expected error of a network over the expected spread of the factors of kinds
_SURE = 0.8  # share of networks that the upper limit should hold for; the networks of a result are measured
_FOLDS = 3


@dataclass(frozen=True)
class Evidence:
    """Whole networks that were measured, each against the dense one in the same run.

    Attributes:
        widths: Units kept in each group, shape (m, groups).
        ratio: Their time over the dense network's, shape (m,).
        uncertainty: Reach of the 95 % interval of each, on its wider side, as a fraction of it, shape (m,).
    """

    widths: IntArray
    ratio: FloatArray
    uncertainty: FloatArray


@dataclass(frozen=True)
class Correction:
    """Conversion of the times of parts to the time of a whole network, fitted to measured networks.

    Its errors are those of cross-validation: fits to two thirds of the networks predict the last third, in turn.

    Attributes:
        constant_ms: Time of every network: Python, launches, and operations without a part.
        factors: Factor of the parts of each kind; running alone, they find all of their inputs in the cache.
        median_error: Median of the distance of predicted / measured from 1.
        p95_error: 95th percentile of it.
        spearman: Rank correlation of predicted and measured.
        margin: Increase of predictions after which four of five networks take no longer, as a fraction.
        networks: Number of networks.
    """

    constant_ms: float
    factors: Mapping[str, float]
    median_error: float
    p95_error: float
    spearman: float
    margin: float
    networks: int


def fit(kinds: Mapping[str, FloatArray], measured: FloatArray, uncertainty: FloatArray) -> Correction:
    """Fit least squares of relative errors with factors of at least 0, held near the best common factor.

    Args:
        kinds: Milliseconds of the parts of each kind, by its name, shape (m,) each.
        measured: Milliseconds of the whole networks, shape (m,).
        uncertainty: As `Evidence` has it, shape (m,).
    """
    columns = np.stack([np.ones(len(measured)), *kinds.values()], axis=1) / measured[:, None]
    weights = 1 / np.maximum(uncertainty, 0.01)
    weights = weights / np.median(weights)
    constant, *factors = _factors(columns, weights).tolist()
    predicted = np.empty(len(measured))  # over measured, by fits to others
    for fold in range(_FOLDS):
        rows = np.arange(len(measured)) % _FOLDS == fold
        predicted[rows] = columns[rows] @ _factors(columns[~rows], weights[~rows])
    errors = np.abs(predicted - 1)
    return Correction(
        constant_ms=constant,
        factors=dict(zip(kinds, factors, strict=True)),
        median_error=float(np.median(errors)),
        p95_error=float(np.quantile(errors, 0.95)),
        spearman=_spearman(predicted * measured, measured),
        margin=max(float(np.quantile(1 / predicted - 1, _SURE)), 0.0),
        networks=len(measured),
    )


def _factors(columns: FloatArray, weights: FloatArray) -> FloatArray:
    """Factors of at least 0 for columns (m, 1 + kinds) whose sums should be 1: a constant, then one for each kind."""
    from scipy.optimize import nnls

    common = np.stack([columns[:, 0], columns[:, 1:].sum(axis=1)], axis=1) * weights[:, None]
    constant, factor = nnls(common, weights)[0]
    # Rows that ask for the common factor: they decide where a kind is small in all networks, and noise would otherwise.
    hold = np.diag([0.0, *[_TOWARDS_ONE_FACTOR] * (columns.shape[1] - 1)])
    wanted = hold @ np.array([constant, *[factor] * (columns.shape[1] - 1)])
    solved: FloatArray = nnls(np.concatenate([columns * weights[:, None], hold]), np.concatenate([weights, wanted]))[0]
    return solved


def _spearman(a: FloatArray, b: FloatArray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if len(a) > 2 else math.nan
