"""Mean of a metric over samples, with its uncertainty."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autoprune.metrics.statistics import standard_error
from autoprune.protocols import FloatArray


class Summary(NamedTuple):
    """Mean over samples, its standard error and its 95 % interval; NaN for a single value."""

    mean: float
    stderr: float
    interval: tuple[float, float]


def summary(values: FloatArray, proportion: bool | None = None, weights: FloatArray | None = None) -> Summary:
    """Average a metric over samples.

    Args:
        values: One value a sample, shape (n,), or a single one for a metric of the whole set.
        proportion: Whether values are 0 or 1, for which the interval is Wilson's in place of the normal one; None
            decides by the values.
        weights: Weight of each sample, with a mean of 1, where the mean is a quotient; None or empty where all count
            the same.
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    mean = float(values.mean())
    if n == 1:
        return Summary(mean, float("nan"), (float("nan"), float("nan")))
    stderr = standard_error(values, weights)
    if proportion is None:
        proportion = bool(np.isin(values, (0, 1)).all())
    if not proportion:
        return Summary(mean, stderr, (mean - 1.96 * stderr, mean + 1.96 * stderr))
    from scipy.stats import binomtest

    interval = binomtest(int(values.sum()), n).proportion_ci(method="wilson")
    return Summary(mean, stderr, (float(interval.low), float(interval.high)))
