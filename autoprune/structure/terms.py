"""Terms of exact costs as products of sizes: multiply-accumulates, elements of tensors, and lifetimes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from autoprune.protocols import FloatArray, IntArray
from autoprune.structure.labels import Propagation
from autoprune.structure.macs import dense_macs, products_of, uncounted
from autoprune.structure.rules.registry import operation_of
from autoprune.structure.tracing.record import Op, Record
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


Term = tuple[float, tuple[int, ...]]
"""Constant factor of a product, and the rows of `Terms.sizes` that it multiplies."""


@dataclass(frozen=True)
class LayerTerms:
    """Costs of one module as sums of products.

    Attributes:
        name: The module; empty for the model itself.
        width: Number of its output features; None if it has no parameters or multiplies nothing.
        macs: Multiply-accumulates of its own operations, for the whole traced batch.
        params: Elements of its own parameters.
        heads: Number of heads of its attention; None if it does not attend, or not by (batch, heads, ...).
    """

    name: str
    width: AffineSize | None
    macs: tuple[Term, ...]
    params: tuple[Term, ...]
    heads: AffineSize | None = None


@dataclass(frozen=True)
class Terms:
    """Costs of a traced model as functions of the widths of its groups.

    Attributes:
        sizes: Affine sizes, shape (s, 1 + groups + branches): fixed part, indices per unit of each group, and share of
            the presence of each branch. Row 0 is 1. They count only for widths of `Presence.effective`.
        macs: Multiply-accumulates of each operation, for the whole traced batch.
        params: Elements of each parameter.
        state_bytes: Bytes of each parameter and buffer.
        activation_bytes: Bytes of each input and result that owns storage, for the whole traced batch.
        born: Operation that makes each activation, shape (activations,); -1 for an input.
        died: Number of operations that have run when it is released, shape (activations,).
        batch: Samples in the traced batch.
        uncounted: Operations that may multiply a parameter and have no formula, with their modules; `macs` lack them.
        layers: The same multiply-accumulates and elements by module, in forward order; modules without any are left
            out.
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
    layers: tuple[LayerTerms, ...] = ()


_NO_PRODUCTS = Products(np.zeros(0), np.zeros((0, 1), dtype=np.int64))
NO_TERMS = Terms(
    sizes=np.ones((1, 1), dtype=np.int64),
    macs=_NO_PRODUCTS,
    params=_NO_PRODUCTS,
    state_bytes=_NO_PRODUCTS,
    activation_bytes=_NO_PRODUCTS,
    born=np.zeros(0, dtype=np.int64),
    died=np.zeros(0, dtype=np.int64),
    batch=1,
)
"""Terms of a structure whose costs nobody asks for."""


@dataclass(frozen=True)
class Contents:
    """Contents of branches in a record.

    Attributes:
        groups: Numbers of the groups inside each branch.
        parents: Position of the branch around each; -1 if there is none.
        ops: Operations inside, with the position of the smallest branch around each.
        tensors: The same for parameters and buffers, by name.
        values: The same for values that exist in another form without the branch.
        handed_on: Values that a branch makes, and those that stand for them without it, with the branch's position.
    """

    groups: Sequence[frozenset[int]] = ()
    parents: Sequence[int] = ()
    ops: Mapping[int, int] = field(default_factory=dict)
    tensors: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[int, int] = field(default_factory=dict)
    handed_on: Sequence[tuple[int, int, int]] = ()


