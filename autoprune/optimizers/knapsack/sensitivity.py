"""Scan of single changes, coarse to fine, and the table of losses that they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from autoprune.optimizers.position import position_of
from autoprune.optimizers.problem import Problem
from autoprune.protocols import OK, Evaluations, FloatArray, IntArray

SHARE = 0.4
"""Largest share of the trials that a scan may take."""

_USUAL_BEND = 2.0  # losses are convex along the options; fitted where two of a dimension are measured
_BENDS = (0.5, 6.0)


@dataclass(frozen=True)
class Table:
    """Loss of each option of each dimension when it alone changes.

    Attributes:
        losses: 0 for dense and never negative, d arrays of shape (sizes[j],): measured, or filled in. Along ordered
            dimensions they never fall: where measurements did, their isotonic fit stands, because that is noise.
        measured: Which of them were measured; dense counts.
        stderr: Standard errors of those measured, in the same unit; NaN where unknown.
    """

    losses: tuple[FloatArray, ...]
    measured: tuple[NDArray[np.bool_], ...]
    stderr: tuple[FloatArray, ...]


def table_of(problem: Problem, probes: Evaluations) -> Table:
    """Make the table from evaluations of single changes, in any order; fill in options not measured or failed.

    A loss is the distortion where any row has one; else the signal above that of the dense model, or above the least
    one while the dense model was not told. Along an ordered dimension they are interpolated monotonically (PCHIP),
    not over the options but over a curve of the expected shape, and extrapolated in proportion to it: the dimension's
    prior, or a power of the position that fits the dimensions measured twice. A dimension without any measurement
    takes its prior, scaled by least squares to the measurements, or the average curve of the others. When nothing is
    known, all dimensions lose alike, which makes the knapsack lower those that save most; uniform pruning, the other
    guess, is among the seeds of a search.

    Args:
        problem: The space, and its prior.
        probes: Rows that change one dimension each; others are ignored, as are rows that are not ``"ok"``.
    """
    values, stderr = _measurements(problem, probes)
    measured = [np.isfinite(row) for row in values]
    bend = _fit_bend(problem, values)
    shapes = [_shape(problem, j, bend) for j in range(len(values))]
    scale = _prior_scale(problem, values)
    known = {j: _complete(problem, j, row, shapes[j], scale) for j, row in enumerate(values) if measured[j][1:].any()}
    heights = [float(row.max()) for row in known.values()]
    losses = []
    for j, shape in enumerate(shapes):
        if j in known:
            losses.append(known[j])
        elif problem.prior is not None:
            losses.append(scale * _rising(problem, j, problem.prior[j]))
        else:
            losses.append(shape * (np.mean(heights) if heights else 1.0))
    return Table(tuple(losses), tuple(measured), tuple(stderr))


def next_probes(
    problem: Problem, known: IntArray, n: int, choose: Callable[[], IntArray], share: float = SHARE
) -> IntArray:
    """Choose the next measurements, independent of the order in which results came.

    First the middle option of every ordered dimension, then the last one, and every option of those without an order;
    always the dimensions with the largest share of the cost first. Then the options that `choose` picks, and those
    next to them, the most often picked first. Nothing if the scan could not measure every dimension once and a prior is
    known: it compares all dimensions, which measurements of some cannot.

    Args:
        problem: Its `trials` bound the scan.
        known: Everything evaluated or pending, shape (m, d).
        n: The most wanted.
        choose: Returns the knapsack's candidates by the table so far, shape (any, d); called only for the second part.
        share: Largest share of `problem.trials` for all single changes together.

    Returns:
        Canonical candidates that change one dimension, not known yet, shape (<= n, d).
    """
    taken = {(int(row.argmax()), int(row.max())) for row in known if np.count_nonzero(row) == 1}
    most = int(share * problem.trials)
    if problem.prior is not None and most < np.count_nonzero(problem.sizes > 1):
        most = 0
    n = min(n, most - len(taken))
    if n <= 0:
        return np.zeros((0, len(problem.sizes)), dtype=np.int64)
    wanted = _only_new(problem, _coarse(problem), taken)
    if not wanted:
        wanted = _only_new(problem, _around(problem, choose()), taken)
    return np.array([_probe(problem, j, option) for j, option in wanted[:n]], dtype=np.int64).reshape(-1, len(known.T))


def cost_shares(problem: Problem) -> FloatArray:
    """Largest share of any limit that changing each dimension alone can save, not negative, shape (d,)."""
    dims = np.repeat(np.arange(len(problem.sizes)), problem.sizes)
    starts = np.cumsum(problem.sizes) - problem.sizes
    dense = position_of(problem, np.zeros((1, len(problem.sizes)), dtype=np.int64))
    costs = dense.after(np.zeros_like(dims), dims, np.arange(len(dims)) - starts[dims])
    saved = ((costs[:1] - costs) / problem.limits).max(axis=1)
    shares: FloatArray = np.maximum.reduceat(saved, starts)
    return shares


def _probe(problem: Problem, j: int, option: int) -> IntArray:
    probe = np.zeros(len(problem.sizes), dtype=np.int64)
    probe[j] = option
    return probe


def _only_new(problem: Problem, wanted: list[tuple[int, int]], taken: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Leave out known changes, and those that are canonically none or another one."""
    new = [pair for pair in wanted if pair not in taken]
    if not new:
        return new
    probes = np.array([_probe(problem, j, option) for j, option in new])
    proper = (problem.canonical(probes) == probes).all(axis=1)
    return [pair for pair, keep in zip(new, proper, strict=True) if keep]


