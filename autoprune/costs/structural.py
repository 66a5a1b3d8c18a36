"""FLOPs, parameters and memory from the structure: exact, and fast for a whole population."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from autoprune.arguments import shown
from autoprune.costs.candidates import Candidates, GivenCost
from autoprune.costs.latency.model import Latency
from autoprune.costs.zeros import ZeroCosts
from autoprune.protocols import FloatArray, IntArray, SearchSpace, SetsZeros
from autoprune.structure.branches.branch import Presence
from autoprune.structure.structure import Structure
from autoprune.structure.terms import Products

CostFunction = Callable[[IntArray], FloatArray]
"""Costs of candidates: (n, d) int64 in, (n,) float64 out."""

PRODUCT = 500_000
"""Most multiplications of one matrix product: beyond, NumPy starts threads that cost more than they save here."""

_SMALL = 10_000  # entries of a matrix that are multiplied faster than looked up
_SPARSE = 8  # a matrix with at most one nonzero entry in this number is stored sparse


class StructuralCosts:
    """Costs as functions of widths, shape (n, groups + branches): units kept by group, and 1 for each branch kept.

    The columns of branches may be left out where all are kept. Costs are sums of products of integers, exact in float64
    up to 2**53.

    Args:
        structure: A traced model.
        batch: Samples that `memory_bytes` is stated at.
    """

    def __init__(self, structure: Structure, batch: int = 1) -> None:
        if batch < 1:
            raise ValueError(f"cost_batch must be at least 1, got {batch}")
        terms = structure.terms
        self._presence = structure.presence
        self._fixed = terms.sizes[:, 0].astype(np.float64)
        self._each = _Matrix(np.ascontiguousarray(terms.sizes[:, 1:].T, dtype=np.float64))
        self._batch = terms.batch
        self._macs = _Sum(terms.macs, len(terms.sizes))
        self._params = _Sum(terms.params, len(terms.sizes))
        self._state = _Sum(terms.state_bytes, len(terms.sizes))
        self._activations, alive, _ = live_tensors(terms.activation_bytes, terms.born, terms.died)
        self._alive = alive * (batch / terms.batch)

    def flops(self, widths: FloatArray) -> FloatArray:
        """Multiply-accumulates of one sample, shape (n,); other tools may count two operations for each."""
        return self._blocks(self._macs, widths) / self._batch

    def params(self, widths: FloatArray) -> FloatArray:
        """Elements of the parameters, shared ones counted once, shape (n,)."""
        return self._blocks(self._params, widths)

    def state_bytes(self, widths: FloatArray) -> FloatArray:
        """Bytes of parameters and buffers, shared ones counted once, shape (n,)."""
        return self._blocks(self._state, widths)

    def memory_bytes(self, widths: FloatArray) -> FloatArray:
        """Bytes of parameters and buffers plus the largest sum of tensors alive at once, shape (n,).

        Exact for the tensors of a pass. `PeakMemory` adds the scratch memory of kernels, which it measures.
        """

        def peak(sizes: FloatArray) -> FloatArray:
            held: FloatArray = (product_values(self._activations, sizes) @ self._alive).max(axis=1)
            return self._state(sizes) + held

        return self._blocks(peak, widths, self._alive.size)

    def _blocks(
        self, cost: Callable[[FloatArray], FloatArray], widths: FloatArray, matrix: int | None = None
    ) -> FloatArray:
        """Apply a cost to blocks of rows, as large as a product with a matrix of that number of entries allows."""
        widths = self._presence.effective(widths)
        out = np.empty(len(widths), dtype=np.float64)
        rows = max(PRODUCT // max(matrix or self._each.size, 1), 1)
        for start in range(0, len(widths), rows):
            block = widths[start : start + rows]
            out[start : start + rows] = cost(self._each.times(block) + self._fixed)
        return out


class _Matrix:
    """Multiplies rows with a matrix, which is stored sparse where few of its entries are nonzero.

    Attributes:
        size: Multiplications for one row.
    """

    def __init__(self, matrix: FloatArray) -> None:
        self._matrix = matrix
        self._transposed = None
        self.size = matrix.size
        filled = int(np.count_nonzero(matrix))
        if _SPARSE * filled < self.size > _SMALL:
            from scipy.sparse import csr_array

            self._transposed = csr_array(matrix.T)
            self.size = filled + matrix.shape[1]

    def times(self, rows: FloatArray) -> FloatArray:
        """Products, shape (n, columns)."""
        if self._transposed is None:
            return rows @ self._matrix
        return np.ascontiguousarray((self._transposed @ rows.T).T)


class _Sum:
    """Sum of products of sizes: a quadratic form for products of at most two, and the longer ones as they are."""

    def __init__(self, products: Products, sizes: int) -> None:
        count = (products.factors > 0).sum(axis=1)
        few = count <= 2
        # Factors are right-padded with row 0, the constant 1, so that one form holds degrees 0 to 2.
        pairs = np.zeros((int(few.sum()), 2), dtype=np.int64)
        width = min(products.factors.shape[1], 2)
        pairs[:, :width] = products.factors[few, :width]
        form = np.zeros((sizes, sizes))
        np.add.at(form, (pairs[:, 0], pairs[:, 1]), products.coefficients[few])
        used = np.flatnonzero(form.any(axis=0) | form.any(axis=1))
        self._used = used
        self._form = form[np.ix_(used, used)]
        first, second = np.nonzero(self._form)
        self._pairs: tuple[IntArray, IntArray, FloatArray] | None = None
        if _SPARSE * len(first) < self._form.size > _SMALL:  # few of all pairs, as in deep networks
            self._pairs = first, second, self._form[first, second]
        self._rest = Products(products.coefficients[~few], products.factors[~few])

    def __call__(self, sizes: FloatArray) -> FloatArray:
        own = np.ascontiguousarray(sizes[:, self._used])
        total: FloatArray
        if self._pairs is None:
            total = np.einsum("ns,ns->n", own @ self._form, own)
        else:
            first, second, coefficients = self._pairs
            total = (own[:, first] * own[:, second]) @ coefficients
        if len(self._rest.coefficients):
            total = total + product_values(self._rest, sizes).sum(axis=1)
        return total


def product_values(products: Products, sizes: FloatArray) -> FloatArray:
    """Values of each product at sizes (n, s), shape (n, p)."""
    out = np.broadcast_to(products.coefficients, (len(sizes), len(products.coefficients))).copy()
    for column in products.factors.T:
        out *= sizes[:, column]
    return out


def live_tensors(
    sizes: Products, born: IntArray, died: IntArray, further: Sequence[int] = (), before: Sequence[int] = ()
) -> tuple[Products, FloatArray, IntArray]:
    """Distinct sizes of tensors, and how many of each are alive at each moment that can be the peak.

    Args:
        sizes: Bytes of each tensor.
        born: Operation that makes each.
        died: Number of operations that have run when each is released.
        further: Operations during which there may be a peak for another reason.
        before: Operations right before which to count, too: a column for each at the end.

    Returns:
        Sizes, shape (s,); numbers of tensors, shape (s, moments); the operation of each moment, those of `before` not.
    """
    died = np.maximum(died, born + 1)  # a tensor that is never kept still exists while it is made
    moments = np.union1d(_peaks(born, died), np.array(further, dtype=np.int64))
    starts = np.array(before, dtype=np.int64)
    alive = np.hstack([born[:, None] <= moments, born[:, None] < starts])
    alive &= np.append(moments, starts) < died[:, None]
    keys = np.column_stack([sizes.coefficients, sizes.factors])
    distinct, inverse = np.unique(keys, axis=0, return_inverse=True)
    count = np.zeros((len(distinct), alive.shape[1]))
    np.add.at(count, inverse.reshape(-1), alive.astype(np.float64))
    return Products(distinct[:, 0], distinct[:, 1:].astype(np.int64)), count, moments


def _peaks(born: IntArray, died: IntArray) -> IntArray:
    """Moments that can be the peak: a tensor is released after them, and one was made since the last such moment."""
    last = -2
    peaks = []
    births = np.unique(born)
    for death in np.unique(died).tolist():
        if births[np.searchsorted(births, death) - 1] > last:
            peaks.append(death - 1)
            last = death - 1
    return np.array(peaks or [0], dtype=np.int64)


def make_costs(
    structure: Structure,
    space: SearchSpace,
    user: Mapping[str, GivenCost] | None = None,
    batch: int = 1,
    latency: Latency | None = None,
    memory: Callable[[FloatArray], FloatArray] | None = None,
) -> dict[str, CostFunction]:
    """Make every cost that a budget may limit, as functions of candidates.

    Args:
        structure: A traced model.
        space: Gives the widths of a candidate, and the number of elements that it sets to zero.
        user: Further costs by name, each of `Candidates`, giving (n,); they need be neither monotone nor products.
        batch: Samples that `memory_bytes` and `latency_ms` are stated at.
        latency: Predicts `latency_ms`; without it, and without a user's cost of that name, there is none.
        memory: Predicts `memory_bytes` of widths, with the scratch memory of operations; without it none is counted.

    Raises:
        ValueError: If a user's cost takes the name of a built-in one, or its result has the wrong shape.
    """
    exact = StructuralCosts(structure, batch)
    peak = exact.memory_bytes if memory is None else partial(_peak, memory, exact, len(structure.groups))
    built_in = {"flops": exact.flops, "params": exact.params, "memory_bytes": peak}
    costs: dict[str, CostFunction] = {name: partial(_of_widths, cost, space) for name, cost in built_in.items()}
    costs["nonzero_params"] = partial(_nonzero_params, exact, space)
    if isinstance(space, SetsZeros) and space.zeroed_weights:
        zeros = ZeroCosts(structure, exact)
        costs |= {
            "sparse_flops": partial(zeros.sparse_flops, space),
            "stored_bytes": partial(zeros.stored_bytes, space),
        }
    if latency is not None:
        costs["latency_ms"] = partial(_latency_ms, latency, space, structure.presence)
    known = sorted(costs)
    for name, function in (user or {}).items():
        if name in costs:
            raise ValueError(f"costs must not redefine {known}, got {name!r}; choose another name")
        costs[name] = partial(_checked, name, function, space, structure)
    if "latency_ms" in costs:
        costs["ms_per_sample"] = partial(_per_sample, costs["latency_ms"], batch)
    return costs


def _latency_ms(latency: Latency, space: SearchSpace, presence: Presence, candidates: IntArray) -> FloatArray:
    """Predicted milliseconds; for the dense network those that were measured."""
    groups = len(latency.groups)
    widths = predicted_widths(presence, space, candidates)
    dense = (widths[:, :groups] == [size for _, size in latency.groups]).all(axis=1) & widths[:, groups:].all(axis=1)
    ms: FloatArray = np.where(dense, latency.dense_ms, latency.predict(widths))
    return ms


def predicted_widths(presence: Presence, space: SearchSpace, candidates: IntArray) -> FloatArray:
    """Widths as `Latency.predict` takes them: a table has no width of 0, so groups in dropped branches keep theirs."""
    groups = len(presence.groups)
    given = space.widths(candidates)
    effective = presence.effective(given)
    return np.hstack([given[:, :groups], effective[:, groups:]]) if len(given) else effective


def _peak(
    memory: Callable[[FloatArray], FloatArray], exact: StructuralCosts, groups: int, widths: FloatArray
) -> FloatArray:
    """Peak of memory; with branches dropped, that of all of them less what tensors and parameters take less."""
    peak = memory(widths[:, :groups])
    dropped = ~widths[:, groups:].all(axis=1)
    if dropped.any():
        some = widths[dropped]
        peak[dropped] -= exact.memory_bytes(some[:, :groups]) - exact.memory_bytes(some)
    return peak


def _per_sample(latency_ms: CostFunction, batch: int, candidates: IntArray) -> FloatArray:
    return latency_ms(candidates) / batch


def _of_widths(cost: Callable[[FloatArray], FloatArray], space: SearchSpace, candidates: IntArray) -> FloatArray:
    return cost(space.widths(candidates))


def _nonzero_params(exact: StructuralCosts, space: SearchSpace, candidates: IntArray) -> FloatArray:
    """Elements of the parameters that are not set to zero; other zeros count."""
    return exact.params(space.widths(candidates)) - space.zeroed(candidates)


def _checked(
    name: str, function: GivenCost, space: SearchSpace, structure: Structure, candidates: IntArray
) -> FloatArray:
    returned = function(Candidates.of(candidates.copy(), space, structure))  # a copy, because it may write to it
    try:
        if np.asarray(returned).dtype.kind not in "fiubO":  # NumPy would drop imaginary parts, and read text
            raise TypeError("they are no real numbers")
        values = np.asarray(returned, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"costs[{name!r}] must return real numbers, got {shown(returned)}") from error
    finite = np.isfinite(values).all()
    if values.shape != (len(candidates),) or not finite:
        raise ValueError(
            f"costs[{name!r}] must return {len(candidates)} finite numbers for candidates of shape "
            f"{candidates.shape}, got shape {values.shape}{'' if finite else ' with NaN or infinity'}"
        )
    return values
