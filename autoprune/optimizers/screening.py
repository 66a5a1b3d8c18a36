"""Choice among proposals: those whose predictions promise most to the front, over all budgets at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoprune.protocols import FloatArray, IntArray


def choose_by_gain(predicted: FloatArray, spread: float, fits: NDArray[np.bool_], best: FloatArray, n: int) -> IntArray:
    """Choose proposals one after another by their expected improvement, averaged over budgets.

    The best signal within each budget is what the front is worth there, so for one limited cost the mean over evenly
    spread budgets is the expected gain of hypervolume (Emmerich, Deutz and Klinkenberg, CEC 2011), with the cost known.
    A proposal once chosen counts as if it had scored what was predicted, so that the next ones improve other budgets.

    Args:
        predicted: Signal of each proposal, lower is better, shape (k,).
        spread: Standard deviation of the predictions' errors.
        fits: Whether each proposal is within each budget, shape (k, b).
        best: Best signal known within each budget, shape (b,).
        n: The most wanted.

    Returns:
        Positions of the proposals chosen, the most promising first, int64, shape (<= n,). Proposals within no budget
        are left out.
    """
    best = best.copy()
    left = np.flatnonzero(fits.any(axis=1))
    chosen: list[int] = []
    while len(chosen) < n and left.size:
        gain = np.where(fits[left], expected_improvement(predicted[left, None], spread, best), 0.0).mean(axis=1)
        first = int(left[gain.argmax()])
        chosen.append(first)
        left = left[left != first]
        best = np.where(fits[first], np.minimum(best, predicted[first]), best)
    return np.array(chosen, dtype=np.int64)


def expected_improvement(predicted: FloatArray, spread: float, best: FloatArray) -> FloatArray:
    """Mean of what a normal value falls below `best`, 0 where it does not; arrays broadcast."""
    from scipy.special import ndtr

    below = best - predicted
    if spread <= 0:
        return np.maximum(below, 0.0)
    z = below / spread
    improvement: FloatArray = below * ndtr(z) + spread * np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return improvement