def _coarse(problem: Problem) -> list[tuple[int, int]]:
    order = np.argsort(-cost_shares(problem), kind="stable").tolist()
    each = []
    for j in order:
        size = int(problem.sizes[j])
        options = dict.fromkeys((size // 2, size - 1)) if problem.ordered[j] else range(1, size)
        each.append([(j, option) for option in options if option > 0])
    return [pair for wave in zip_longest(*each) for pair in wave if pair is not None]


def _around(problem: Problem, front: IntArray) -> list[tuple[int, int]]:
    """Options picked by the rows of a front (m, d), and their neighbours at half the weight, the heaviest first."""
    weight = np.zeros((len(problem.sizes), int(problem.sizes.max()) + 2))
    dims = np.arange(len(problem.sizes))
    for row in front:
        weight[dims, row] += 2
        weight[dims, row + 1] += problem.ordered
        weight[dims, np.maximum(row - 1, 0)] += problem.ordered
    weight[:, 0] = 0
    weight[np.arange(weight.shape[1]) >= problem.sizes[:, None]] = 0
    j, option = np.nonzero(weight)
    heaviest = np.lexsort((option, j, -cost_shares(problem)[j], -weight[j, option]))
    return list(zip(j[heaviest].tolist(), option[heaviest].tolist(), strict=True))


def _measurements(problem: Problem, probes: Evaluations) -> tuple[list[FloatArray], list[FloatArray]]:
    """Losses and standard errors by dimension, NaN where not measured; dense is 0."""
    values = [np.full(size, np.nan) for size in problem.sizes]
    errors = [np.full(size, np.nan) for size in problem.sizes]
    for row, error in zip(values, errors, strict=True):
        row[0] = error[0] = 0.0
    changed = np.count_nonzero(probes.candidates, axis=1)
    ok = (np.array(probes.status, dtype=object) == OK) & (changed <= 1)
    if not ok.any():
        return values, errors
    loss = probes.distortion
    stderr = np.full(len(probes), np.nan)
    if not np.isfinite(loss[ok]).any():
        signal = probes.objectives[:, 0]
        dense = ok & (changed == 0)
        loss = signal - signal[dense if dense.any() else ok].min()
        stderr = probes.stderr[:, 0]
    for i in np.flatnonzero(ok & (changed == 1) & np.isfinite(loss)):
        j = int(probes.candidates[i].argmax())
        option = probes.candidates[i, j]
        values[j][option], errors[j][option] = max(float(loss[i]), 0.0), stderr[i]
    return values, errors


def _positions(size: int) -> FloatArray:
    return np.arange(size) / max(size - 1, 1)


def _fit_bend(problem: Problem, values: list[FloatArray]) -> float:
    """Fit the power of the position that losses follow, the median over dimensions with two measurements."""
    bends = []
    for row, ordered in zip(values, problem.ordered, strict=True):
        positive = np.flatnonzero(row > 0)
        if ordered and len(positive) > 1:
            (a, b) = positive[[0, -1]]
            position = _positions(len(row))
            bends.append(np.log(row[b] / row[a]) / np.log(position[b] / position[a]))
    return float(np.clip(np.median(bends), *_BENDS)) if bends else _USUAL_BEND


def _shape(problem: Problem, j: int, bend: float) -> FloatArray:
    """Expected shape of the loss of a dimension, from 0 to 1, strictly rising if ordered."""
    position = _positions(int(problem.sizes[j]))
    if not problem.ordered[j]:
        return np.asarray(position > 0, dtype=np.float64)
    prior = None if problem.prior is None else _rising(problem, j, problem.prior[j])
    if prior is None or prior[-1] <= 0:
        return np.asarray(position**bend, dtype=np.float64)
    mixed: FloatArray = 0.999 * prior / prior[-1] + 0.001 * position  # flat stretches still tell options apart
    return mixed


def _rising(problem: Problem, j: int, prior: FloatArray) -> FloatArray:
    clipped = np.maximum(np.asarray(prior, dtype=np.float64), 0.0)
    return np.maximum.accumulate(clipped) if problem.ordered[j] else clipped


def _prior_scale(problem: Problem, values: list[FloatArray]) -> float:
    """Factor from the prior to the unit of the measurements, by least squares; 1 without either."""
    if problem.prior is None:
        return 1.0
    seen = np.concatenate(values)
    expected = np.concatenate(problem.prior)
    both = np.isfinite(seen) & (expected > 0)
    scale = float(seen[both] @ expected[both] / (expected[both] @ expected[both])) if both.any() else 1.0
    return scale or 1.0  # only zeros measured: the order of the prior is still useful


def _complete(problem: Problem, j: int, row: FloatArray, shape: FloatArray, prior_scale: float) -> FloatArray:
    """Fill in one dimension that has a measurement."""
    at = np.flatnonzero(np.isfinite(row))
    if not problem.ordered[j]:
        usual = np.full(len(row), row[at[1:]].mean()) if problem.prior is None else prior_scale * problem.prior[j]
        return np.where(np.isfinite(row), row, np.maximum(usual, 0.0))
    from scipy.interpolate import PchipInterpolator
    from scipy.optimize import isotonic_regression

    fitted = isotonic_regression(row[at]).x
    filled: FloatArray = fitted[-1] * shape / shape[at[-1]]
    inside = slice(0, at[-1] + 1)
    filled[inside] = PchipInterpolator(shape[at], fitted)(shape[inside])
    return np.maximum.accumulate(filled)
