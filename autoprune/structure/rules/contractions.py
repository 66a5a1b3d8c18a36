"""Operations that sum products of two or three tensors: matrix products, bilinear layers, distances."""

from __future__ import annotations

from autoprune.structure.labels import Dims, Labels, Propagation
from autoprune.structure.rules.arithmetic import add_bias, contract, join_all
from autoprune.structure.rules.products import argument, dims_of
from autoprune.structure.rules.registry import Formula, Product, Rule, known, rule
from autoprune.structure.tracing.record import Op, Record, Ref


def _contraction(first: str, second: str, bias: str = "", transposed: bool = False) -> Rule:
    """Make the rule of a product of two arguments, the second possibly transposed, to which a bias may be added."""

    def contraction(flow: Propagation, op: Op) -> list[Dims]:
        """Join the contracted dimensions of a matrix product; rows and columns pass."""
        a, b = flow.of(op.args[first].id), flow.of(op.args[second].id)
        if transposed:
            b = b[::-1]
        inner = b[-2] if len(b) > 1 else b[0]
        if op.index in flow.scores:
            for labels in (a[-1], inner):
                flow.freeze(op, labels, f"head dimension of the attention scores in {op.where()}")
        contract(flow, op, a[-1], inner)
        out: Dims = [*a[:-1], *b[-1:]] if len(b) > 1 else [*a[:-1]]
        if len(b) == 3:
            out[0] = join_all(flow, op, [a[0], b[0]])
        if isinstance(op.args.get(bias), Ref):
            add_bias(flow, op, op.args[bias], out)
        return [out]

    return contraction


def _matrices(first: str, second: str) -> Formula:
    """Make the formula of a product of two matrices, or of batches of them; a sparse one counts what it stores."""

    def count(record: Record, op: Op) -> list[Product]:
        a, b = argument(op, first), argument(op, second)
        columns = (b, len(record.values[b].shape) - 1)
        if record.values[a].stored is not None:
            return [(float(record.values[a].stored or 0), [columns])]
        if record.values[b].stored is not None:
            return [(float(record.values[b].stored or 0), [(a, 0)])]
        return [(1, [*dims_of(record, a), columns])]

    return count


def _vectors(first: str) -> Formula:
    """Make the formula of a product of a matrix or vector with a vector."""

    def count(record: Record, op: Op) -> list[Product]:
        matrix = argument(op, first)
        stored = record.values[matrix].stored
        return [(1, dims_of(record, matrix))] if stored is None else [(float(stored), [])]

    return count


def _linear(record: Record, op: Op) -> list[Product]:
    return [(1, [*dims_of(record, argument(op, "input")), (argument(op, "weight"), 0)])]


_SELF, _ADDED, _BATCHES = ("self", "mat2"), ("mat1", "mat2"), ("batch1", "batch2")

known("mm", "bmm", rule=_contraction(*_SELF), macs=_matrices(*_SELF), weights=_SELF)
known("addmm", "_sparse_addmm", rule=_contraction(*_ADDED, "self"), macs=_matrices(*_ADDED), weights=_ADDED)
known("baddbmm", rule=_contraction(*_BATCHES, "self"), macs=_matrices(*_BATCHES), weights=_BATCHES)
known("_scaled_mm", "_int_mm", macs=_matrices(*_SELF), weights=_SELF)
known("_addmm_activation", macs=_matrices(*_ADDED), weights=_ADDED)
known("mv", rule=_contraction("self", "vec"), macs=_vectors("self"), weights=("self",))
known("addmv", rule=_contraction("mat", "vec", "self"), macs=_vectors("mat"), weights=("mat",))
known("dot", rule=_contraction("self", "tensor"), macs=_vectors("self"))
known("vdot", rule=_contraction("self", "other"), macs=_vectors("self"))
known("linear", rule=_contraction("input", "weight", "bias", transposed=True), macs=_linear, weights=("weight",))
known("_linear", macs=_linear)


@rule("addbmm", macs=_matrices(*_BATCHES), weights=_BATCHES)
def summed_products(flow: Propagation, op: Op) -> list[Dims]:
    """Join the contracted dimensions of a summed batch of matrix products, and the batches, which are summed too."""
    a, b = flow.of(op.args["batch1"].id), flow.of(op.args["batch2"].id)
    contract(flow, op, a[2], b[1])
    flow.join(op, a[0], b[0])
    out: Dims = [a[1], b[2]]
    add_bias(flow, op, op.args["self"], out)
    return [out]