class _Builder:
    def __init__(self, flow: Propagation, units: Units, contents: Contents) -> None:
        self.flow = flow
        self.units = units
        self.contents = contents
        self.sizes: dict[AffineSize, int] = {AffineSize(1, ()): 0}
        self.attending = {flow.record.ops[i].module for i in flow.scores}

    def product(
        self, coefficient: float, dims: list[tuple[int, int]], branch: int = -1
    ) -> tuple[float, tuple[int, ...]]:
        """Make a product of a constant, sizes of dimensions, each given as (value, dimension), and a presence.

        The presence is left out where a size vanishes with the branch.
        """
        factors = []
        vanishes = branch < 0
        for value, dim in dims:
            labels = self.flow.of(value)[dim]
            size = self.flow.record.values[value].shape[dim]
            affine = self.units.affine(labels, size)
            if affine.shares:
                factors.append(self.sizes.setdefault(affine, len(self.sizes)))
                if not affine.fixed and not vanishes:
                    vanishes = all(group in self.contents.groups[branch] for group, _ in affine.shares)
            else:
                coefficient *= affine.fixed
        if not vanishes:
            factors.append(self._row(self.presence(branch)))
        return coefficient, tuple(sorted(factors))

    def presence(self, branch: int) -> AffineSize:
        """Return the presence of a branch as a size; that of the model is 1."""
        return AffineSize(0, ((len(self.units.groups) + branch, 1),)) if branch >= 0 else AffineSize(1, ())

    def _row(self, size: AffineSize) -> int:
        return self.sizes.setdefault(size, len(self.sizes))

    def width(self, op: Op) -> AffineSize | None:
        """Number of features of an operation's first result: the channels of a convolution, else the last dimension."""
        value = op.results()[0]
        shape = self.flow.record.values[value].shape
        if not shape:
            return None
        dim = 1 if "conv" in op.name and len(shape) > 2 else len(shape) - 1
        return self.units.affine(self.flow.of(value)[dim], shape[dim])

    def heads(self, op: Op) -> AffineSize | None:
        """Number of heads of an operation that attends, from its queries or normalised scores (batch, heads, ...)."""
        if "dot_product" in op.name and "attention" in op.name:
            value = op.args["query"].id
        elif "softmax" in op.name and op.module in self.attending:
            value = op.results()[0]
        else:
            return None
        shape = self.flow.record.values[value].shape
        if len(shape) < 4:
            return None
        dim = len(shape) - 3
        return self.units.affine(self.flow.of(value)[dim], shape[dim])

    def instead(self, value: int, branch: int) -> tuple[float, tuple[int, ...]]:
        """Make the bytes of a value that exists where a branch is dropped and the one around it is not."""
        around = self.presence(self.contents.parents[branch])
        shares = (*around.shares, (len(self.units.groups) + branch, -1))
        coefficient, factors = self.whole(self.flow.record.values[value].dtype.itemsize, value)
        row = self._row(AffineSize(around.fixed, tuple(sorted(shares))))
        return coefficient, tuple(sorted((*factors, row)))

    def table(self) -> IntArray:
        """Return `Terms.sizes`."""
        columns = 1 + len(self.units.groups) + len(self.contents.groups)
        rows = np.zeros((len(self.sizes), columns), dtype=np.int64)
        for size, i in self.sizes.items():
            rows[i, 0] = size.fixed
            for group, each in size.shares:
                rows[i, 1 + group] = each
        return rows

    def whole(self, coefficient: float, value: int, branch: int = -1) -> tuple[float, tuple[int, ...]]:
        """Make a product of a constant, the number of elements of a value, and the presence of a branch."""
        dims = [(value, dim) for dim in range(len(self.flow.record.values[value].shape))]
        return self.product(coefficient, dims, branch)


def cost_terms(flow: Propagation, units: Units, contents: Contents | None = None) -> Terms:
    """Compute the exact costs of the first example from a propagation.

    Args:
        flow: The propagation.
        units: Its units.
        contents: Contents of the branches that may be dropped.
    """
    held = contents or Contents()
    build = _Builder(flow, units, held)
    record = flow.record
    ops = record.ops[: record.first]
    macs = {op.index: [build.product(*p, held.ops.get(op.index, -1)) for p in products_of(record, op)] for op in ops}
    params = {}
    state = []
    for i, value in enumerate(record.values):
        if value.kind in ("parameter", "buffer"):
            branch = held.tensors.get(value.name, -1)
            state.append(build.whole(value.dtype.itemsize, i, branch))
            if value.kind == "parameter":
                params[value.name] = build.whole(1, i, branch)
    lives = tensor_lives(record)
    spans = {i: (born, died) for i, born, died in lives}
    activations = []
    for i, born, _ in lives:
        branch = held.values.get(i, held.ops.get(born, -1))
        activations.append(build.whole(record.values[i].dtype.itemsize, i, branch))
    for result, stream, branch in held.handed_on:  # without the branch, what enters it lives on in place of its result
        made, given = (record.values[value].base for value in (result, stream))
        if made in spans and given in spans and spans[given][1] < spans[made][1] and made != given:
            activations.append(build.instead(made, branch))
            lives.append((made, spans[given][1], spans[made][1]))
    layers = _layers(build, macs, params)
    return Terms(
        sizes=build.table(),
        macs=_products(_merge([term for terms in macs.values() for term in terms])),
        params=_products(_merge(list(params.values()))),
        state_bytes=_products(_merge(state)),
        activation_bytes=_products(activations),
        born=np.array([born for _, born, _ in lives], dtype=np.int64),
        died=np.array([died for _, _, died in lives], dtype=np.int64),
        batch=max(record.batch, 1),
        uncounted=uncounted(record),
        layers=layers,
    )


