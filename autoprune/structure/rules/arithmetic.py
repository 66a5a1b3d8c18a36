"""Rules for elementwise operations, reductions, contractions and tensors made from nothing."""

from __future__ import annotations

from autoprune.structure.propagate import Dims, Labels, Propagation
from autoprune.structure.record import Op, Ref
from autoprune.structure.rules import rule


@rule(
    "pointwise",
    "hardswish",
    "hardswish_",
    "hardtanh_",
    "_prelu_kernel",
    "log_sigmoid_forward",
    "masked_fill",
    "masked_fill_",
    "dropout",
    "native_dropout",
    "clone",
    "copy_",
    "copy",
    "detach",
    "detach_",
    "alias",
    "contiguous",
    "_to_copy",
    "lift_fresh",
    "lift_fresh_copy",
    "softmax",
    "_softmax",
    "_log_softmax",
    "_safe_softmax",
    "cumsum",
    "logcumsumexp",
    "fill_",
    "zero_",
    "tril",
    "triu",
    "renorm",
    "rrelu_with_noise",
    "_conj",
    "_neg_view",
    "resolve_conj",
    "resolve_neg",
)
def elementwise(flow: Propagation, op: Op) -> list[Dims]:
    """Join aligned dimensions; a size of 1 broadcasts and joins nothing."""
    results = []
    for result in op.results():
        shape = flow.record.values[result].shape
        dims: Dims = []
        for back in range(len(shape), 0, -1):
            aligned = [flow.of(value)[-back] for value in op.inputs() if _size(flow, value, back) == shape[-back] != 1]
            dims.append(_join_all(flow, op, aligned))
        results.append(dims)
    return results


def _size(flow: Propagation, value: int, back: int) -> int:
    shape = flow.record.values[value].shape
    return shape[-back] if back <= len(shape) else 1


def _join_all(flow: Propagation, op: Op, aligned: list[Labels]) -> Labels:
    if not aligned:
        return None
    joined = aligned[0]
    for labels in aligned[1:]:
        joined = flow.join(op, joined, labels)
    return joined


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "prod",
    "nansum",
    "any",
    "all",
    "max",
    "min",
    "argmax",
    "argmin",
    "aminmax",
)
def reduction(flow: Propagation, op: Op) -> list[Dims]:
    """Drop the reduced dimensions. Positions along a labelled dimension (argmax) have no meaning for removed units."""
    source = op.args["self"]
    dims = flow.of(source.id)
    if len(op.inputs()) > 1:  # max(a, b) is elementwise
        return elementwise(flow, op)
    axes = op.args.get("dim")
    axes = range(len(dims)) if axes is None or axes == [] else [axes] if isinstance(axes, int) else axes
    reduced = {axis % len(dims) for axis in axes} if dims else set()
    positions = {"argmax": 0, "argmin": 0, "max": 1, "min": 1}.get(op.name, len(op.results()))
    if not flow.read.isdisjoint(op.results()[positions:]):
        for axis in reduced:
            flow.freeze(op, dims[axis], f"positions are returned by {op.where()}")
    keep = bool(op.args.get("keepdim", False))
    out: Dims = [None if axis in reduced else labels for axis, labels in enumerate(dims) if keep or axis not in reduced]
    return [out for _ in op.results()]


@rule("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "vdot", "linear", "_sparse_addmm")
def contraction(flow: Propagation, op: Op) -> list[Dims]:
    """Join the contracted dimensions of a matrix product; rows and columns pass."""
    names = {
        "addmm": ("mat1", "mat2"),
        "_sparse_addmm": ("mat1", "mat2"),
        "baddbmm": ("batch1", "batch2"),
        "mv": ("self", "vec"),
        "addmv": ("mat", "vec"),
        "dot": ("self", "tensor"),
        "vdot": ("self", "other"),
        "linear": ("input", "weight"),
    }.get(op.name, ("self", "mat2"))
    a, b = flow.of(op.args[names[0]].id), flow.of(op.args[names[1]].id)
    if op.name == "linear":
        b = b[::-1]
    inner = b[-2] if len(b) > 1 else b[0]
    if op.index in flow.scores:
        for labels in (a[-1], inner):
            flow.freeze(op, labels, f"head dimension of the attention scores in {op.where()}")
    contract(flow, op, a[-1], inner)
    out: Dims = [*a[:-1], *b[-1:]] if len(b) > 1 else [*a[:-1]]
    if len(b) == 3:
        out[0] = _join_all(flow, op, [a[0], b[0]])
    bias = op.args.get("bias" if op.name == "linear" else "self" if "add" in op.name else "")
    if isinstance(bias, Ref):
        add_bias(flow, op, bias, out)
    return [out]


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


@rule(
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "rand",
    "randn",
    "scalar_tensor",
    "empty_strided",
)
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
    return [[None] * len(flow.record.values[value].shape) for value in op.results()]


@rule("addbmm")
def summed_products(flow: Propagation, op: Op) -> list[Dims]:
    """Join the contracted dimensions of a summed batch of matrix products, and the batches, which are summed too."""
    a, b = flow.of(op.args["batch1"].id), flow.of(op.args["batch2"].id)
    contract(flow, op, a[2], b[1])
    flow.join(op, a[0], b[0])
    out: Dims = [a[1], b[2]]
    add_bias(flow, op, op.args["self"], out)
    return [out]


@rule("addr")
def outer_product(flow: Propagation, op: Op) -> list[Dims]:
    """Take rows from one vector and columns from the other."""
    out: Dims = [flow.of(op.args[name].id)[0] for name in ("vec1", "vec2")]
    add_bias(flow, op, op.args["self"], out)
    return [out]


@rule("_trilinear")
def trilinear(flow: Propagation, op: Op) -> list[Dims]:
    """Sum products of three tensors (a bilinear layer): aligned dimensions are joined, those of the sum disappear."""
    rank = len(flow.of(op.args["i1"].id)) + len(op.args["expand1"])
    met: list[list[Labels]] = [[] for _ in range(rank)]
    for name, broadcast in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        axes = [axis for axis in range(rank) if axis not in op.args[broadcast]]
        for axis, labels in zip(axes, flow.of(op.args[name].id), strict=True):
            met[axis].append(labels)
    for axis in op.args["sumdim"]:
        for labels in met[axis][1:]:
            contract(flow, op, met[axis][0], labels)
    return [[_join_all(flow, op, met[axis]) for axis in range(rank) if axis not in op.args["sumdim"]]]


@rule("_cdist_forward", "_euclidean_dist")
def distances(flow: Propagation, op: Op) -> list[Dims]:
    """Join the dimension along which distances between the rows of two matrices are measured; rows pass."""
    a, b = flow.of(op.args["x1"].id), flow.of(op.args["x2"].id)
    contract(flow, op, a[-1], b[-1])
    lead = [flow.join(op, left, right) for left, right in zip(a[:-2], b[:-2], strict=True)]
    return [[*lead, a[-2], b[-2]]]
