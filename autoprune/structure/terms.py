"""Terms of exact costs as products of sizes: multiply-accumulates, elements of tensors, and lifetimes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autoprune.protocols import FloatArray, IntArray
from autoprune.structure.labels import Propagation
from autoprune.structure.macs import products_of, uncounted
from autoprune.structure.rules.registry import operation_of
from autoprune.structure.tracing.record import Record
from autoprune.structure.units import AffineSize, Units


@dataclass(frozen=True)
class Products:
    """List of products of affine sizes.

    Attributes:
        coefficients: Constant factor of each product, shape (p,).
        factors: Rows of `Terms.sizes` that each product multiplies, shape (p, f); row 0 is the constant 1.
    """

    coefficients: FloatArray
    factors: IntArray


@dataclass(frozen=True)
class Terms:
    """Costs of a traced model as functions of the widths of its groups.

    Attributes:
        sizes: Affine sizes, shape (s, 1 + groups): fixed part, then indices per unit of each group. Row 0 is 1.
        macs: Multiply-accumulates of each operation, for the whole traced batch.
        params: Elements of each parameter.
        state_bytes: Bytes of each parameter and buffer.
        activation_bytes: Bytes of each input and result that owns storage, for the whole traced batch.
        born: Operation that makes each activation, shape (activations,); -1 for an input.
        died: Number of operations that have run when it is released, shape (activations,).
        batch: Samples in the traced batch.
        uncounted: Operations that may multiply a parameter and have no formula, with their modules; `macs` lack them.
    """

    sizes: IntArray
    macs: Products
    params: Products
    state_bytes: Products
    activation_bytes: Products
    born: IntArray
    died: IntArray
    batch: int
    uncounted: tuple[str, ...] = ()


class _Builder:
    def __init__(self, flow: Propagation, units: Units) -> None:
        self.flow = flow
        self.units = units
        self.sizes: dict[AffineSize, int] = {AffineSize(1, ()): 0}

    def product(self, coefficient: float, dims: list[tuple[int, int]]) -> tuple[float, tuple[int, ...]]:
        """Make a product of a constant and sizes of dimensions, each given as (value, dimension)."""
        factors = []
        for value, dim in dims:
            labels = self.flow.of(value)[dim]
            size = self.flow.record.values[value].shape[dim]
            affine = self.units.affine(labels, size)
            if affine.shares:
                factors.append(self.sizes.setdefault(affine, len(self.sizes)))
            else:
                coefficient *= affine.fixed
        return coefficient, tuple(sorted(factors))

    def table(self) -> IntArray:
        """Return `Terms.sizes`."""
        rows = np.zeros((len(self.sizes), 1 + len(self.units.groups)), dtype=np.int64)
        for size, i in self.sizes.items():
            rows[i, 0] = size.fixed
            for group, each in size.shares:
                rows[i, 1 + group] = each
        return rows

    def whole(self, coefficient: float, value: int) -> tuple[float, tuple[int, ...]]:
        """Make a product of a constant and the number of elements of a value."""
        return self.product(coefficient, [(value, dim) for dim in range(len(self.flow.record.values[value].shape))])


def cost_terms(flow: Propagation, units: Units) -> Terms:
    """Compute the exact costs of the first example from a propagation."""
    build = _Builder(flow, units)
    record = flow.record
    ops = record.ops[: record.first]
    macs = [build.product(*product) for op in ops for product in products_of(record, op)]
    params = []
    state = []
    for i, value in enumerate(record.values):
        if value.kind in ("parameter", "buffer"):
            state.append(build.whole(value.dtype.itemsize, i))
            if value.kind == "parameter":
                params.append(build.whole(1, i))
    lives = tensor_lives(record)
    activations = [build.whole(record.values[i].dtype.itemsize, i) for i, _, _ in lives]
    return Terms(
        sizes=build.table(),
        macs=_products(_merge(macs)),
        params=_products(_merge(params)),
        state_bytes=_products(_merge(state)),
        activation_bytes=_products(activations),
        born=np.array([born for _, born, _ in lives], dtype=np.int64),
        died=np.array([died for _, _, died in lives], dtype=np.int64),
        batch=max(record.batch, 1),
        uncounted=uncounted(record),
    )


def tensor_lives(record: Record) -> list[tuple[int, int, int]]:
    """List inputs that the first example reads, and its results that own storage, with their lifetimes.

    Returns:
        Value, operation that makes it (-1 for an input), and number of operations that have run when it is released.
    """
    ops = record.ops[: record.first]
    read = {i for op in ops for i in op.inputs()}
    last: dict[int, int] = {}
    for value in record.values:
        last[value.base] = max(min(value.died, len(ops)), last.get(value.base, 0))
    dropped = {  # the CPU makes no statistics in evaluation mode, other devices drop them at once
        value
        for op in ops
        if op.name.endswith(("batch_norm", "no_training")) and not op.args.get("training")
        for value in op.results()[1:]
    }
    lives = []
    for i, value in enumerate(record.values):
        counted = (value.kind == "result" and value.born < len(ops)) or (value.kind == "input" and i in read)
        if counted and value.base == i and i not in dropped:
            lives.append((i, value.born, last[i]))
    return lives


def multiplied_parameters(record: Record) -> dict[str, tuple[int, ...]]:
    """Find shapes of the parameters that convolutions and matrix products read, by name, in the order first read.

    Lookup tables, scales and positions that are only added are not among them. A weight may be a view of its parameter,
    or computed from parameters alone, as weight norm does: then the largest of these counts. Where both factors come
    from parameters, as when a layer reads learned queries, the second is the weight, as in ``F.linear``.
    """
    values = record.values
    source = {i: i for i, value in enumerate(values) if value.kind == "parameter"}
    found = {}
    for op in record.ops:
        sources = [source.get(value) for value in op.inputs()]
        known = [i for i in sources if i is not None]
        if known and len(known) == len(sources):
            largest = max(known, key=lambda i: math.prod(values[i].shape))
            source.update((result, largest) for result in op.results() if result not in source)
        arguments = (op.args[name].id for name in operation_of(op).weights)
        weights = [source[value] for value in arguments if value in source]
        if weights and len(values[weights[-1]].shape) > 1:
            found[values[weights[-1]].name] = values[weights[-1]].shape
    return found


def _merge(terms: list[tuple[float, tuple[int, ...]]]) -> list[tuple[float, tuple[int, ...]]]:
    """Add up products with equal factors, so that a population costs fewer multiplications."""
    total: dict[tuple[int, ...], float] = {}
    for coefficient, factors in terms:
        total[factors] = total.get(factors, 0.0) + coefficient
    return [(coefficient, factors) for factors, coefficient in total.items()]


def _products(terms: list[tuple[float, tuple[int, ...]]]) -> Products:
    width = max((len(factors) for _, factors in terms), default=0)
    factors = np.zeros((len(terms), width), dtype=np.int64)
    for i, (_, own) in enumerate(terms):
        factors[i, : len(own)] = own
    return Products(np.array([coefficient for coefficient, _ in terms], dtype=np.float64), factors)
