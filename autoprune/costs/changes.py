"""Changes of costs by single changes of candidates: exact, and far faster than computing all costs again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from autoprune.costs.structural import CostFunction, product_values
from autoprune.protocols import FloatArray, IntArray, SearchSpace
from autoprune.structure.structure import Structure
from autoprune.structure.terms import Products

_EXACT = 2.0**53  # sums of integers below it have no rounding, in whatever order they are added up
_AT_ONCE = 2**17  # products computed together: they fit the cache


@final
class LimitedCosts:
    """The costs that a budget limits, as one function of candidates.

    Args:
        costs: Each cost by its name.
        names: Those that are limited.
        changes: Computes the change of all of these by single changes; None where that is not possible.
    """

    def __init__(self, costs: Mapping[str, CostFunction], names: Sequence[str], changes: Changes | None = None) -> None:
        self._costs = [costs[name] for name in names]
        self._changes = changes

    def __call__(self, candidates: IntArray) -> FloatArray:
        """Costs of candidates (n, d), shape (n, c)."""
        return np.column_stack([cost(candidates) for cost in self._costs])

    @property
    def of_widths(self) -> bool:
        """True if widths alone decide on the costs, so that they are those of the canonical form, too."""
        return self._changes is not None

    @property
    def adds_up(self) -> bool:
        """True if single changes can be computed, and none makes another irrelevant."""
        return self._changes is not None and self._changes.space is None

    def at(self, candidates: IntArray) -> Counted | None:
        """Make candidates (n, d) to change one entry at a time, with the same costs bit for bit; None if impossible."""
        return None if self._changes is None else self._changes.at(candidates)


@final
class Changes:
    """Sums of products of sizes, with the products that each dimension has a part in.

    Args:
        structure: A traced model.
        names: Costs, each of `SUMS`.
        groups: Position in ``structure.groups`` of the one that each dimension chooses the width of, shape (d,); -1 for
            dimensions that keep or drop whole parts.
        widths: Units kept by each option of each dimension, padded, shape (d, most options).
        space: The space of the candidates, needed where some dimensions drop parts: costs after a change of these are
            counted from its widths.

    Attributes:
        exact: Whether all sums are exact: products of integers, below 2**53.
    """

    SUMS = ("flops", "params", "nonzero_params")
    """Costs that are such sums, in a space that removes only whole units."""

    def __init__(
        self,
        structure: Structure,
        names: Sequence[str],
        groups: IntArray,
        widths: FloatArray,
        space: SearchSpace | None = None,
    ) -> None:
        from scipy.sparse import csr_array

        terms = structure.terms
        sums = [terms.macs if name == "flops" else terms.params for name in names]
        self.divisors = np.array([terms.batch if name == "flops" else 1 for name in names], dtype=np.float64)
        self.widths = widths
        self.groups = groups
        self.space = space
        self.dropping = np.flatnonzero(groups < 0)
        self._structure = structure
        self.costs = np.repeat(np.arange(len(sums)), [len(each.coefficients) for each in sums])
        self.products = _joined(sums)
        self._constants = terms.sizes[:, 0]
        self._each = terms.sizes[:, 1:].astype(np.float64)
        self.shares = np.ascontiguousarray(self._each[:, groups].T)
        self.shares[self.dropping] = 0.0
        dense = structure.dense.astype(np.float64)
        dense[groups[groups >= 0]] = 0.0
        self._fixed = self._constants + self._each @ dense

        count, factors = self.products.factors.shape
        reads = csr_array(
            (np.ones(count * factors), (np.repeat(np.arange(count), factors), self.products.factors.ravel())),
            shape=(count, len(terms.sizes)),
        )
        parts = csr_array(reads @ csr_array(self.shares.T != 0).astype(np.float64))
        self.parts = csr_array(parts.T)  # dimensions x products
        self.coupled = csr_array(self.parts @ parts)  # dimensions x dimensions
        largest = self.at(np.zeros((1, len(groups)), dtype=np.int64)).totals
        whole = (self.products.coefficients == np.rint(self.products.coefficients)).all()
        self.exact = bool(whole and (largest < _EXACT).all())

    def sizes(self, candidates: IntArray) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Sizes that the products are made of, (n, s), and whether each dimension's group is left, (n, d)."""
        if self.space is None:
            widths = self.widths[np.arange(candidates.shape[1]), candidates]
            return self._fixed + widths @ self.shares, np.ones(candidates.shape, dtype=np.bool_)
        effective = self._structure.presence.effective(self.space.widths(candidates))
        return self._constants + effective @ self._each.T, (effective[:, self.groups] > 0) & (self.groups >= 0)

    def totals(self, sizes: FloatArray) -> FloatArray:
        """Sums of the products of sizes (n, s), shape (n, c)."""
        values = product_values(self.products, sizes)
        each = [values[:, self.costs == cost].sum(axis=1) for cost in range(len(self.divisors))]
        return np.stack(each, axis=1)

    def at(self, candidates: IntArray) -> Counted:
        """Candidates (n, d) with all that is needed to change them one entry at a time."""
        return Counted(self, candidates)