def _layers(build: _Builder, macs: Mapping[int, list[Term]], params: Mapping[str, Term]) -> tuple[LayerTerms, ...]:
    """Sort the terms by module, in the order in which modules first run."""
    record = build.flow.record
    multiplied: dict[str, list[Term]] = defaultdict(list)
    widths: dict[str, AffineSize | None] = {}
    heads: dict[str, AffineSize] = {}
    order: dict[str, None] = {}
    for op in record.ops[: record.first]:
        order.setdefault(op.module)
        if (attends := build.heads(op)) is not None:
            heads[op.module] = attends
        if macs[op.index]:
            multiplied[op.module] += macs[op.index]
            widths[op.module] = build.width(op)  # of the last: what the module hands on
    held: dict[str, list[Term]] = defaultdict(list)
    for name, term in params.items():
        held[name.rpartition(".")[0]].append(term)
    named = [name for name in dict.fromkeys((*order, *held)) if name in multiplied or name in held]
    return tuple(
        LayerTerms(
            name,
            widths.get(name) if name in held else None,
            tuple(_merge(multiplied[name])),
            tuple(_merge(held[name])),
            heads.get(name),
        )
        for name in named
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


@dataclass(frozen=True)
class WeightUse:
    """Use of a weight that is multiplied.

    Attributes:
        times: Multiply-accumulates of one of its elements for one sample, on average: 0 where no formula is known.
        item_bytes: Bytes of an element.
    """

    times: float
    item_bytes: int


def uses_of(record: Record) -> dict[str, WeightUse]:
    """Uses of the weights that `multiplied_parameters` finds."""
    values = {value.name: value for value in record.values if value.kind == "parameter"}
    macs = dict.fromkeys(multiplied_parameters(record), 0.0)
    for op, name in _multiplied(record):
        if op.index < record.first:
            macs[name] += dense_macs(record, op)
    samples = max(record.batch, 1)
    return {
        name: WeightUse(count / (samples * math.prod(values[name].shape)), values[name].dtype.itemsize)
        for name, count in macs.items()
    }


def multiplied_parameters(record: Record) -> dict[str, tuple[int, ...]]:
    """Find shapes of the parameters that convolutions and matrix products read, by name, in the order first read.

    Lookup tables, scales and positions that are only added are not among them. A weight may be a view of its parameter,
    or computed from parameters alone, as weight norm does: then the largest of these counts. Where both factors come
    from parameters, as when a layer reads learned queries, the second is the weight, as in ``F.linear``.
    """
    shapes = {value.name: value.shape for value in record.values if value.kind == "parameter"}
    return {name: shapes[name] for _, name in _multiplied(record)}


def _multiplied(record: Record) -> Iterator[tuple[Op, str]]:
    """Every operation that multiplies with a parameter of more than one dimension, and the name of that parameter."""
    values = record.values
    source = {i: i for i, value in enumerate(values) if value.kind == "parameter"}
    for op in record.ops:
        sources = [source.get(value) for value in op.inputs()]
        known = [i for i in sources if i is not None]
        if known and len(known) == len(sources):
            largest = max(known, key=lambda i: math.prod(values[i].shape))
            source.update((result, largest) for result in op.results() if result not in source)
        arguments = (op.args[name].id for name in operation_of(op).weights)
        weights = [source[value] for value in arguments if value in source]
        if weights and len(values[weights[-1]].shape) > 1:
            yield op, values[weights[-1]].name


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
