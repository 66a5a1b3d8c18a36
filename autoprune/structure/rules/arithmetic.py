"""Elementwise operations, reductions, and tensors made from sizes."""

from __future__ import annotations

from typing import Any

from autoprune.structure.labels import Dims, Labels, Propagation
from autoprune.structure.rules.registry import Narrowed, rule
from autoprune.structure.tracing.record import Op, Ref


@rule("clone", "contiguous", "_to_copy", "alias", passes=True, rearranges=True)
@rule("copy_", "copy", "detach", rearranges=True)
@rule("masked_fill", "masked_fill_", passes=True)
@rule("softmax", "_softmax", "_safe_softmax", "_log_softmax", "cumsum", "logcumsumexp", statistics=True)
@rule("pointwise", "hardswish", "hardswish_", "hardtanh_", "_prelu_kernel", "log_sigmoid_forward")
@rule("dropout", "native_dropout", "renorm", "rrelu_with_noise", "fill_", "zero_", "tril", "triu")
@rule("detach_", "lift_fresh", "lift_fresh_copy", "_conj", "_neg_view", "resolve_conj", "resolve_neg")
def elementwise(flow: Propagation, op: Op) -> list[Dims]:
    """Join aligned dimensions; a size of 1 broadcasts and joins nothing."""
    results = []
    for result in op.results():
        shape = flow.record.values[result].shape
        dims: Dims = []
        for back in range(len(shape), 0, -1):
            aligned = [flow.of(value)[-back] for value in op.inputs() if _size(flow, value, back) == shape[-back] != 1]
            dims.append(join_all(flow, op, aligned))
        results.append(dims)
    return results


def _size(flow: Propagation, value: int, back: int) -> int:
    shape = flow.record.values[value].shape
    return shape[-back] if back <= len(shape) else 1


def join_all(flow: Propagation, op: Op, aligned: list[Labels]) -> Labels:
    """Join aligned dimensions of several tensors; None if there are none."""
    if not aligned:
        return None
    joined = aligned[0]
    for labels in aligned[1:]:
        joined = flow.join(op, joined, labels)
    return joined


@rule("sum", "nansum", "aminmax")
@rule("mean", "prod", "norm", "linalg_vector_norm", "logsumexp", "var", "std", "var_mean", "std_mean", statistics=True)
@rule("amax", "amin", "max", "min", "argmax", "argmin", "any", "all", statistics=True)
def reduction(flow: Propagation, op: Op) -> list[Dims]:
    """Drop the reduced dimensions. Positions along a labelled dimension (argmax) have no meaning for removed units."""
    source = op.args["self"]
    dims = flow.of(source.id)
    if len(op.inputs()) > 1:  # max(a, b) is elementwise
        return elementwise(flow, op)
    axes = op.args.get("dim")
    if axes is None or axes == []:
        axes = range(len(dims))
    elif isinstance(axes, int):
        axes = [axes]
    reduced = {axis % len(dims) for axis in axes} if dims else set()
    positions = {"argmax": 0, "argmin": 0, "max": 1, "min": 1}.get(op.name, len(op.results()))
    if not flow.read.isdisjoint(op.results()[positions:]):
        for axis in reduced:
            flow.freeze(op, dims[axis], f"positions are returned by {op.where()}")
    keep = bool(op.args.get("keepdim", False))
    out: Dims = [None if axis in reduced else labels for axis, labels in enumerate(dims) if keep or axis not in reduced]
    return [out for _ in op.results()]


def fixed(flow: Propagation, values: list[int]) -> list[Dims]:
    """Labels of results that are fixed in every dimension."""
    return [[None] * len(flow.record.values[value].shape) for value in values]


def contract(flow: Propagation, op: Op, data: Labels, weight: Labels) -> None:
    """Join the two sides of a sum over a dimension, and give the reason in the user's terms if one side is fixed."""
    if data is None and weight is not None:
        flow.freeze(op, weight, f"reads the model's input or another fixed dimension in {op.where()}")
    elif weight is None:
        flow.freeze(op, data, f"contracted with a fixed dimension by {op.where()}")
    else:
        flow.join(op, data, weight)


def add_bias(flow: Propagation, op: Op, bias: Ref, out: Dims) -> None:
    """Join a bias, broadcast from the right, with a result."""
    for back, labels in enumerate(reversed(flow.of(bias.id)), start=1):
        if _size(flow, bias.id, back) != 1:
            out[-back] = flow.join(op, out[-back], labels)


def size_of_result(op: Op, narrowed: Narrowed) -> dict[str, Any]:
    """Give the result its shape."""
    name = next(name for name in ("size", "shape") if name in op.args)
    return {name: list(narrowed.shape(op.results()[0]))}


@rule("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "new_empty", "rand", "randn", resize=size_of_result)
@rule("empty", resize=size_of_result, rearranges=True)
@rule("empty_strided", rearranges=True)
@rule("scalar_tensor")
def factory(flow: Propagation, op: Op) -> list[Dims]:
    """Give a tensor made from sizes fresh labels: the code that made it may follow the width of a neighbour."""
    return [[flow.fresh(size) for size in flow.record.values[value].shape] for value in op.results()]


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "bernoulli", "bernoulli_")
def like(flow: Propagation, op: Op) -> list[Dims]:
    """Give a tensor shaped like another its labels."""
    return [list(flow.of(op.args["self"].id)) for _ in op.results()]


@rule("arange", "linspace", "eye", "tril_indices", "triu_indices")
def constant(flow: Propagation, op: Op) -> list[Dims]:
    """Fix a tensor whose positions have a meaning."""
    return fixed(flow, op.results())