@final
class Counted:
    """Candidates that are changed one entry at a time, with their exact costs.

    Args:
        changes: What knows the products.
        candidates: Shape (n, d); copied.

    Attributes:
        candidates: The candidates after all moves so far, shape (n, d).
        totals: Their costs times `Changes.divisors`, integers, shape (n, c).
        left: Whether the group of each dimension is left; False where a part is dropped that it lies in, and for
            dimensions that drop parts; shape (n, d).
    """

    def __init__(self, changes: Changes, candidates: IntArray) -> None:
        self._changes = changes
        self.candidates = candidates.copy()
        self._sizes, self.left = changes.sizes(candidates)
        self.totals: FloatArray = changes.totals(self._sizes)

    def drops(self, dim: IntArray) -> NDArray[np.bool_]:
        """Return whether each of the dimensions keeps or drops a part, shape (k,)."""
        dropping: NDArray[np.bool_] = self._changes.groups[dim] < 0
        return dropping

    def room(self, limits: FloatArray) -> FloatArray:
        """The largest `change` of each candidate that meets limits (n, c), shape (n, c)."""
        divisors = self._changes.divisors
        most = np.floor(np.minimum(limits * divisors, _EXACT))
        # The product is rounded, and so may be one too many or too few for the quotient that costs are.
        most += (most + 1) / divisors <= limits
        most -= most / divisors > limits
        room: FloatArray = most - self.totals
        return room

    def change(self, row: IntArray, dim: IntArray, option: IntArray) -> FloatArray:
        """Growth of the `totals` of candidate ``row[i]`` with entry ``dim[i]`` at ``option[i]``, shape (k, c)."""
        changes = self._changes
        step = self._step(row, dim, option)
        starts = changes.parts.indptr[dim]
        ends = changes.parts.indptr[dim + 1]
        until = np.cumsum(ends - starts)
        out = np.empty((len(row), len(changes.divisors)))
        first = 0
        while first < len(row):
            before = int(until[first - 1]) if first else 0
            last = max(int(np.searchsorted(until, before + _AT_ONCE)), first + 1)
            part = slice(first, last)
            out[part] = self._changed(row[part], dim[part], step[part], starts[part], ends[part])
            first = last
        if (dropping := np.flatnonzero(self.drops(dim))).size:
            out[dropping] = self._recounted(row[dropping], dim[dropping], option[dropping])
        return out

    def _step(self, row: IntArray, dim: IntArray, option: IntArray) -> FloatArray:
        """Growth of the width of what is left; shape (k,)."""
        widths = self._changes.widths
        grown: FloatArray = widths[dim, option] - widths[dim, self.candidates[row, dim]]
        return grown * self.left[row, dim]

    def _recounted(self, row: IntArray, dim: IntArray, option: IntArray) -> FloatArray:
        """`change` of dimensions that keep or drop parts, shape (k, c)."""
        changed = self.candidates[row]
        changed[np.arange(len(row)), dim] = option
        changes = self._changes
        parts = np.array_split(changed, 1 + len(changed) * len(changes.products.coefficients) // _AT_ONCE)
        totals = np.concatenate([changes.totals(changes.sizes(part)[0]) for part in parts])
        grown: FloatArray = totals - self.totals[row]
        return grown

    def _changed(self, row: IntArray, dim: IntArray, step: FloatArray, starts: IntArray, ends: IntArray) -> FloatArray:
        """`change` of a part that fits the cache, for changes of widths by `step`."""
        changes = self._changes
        count = ends - starts
        of = np.repeat(np.arange(len(row)), count)
        at = np.arange(len(of)) + np.repeat(starts - (np.cumsum(count) - count), count)
        product = changes.parts.indices[at]
        old = changes.products.coefficients[product]
        new = old.copy()
        for factor in changes.products.factors.T:
            size = factor[product]
            now = self._sizes[row[of], size]
            old *= now
            new *= now + changes.shares[dim[of], size] * step[of]
        kinds = len(changes.divisors)
        cell = of * kinds + changes.costs[product]
        sums: FloatArray = np.bincount(cell, weights=new - old, minlength=len(row) * kinds).astype(np.float64)
        return sums.reshape(len(row), kinds)

    def after(self, row: IntArray, dim: IntArray, option: IntArray) -> FloatArray:
        """Costs of candidate ``row[i]`` with entry ``dim[i]`` at ``option[i]``, shape (k, c)."""
        costs: FloatArray = (self.totals[row] + self.change(row, dim, option)) / self._changes.divisors
        return costs

    def move(self, row: IntArray, dim: IntArray, option: IntArray) -> None:
        """Apply such changes, at most one in each candidate."""
        changes = self._changes
        self.totals[row] += self.change(row, dim, option)
        self._sizes[row] += changes.shares[dim] * self._step(row, dim, option)[:, None]
        self.candidates[row, dim] = option
        if (other := np.unique(row[self.drops(dim)])).size:
            self._sizes[other], self.left[other] = changes.sizes(self.candidates[other])

    def coupled(self, row: IntArray, dim: IntArray) -> tuple[IntArray, IntArray]:
        """Rows and dimensions whose `change` may differ after entry ``dim[i]`` of candidate ``row[i]`` has moved."""
        changes = self._changes
        graph = changes.coupled
        count = graph.indptr[dim + 1] - graph.indptr[dim]
        at = np.arange(count.sum()) + np.repeat(graph.indptr[dim] - (np.cumsum(count) - count), count)
        rows, dims = np.repeat(row, count), graph.indices[at].astype(np.int64)
        if changes.space is None:
            return rows, dims
        # A part may hold any of the groups, so what it costs may change with each; and all may change with a part.
        touched = np.zeros(self.candidates.shape, dtype=np.bool_)
        touched[rows, dims] = True
        touched[np.ix_(row, changes.dropping)] = True
        touched[row[self.drops(dim)]] = True
        rows, dims = np.nonzero(touched)
        return rows, dims


def _joined(sums: Sequence[Products]) -> Products:
    """Products of several sums, one after the other, padded with the constant 1."""
    most = max(each.factors.shape[1] for each in sums)
    factors = [np.pad(each.factors, ((0, 0), (0, most - each.factors.shape[1]))) for each in sums]
    return Products(np.concatenate([each.coefficients for each in sums]), np.concatenate(factors))
