"""Problem of an optimizer: the options, the costs and the limits, without the model or the data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autoprune.costs.changes import LimitedCosts
from autoprune.optimizers.repair import find_cheapest, move_within
from autoprune.protocols import FloatArray, IntArray


def _identity(candidates: IntArray) -> IntArray:
    return candidates


@final
@dataclass(frozen=True, eq=False)
class Problem:
    """Options, costs and limits, with a repair that makes any candidate feasible.

    There are no assumptions about the costs: they may be products of sizes, staircases, or tables that are not
    monotone.

    Attributes:
        sizes: Number of options of each dimension, int64, shape (d,).
        cost_names: The limited costs, length c.
        limits: The largest cost allowed, in the unit of each cost, positive, shape (c,).
        cost_function: Canonical candidates (n, d) to costs (n, c); a pure function.
        ordered: Whether later options of a dimension remove more, shape (d,). By default all do.
        budget_range: Costs between which candidates are wanted, rows of (low, high), shape (c, 2). By default from half
            the limit up to the limit, or to the dense cost if that is positive and lower.
        canonical: Sets entries made irrelevant by others to 0; shape (n, d) in and out, idempotent.
        seeds: First proposals, in this order, shape (s, d); repaired where over a limit.
        trials: Number of candidates that the search will evaluate, for optimizers that plan ahead.
        prior: Expected loss of each option of each dimension alone, known before any evaluation: d arrays of shape
            (sizes[j],), 0 for dense, in any unit common to all. None if nothing is known.

    Raises:
        InfeasibleBudgetError: If no candidate was found within the limits; names the cheapest cost reachable.
        ValueError: If the shapes disagree, a limit is not positive, or a seed lies outside the space.
    """

    sizes: IntArray
    cost_names: tuple[str, ...]
    limits: FloatArray
    cost_function: Callable[[IntArray], FloatArray]
    ordered: NDArray[np.bool_] = None  # type: ignore[assignment]  # filled in below
    budget_range: FloatArray = None  # type: ignore[assignment]  # as above
    canonical: Callable[[IntArray], IntArray] = _identity
    seeds: IntArray = None  # type: ignore[assignment]  # as above
    trials: int = 200
    prior: tuple[FloatArray, ...] | None = None

    def __post_init__(self) -> None:
        self._fill("sizes", self.sizes, np.int64)
        self._fill("limits", self.limits, np.float64)
        d, c = len(self.sizes), len(self.limits)
        if d == 0 or (self.sizes < 1).any():
            raise ValueError(f"sizes must hold at least one dimension of at least one option, got {self.sizes}")
        if c == 0 or c != len(self.cost_names) or not (np.isfinite(self.limits) & (self.limits > 0)).all():
            raise ValueError(f"limits must be positive, one for each of {self.cost_names}, got {self.limits}")
        self._fill("ordered", np.ones(d) if self.ordered is None else self.ordered, np.bool_)
        self._fill("seeds", np.zeros((0, d)) if self.seeds is None else self.seeds, np.int64)
        if self.budget_range is None:
            dense = self.costs(np.zeros((1, d), dtype=np.int64))[0]
            high = np.where(dense > 0, np.minimum(self.limits, dense), self.limits)
            object.__setattr__(self, "budget_range", np.stack([high / 2, high], axis=1))
        self._fill("budget_range", self.budget_range, np.float64)
        if self.ordered.shape != (d,) or self.budget_range.shape != (c, 2):
            raise ValueError(
                f"ordered must have shape ({d},) and budget_range ({c}, 2), "
                f"got {self.ordered.shape} and {self.budget_range.shape}"
            )
        self._check(self.seeds, "seeds")
        if self.prior is not None and [len(row) for row in self.prior] != self.sizes.tolist():
            raise ValueError(f"prior must have {self.sizes.tolist()} entries, got {[len(row) for row in self.prior]}")
        _ = self.cheapest  # an impossible budget must fail before the first evaluation

    def _fill(self, name: str, value: ArrayLike, dtype: type[np.generic]) -> None:
        object.__setattr__(self, name, np.array(value, dtype=dtype))

    def _check(self, candidates: IntArray, name: str) -> None:
        if candidates.ndim != 2 or candidates.shape[1] != len(self.sizes):
            raise ValueError(f"{name} must have shape (n, {len(self.sizes)}), got {candidates.shape}")
        outside = np.flatnonzero(((candidates < 0) | (candidates >= self.sizes)).any(axis=1))
        if outside.size:
            raise ValueError(
                f"{name} must hold option indices below {self.sizes.tolist()}, "
                f"got {candidates[outside[0]].tolist()} in row {outside[0]}"
            )

    @property
    def size(self) -> int:
        """Number of candidates in the space, feasible or not."""
        return math.prod(int(size) for size in self.sizes)

    @cached_property
    def cheapest(self) -> IntArray:
        """Candidate furthest within the limits of those found, shape (d,); exact where the space can be enumerated."""
        return find_cheapest(self, self.limits)

    def costs(self, candidates: IntArray) -> FloatArray:
        """Costs of candidates (n, d), shape (n, c)."""
        costs = self.cost_function
        return costs(candidates if isinstance(costs, LimitedCosts) and costs.of_widths else self.canonical(candidates))

    def feasible(self, candidates: IntArray, limits: FloatArray | None = None) -> NDArray[np.bool_]:
        """Return whether candidates (n, d) meet every limit, shape (n,); `limits` as in `repair`."""
        within = self.costs(candidates) <= (self.limits if limits is None else limits)
        met: NDArray[np.bool_] = np.all(within, axis=1)
        return met

    def aimed(self, budget_range: FloatArray) -> Problem:
        """Copy the problem with another budget range, rows of (low, high), shape (c, 2).

        It takes no time, unlike `dataclasses.replace`, which looks for the cheapest candidate again.
        """
        other = copy.copy(self)
        object.__setattr__(other, "budget_range", np.array(budget_range, dtype=np.float64))
        return other

    def probes(self, candidates: IntArray) -> NDArray[np.bool_]:
        """Return whether candidates (n, d) change at most one dimension of the dense model, shape (n,).

        Such a candidate may be proposed to measure the loss of its dimension even if it is over a limit. It is
        evaluated and recorded like any other, and never on the front.
        """
        probing: NDArray[np.bool_] = (candidates != 0).sum(axis=1) <= 1
        return probing

    def repair(self, candidates: IntArray, limits: FloatArray | None = None) -> IntArray:
        """Move every candidate over a limit no further than needed to meet all of them, under the true cost.

        Args:
            candidates: Shape (n, d), anywhere in the space.
            limits: Limits in place of the problem's own, shape (c,) or one row for each candidate, (n, c).

        Returns:
            Canonical feasible candidates, int64, shape (n, d). Feasible canonical ones come back unchanged. Where an
            entry was lowered (its index grew), setting it alone back to any index from the original on breaks a limit.

        Raises:
            InfeasibleBudgetError: If no candidate was found within `limits`.
            ValueError: If `candidates` has the wrong shape or lies outside the space.
        """
        candidates = np.asarray(candidates, dtype=np.int64)
        self._check(candidates, "candidates")
        rows = np.broadcast_to(self.limits if limits is None else limits, (len(candidates), len(self.limits)))
        over = np.flatnonzero(~self.feasible(candidates, rows))
        repaired = np.array(self.canonical(candidates))
        if over.size:
            repaired[over] = move_within(self, candidates[over], self._anchors(rows[over]), rows[over])
        return repaired

    def _anchors(self, limits: FloatArray) -> IntArray:
        """Find a feasible candidate for every row of limits (n, c), shape (n, d)."""
        anchors = np.tile(self.cheapest, (len(limits), 1))
        unmet = ~self.feasible(anchors, limits)
        for row in np.unique(limits[unmet], axis=0):
            anchors[unmet & (limits == row).all(axis=1)] = find_cheapest(self, row)
        return anchors

    def enumerate(self) -> IntArray:
        """Every candidate of the space, shape (size, d); only for small spaces."""
        rest = np.arange(self.size, dtype=np.int64)
        columns = []
        for size in self.sizes[::-1]:
            columns.append(rest % size)
            rest //= size
        return np.stack(columns[::-1], axis=1)


def uniform_seeds(
    problem: Problem, fractions: Sequence[float] = (1.0,), least: NDArray[np.bool_] | None = None
) -> IntArray:
    """Prune every ordered dimension uniformly: the baseline that a search has to beat.

    Args:
        problem: `fractions` refer to its limits; its seeds are ignored.
        fractions: Shares of the limits to meet, in (0, 1]: 1 just meets them, 0.5 just meets half of each.
        least: Dimensions that are at their last option in all but the dense candidate, shape (d,); none by default.

    Returns:
        Feasible candidates without duplicates, int64, shape (<= 1 + number of fractions, d): the dense one if it is
        feasible, then for every fraction the last one that lies at the same relative position in all ordered
        dimensions and is over the limits, repaired. A fraction out of reach gives the nearest candidate.
    """
    positions = np.linspace(0.0, 1.0, 4 * int(problem.sizes.max()) + 1)[:, None]
    diagonal = np.rint(positions * (problem.sizes - 1) * problem.ordered).astype(np.int64)
    first = 0
    if least is not None and least.any():
        diagonal[1:, least] = problem.sizes[least] - 1
        first = 1  # which may meet the limits as it is
    reachable = problem.costs(problem.cheapest[None])[0]
    found = [diagonal[:1]] if problem.feasible(diagonal[:1])[0] else []
    for fraction in fractions:
        limits = np.maximum(fraction * problem.limits, reachable)
        met = problem.feasible(diagonal, limits)
        first_met = int(met.argmax()) if met.any() else len(diagonal)
        found.append(problem.repair(diagonal[[max(first_met - 1, first)]], limits))
    seeds = np.concatenate(found)
    _, places = np.unique(seeds, axis=0, return_index=True)
    return seeds[np.sort(places)]