def _outer(record: Record, op: Op) -> list[Product]:
    return [(1, [(argument(op, "vec1"), 0), (argument(op, "vec2"), 0)])]


@rule("addr", macs=_outer)
def outer_product(flow: Propagation, op: Op) -> list[Dims]:
    """Take rows from one vector and columns from the other."""
    out: Dims = [flow.of(op.args[name].id)[0] for name in ("vec1", "vec2")]
    add_bias(flow, op, op.args["self"], out)
    return [out]


def _grouped(record: Record, op: Op) -> list[Product]:
    """Count products of each row with one matrix of a stack, or of each matrix of a stack with its columns or rows."""
    a, b = argument(op, "self"), argument(op, "mat2")
    rank, other = len(record.values[a].shape), len(record.values[b].shape)
    return [(1, [*dims_of(record, a, 1 if rank > other else 0), (b, other - 1)])]


known("_scaled_grouped_mm", macs=_grouped)


@rule("_grouped_mm", macs=_grouped, weights=("mat2",))
def grouped_mm(flow: Propagation, op: Op) -> list[Dims]:
    """Multiply runs of rows by a matrix each (mixture of experts): join the contracted dimension; the experts stay."""
    rows, matrices = flow.of(op.args["self"].id), flow.of(op.args["mat2"].id)
    for labels in matrices[:-2]:
        flow.freeze(op, labels, f"chosen by a router in {op.where()}")
    flow.join(op, rows[-1], matrices[-2])
    aligned = 16 // flow.record.values[op.args["self"].id].dtype.itemsize  # strides are multiples of 16 bytes
    flow.multiples += [(labels, aligned) for labels in (rows[-1], *matrices[-2:]) if labels is not None]
    return [[*rows[:-1], matrices[-1]]]


_FACTORS = (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3"))
"""Tensors that `_trilinear` multiplies, each with the dimensions that it is broadcast along."""


def _three_factors(record: Record, op: Op) -> list[Product]:
    """Count a sum of products of three tensors, each broadcast along its missing dimensions: a bilinear layer."""
    dims: dict[int, tuple[int, int]] = {}
    for name, broadcast in _FACTORS:
        value = argument(op, name)
        expanded = op.args[broadcast]
        rank = len(record.values[value].shape) + len(expanded)
        own = [axis for axis in range(rank) if axis not in expanded]
        for dim, axis in enumerate(own):
            dims.setdefault(axis, (value, dim))
    return [(1, list(dims.values()))]


@rule("_trilinear", macs=_three_factors, weights=("i2",))
def trilinear(flow: Propagation, op: Op) -> list[Dims]:
    """Sum products of three tensors (a bilinear layer): aligned dimensions are joined, those of the sum disappear."""
    rank = len(flow.of(op.args["i1"].id)) + len(op.args["expand1"])
    met: list[list[Labels]] = [[] for _ in range(rank)]
    for name, broadcast in _FACTORS:
        axes = [axis for axis in range(rank) if axis not in op.args[broadcast]]
        for axis, labels in zip(axes, flow.of(op.args[name].id), strict=True):
            met[axis].append(labels)
    for axis in op.args["sumdim"]:
        for labels in met[axis][1:]:
            contract(flow, op, met[axis][0], labels)
    return [[join_all(flow, op, met[axis]) for axis in range(rank) if axis not in op.args["sumdim"]]]


def _distances(record: Record, op: Op) -> list[Product]:
    a, b = argument(op, "x1"), argument(op, "x2")
    return [(1, [*dims_of(record, a), (b, len(record.values[b].shape) - 2)])]


@rule("_cdist_forward", "_euclidean_dist", macs=_distances)
def distances(flow: Propagation, op: Op) -> list[Dims]:
    """Join the dimension along which distances between the rows of two matrices are measured; rows pass."""
    a, b = flow.of(op.args["x1"].id), flow.of(op.args["x2"].id)
    contract(flow, op, a[-1], b[-1])
    lead = [flow.join(op, left, right) for left, right in zip(a[:-2], b[:-2], strict=True)]
    return [[*lead, a[-2], b[-2]]]


def _own_distances(record: Record, op: Op) -> list[Product]:
    return [(1, [(op.results()[0], 0), (argument(op, "self"), 1)])]


known("_pdist_forward", macs=_own_distances)
