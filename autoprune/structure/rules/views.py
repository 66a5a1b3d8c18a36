"""Rules for operations that rearrange indices: views, concatenation, splitting, padding, shuffling."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import numpy as np

from autoprune.protocols import IntArray
from autoprune.structure.propagate import FIXED, OUTER, Dims, Labels, Propagation
from autoprune.structure.record import Op
from autoprune.structure.rules import rule
from autoprune.structure.strides import strided_steps


def _source(flow: Propagation, op: Op) -> tuple[Dims, tuple[int, ...]]:
    value = op.args["self"].id
    return flow.of(value), flow.record.values[value].shape


def _shape(flow: Propagation, op: Op) -> tuple[int, ...]:
    return flow.record.values[op.results()[0]].shape


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy")
def view(flow: Propagation, op: Op) -> list[Dims]:
    """Match runs of old and new dimensions with equal products; inside a run merge, then split."""
    dims, old = _source(flow, op)
    new = _shape(flow, op)
    if prod(old) != prod(new) or not prod(old):  # a view as another dtype, or of nothing: no run matches
        for labels in dims:
            flow.freeze(op, labels, f"reinterpreted by {op.where()}")
        return [[None] * len(new)]
    out: Dims = []
    for (i, j), (k, m) in matching_runs(old, new):
        if old[i:j] == new[k:m]:
            out.extend(dims[i:j])
            continue
        merged = _merge(flow, op, dims[i:j], old[i:j])
        out.extend(_split(flow, op, merged, new[k:m]))
    return [out]


def matching_runs(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Shortest runs ``((i, j), (k, m))`` with ``prod(old[i:j]) == prod(new[k:m])`` that cover both shapes.

    Example:
        >>> matching_runs((2, 8, 3, 3), (2, 72))
        [((0, 1), (0, 1)), ((1, 4), (1, 2))]
    """
    runs, i, k = [], 0, 0
    while i < len(old) or k < len(new):
        j, m = min(i + 1, len(old)), min(k + 1, len(new))
        while prod(old[i:j]) != prod(new[k:m]):
            if (prod(old[i:j]) < prod(new[k:m]) and j < len(old)) or m == len(new):
                j += 1
            else:
                m += 1
        runs.append(((i, j), (k, m)))
        i, k = j, m
    return runs


def _merge(flow: Propagation, op: Op, dims: Dims, shape: tuple[int, ...]) -> Labels:
    labelled = [axis for axis, labels in enumerate(dims) if labels is not None]
    if not labelled:
        return None
    own = [axis for axis in labelled if (labels := dims[axis]) is not None and not flow.invented(labels)]
    axis = own[flow.choose(op, 0, len(own)) % len(own)] if len(own) > 1 else (own or labelled)[0]
    for other in labelled:
        if other != axis:
            flow.freeze(op, dims[other], f"merged with another prunable dimension by {op.where()}")
    kept = dims[axis]
    assert kept is not None
    expanded = kept.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return np.ascontiguousarray(np.broadcast_to(expanded, shape)).reshape(-1)


def _split(flow: Propagation, op: Op, labels: Labels, shape: tuple[int, ...]) -> Dims:
    """Give the labels of a split dimension to one factor; labels that differ along the other factors are tied."""
    out: Dims = [None] * len(shape)
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    if labels is None or not wide:
        return out
    grid = labels.reshape(shape)
    axis = next((a for a in wide if _depends_only_on(grid, a)), None)
    if axis is None:
        axis = wide[flow.choose(op, OUTER, len(wide))]
    out[axis] = flow.tie(op, np.moveaxis(grid, axis, 0).reshape(shape[axis], -1))
    return out


def _depends_only_on(grid: IntArray, axis: int) -> bool:
    first = np.take(np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1), [0], axis=1)
    return bool((np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1) == first).all())


@rule("permute")
def permute(flow: Propagation, op: Op) -> list[Dims]:
    """Reorder dimensions."""
    dims, _ = _source(flow, op)
    return [[dims[axis] for axis in op.args["dims"]]]


@rule("transpose", "t", "transpose_", "t_", "numpy_T")
def transpose(flow: Propagation, op: Op) -> list[Dims]:
    """Swap two dimensions."""
    dims = list(_source(flow, op)[0])
    if len(dims) > 1:
        a, b = op.args.get("dim0", 0), op.args.get("dim1", 1)
        dims[a], dims[b] = dims[b], dims[a]
    return [dims]


@rule("unsqueeze", "unsqueeze_")
def unsqueeze(flow: Propagation, op: Op) -> list[Dims]:
    """Insert a dimension of size 1."""
    dims = list(_source(flow, op)[0])
    dims.insert(op.args["dim"] % (len(dims) + 1), None)
    return [dims]


@rule("squeeze", "squeeze_")
def squeeze(flow: Propagation, op: Op) -> list[Dims]:
    """Drop dimensions of size 1."""
    dims, shape = _source(flow, op)
    axes = op.args.get("dim", range(len(shape)))
    axes = {axis % len(shape) for axis in ([axes] if isinstance(axes, int) else axes)} if shape else set()
    return [[labels for axis, labels in enumerate(dims) if not (axis in axes and shape[axis] == 1)]]


@rule("expand", "expand_copy")
def expand(flow: Propagation, op: Op) -> list[Dims]:
    """Repeat dimensions of size 1; the repeated ones follow whatever they meet."""
    dims, shape = _source(flow, op)
    new = _shape(flow, op)
    out: Dims = []
    for back in range(len(new), 0, -1):
        same = back <= len(shape) and shape[-back] == new[-back]
        out.append(dims[-back] if same else flow.fresh(new[-back]))
    return [out]


@rule("repeat")
def repeat(flow: Propagation, op: Op) -> list[Dims]:
    """Tile each dimension."""
    dims, shape = _source(flow, op)
    times = op.args["repeats"]
    lead = len(times) - len(shape)
    out: Dims = []
    for axis, count in enumerate(times):
        size = shape[axis - lead] if axis >= lead else 1
        labels = dims[axis - lead] if axis >= lead else None
        out.append(flow.fresh(count) if size == 1 else None if labels is None else np.tile(labels, count))
    return [out]


@rule("repeat_interleave")
def repeat_interleave(flow: Propagation, op: Op) -> list[Dims]:
    """Repeat each index in place; only a constant number of times."""
    dims, _ = _source(flow, op)
    axis, times = op.args.get("dim"), op.args["repeats"]
    if not isinstance(times, int) or axis is None:
        for labels in dims:
            flow.freeze(op, labels, f"repeated a varying number of times by {op.where()}")
        return [[None] * len(_shape(flow, op))]
    out = list(dims)
    labels = out[axis]
    out[axis] = None if labels is None else np.repeat(labels, times)
    return [out]


@rule("select", "select_copy")
def select(flow: Propagation, op: Op) -> list[Dims]:
    """Take one index of a dimension, which must then stay."""
    dims, _ = _source(flow, op)
    axis = op.args["dim"] % len(dims)
    taken = dims[axis]
    if not flow.read.isdisjoint(op.results()):  # where not read, only its shape was asked for
        flow.freeze(op, taken, f"indexed by position in {op.where()}")
    return [[labels for i, labels in enumerate(dims) if i != axis]]


@rule("slice", "slice_copy", "narrow")
def slice_(flow: Propagation, op: Op) -> list[Dims]:
    """Take a range of a dimension."""
    dims, shape = _source(flow, op)
    axis = op.args["dim"] % len(dims)
    out = list(dims)
    taken = out[axis]
    if taken is not None:
        begin, end, step = _range(op, shape[axis])
        if step != 1:
            flow.freeze(op, taken, f"taken in steps of {step} by {op.where()}")
        out[axis] = np.ascontiguousarray(taken[begin:end:step])
    return [out]


def _range(op: Op, size: int) -> tuple[int, int, int]:
    if op.name == "narrow":
        return op.args["start"], op.args["start"] + op.args["length"], 1
    begin, end, _ = slice(op.args.get("start"), op.args.get("end")).indices(size)
    return begin, end, op.args.get("step", 1)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "split_copy")
def split(flow: Propagation, op: Op) -> list[Dims]:
    """Cut a dimension into parts. Equal parts stay equal: the i-th units of all parts are tied."""
    dims, _ = _source(flow, op)
    axis = op.args.get("dim", 0) % len(dims)
    labels = dims[axis]
    sizes = [flow.record.values[value].shape[axis] for value in op.results()]
    if labels is None:
        return [list(dims) for _ in sizes]
    bounds = np.cumsum([0, *sizes])
    parts = [np.ascontiguousarray(labels[a:b]) for a, b in pairwise(bounds)]
    if len(set(sizes)) == 1:
        flow.tie(op, np.stack(parts, axis=1))
    return [[part if i == axis else other for i, other in enumerate(dims)] for part in parts]


@rule("glu")
def glu(flow: Propagation, op: Op) -> list[Dims]:
    """Gate one half of a dimension by the other: the i-th units of both are tied."""
    out = list(_source(flow, op)[0])
    axis = op.args["dim"] % len(out)
    labels = out[axis]
    if labels is not None:
        out[axis] = flow.tie(op, labels.reshape(2, -1).T)
    return [out]


@rule("unbind", "unbind_copy")
def unbind(flow: Propagation, op: Op) -> list[Dims]:
    """Cut a dimension into single indices, each of which must stay."""
    dims, _ = _source(flow, op)
    axis = op.args.get("dim", 0) % len(dims)
    flow.freeze(op, dims[axis], f"unpacked one by one by {op.where()}")
    return [[labels for i, labels in enumerate(dims) if i != axis] for _ in op.results()]


@rule("cat", "concatenate")
def cat(flow: Propagation, op: Op) -> list[Dims]:
    """Concatenate one dimension, join the others."""
    parts = [flow.of(ref.id) for ref in op.args["tensors"]]
    sizes = [flow.record.values[ref.id].shape for ref in op.args["tensors"]]
    pairs = [(dims, shape) for dims, shape in zip(parts, sizes, strict=True) if shape != (0,)]
    rank = len(pairs[0][1])
    axis = op.args.get("dim", 0) % rank
    out = list(pairs[0][0])
    for dims, _ in pairs[1:]:
        for i in range(rank):
            if i != axis:
                out[i] = flow.join(op, out[i], dims[i])
    if any(dims[axis] is not None for dims, _ in pairs):
        out[axis] = np.concatenate([_or_fixed(dims[axis], shape[axis]) for dims, shape in pairs])
    return [out]


def _or_fixed(labels: Labels, size: int) -> IntArray:
    return np.repeat(FIXED, size) if labels is None else labels


@rule("stack")
def stack(flow: Propagation, op: Op) -> list[Dims]:
    """Join all dimensions; the new one is fixed."""
    parts = [flow.of(ref.id) for ref in op.args["tensors"]]
    out = list(parts[0])
    for dims in parts[1:]:
        out = [flow.join(op, a, b) for a, b in zip(out, dims, strict=True)]
    out.insert(op.args.get("dim", 0) % (len(out) + 1), None)
    return [out]


@rule("view_as_complex", "view_as_real")
def complex_view(flow: Propagation, op: Op) -> list[Dims]:
    """Take pairs of real numbers for complex ones, or the other way round; the pair is fixed."""
    dims = list(_source(flow, op)[0])
    if op.name == "view_as_real":
        return [[*dims, None]]
    flow.freeze(op, dims[-1], f"real and imaginary part in {op.where()}")
    return [dims[:-1]]


@rule("unfold")
def windows(flow: Propagation, op: Op) -> list[Dims]:
    """Make windows along one dimension, which must stay; their length comes last."""
    dims = list(_source(flow, op)[0])
    axis = op.args["dimension"] % max(len(dims), 1)
    flow.freeze(op, dims[axis], f"cut into windows by {op.where()}")
    return [[*dims[:axis], None, *dims[axis + 1 :], None]]


@rule("rot90")
def rotate(flow: Propagation, op: Op) -> list[Dims]:
    """Turn the plane of two dimensions, which must stay."""
    dims = list(_source(flow, op)[0])
    for axis in op.args.get("dims", (0, 1)):
        flow.freeze(op, dims[axis], f"turned by {op.where()}")
        dims[axis] = None
    return [dims]


@rule("constant_pad_nd", *[f"{kind}_pad{rank}d" for kind in ("reflection", "replication") for rank in (1, 2, 3)])
def pad(flow: Propagation, op: Op) -> list[Dims]:
    """Pad from the last dimension backwards; the code fixes the number of padded channels, so they stay."""
    out = list(_source(flow, op)[0])
    amounts = op.args.get("pad", op.args.get("padding"))
    assert amounts is not None
    for back in range(1, len(amounts) // 2 + 1):
        before, after = amounts[2 * back - 2], amounts[2 * back - 1]
        labels = out[-back]
        if labels is None or before == after == 0:
            continue
        if op.name != "constant_pad_nd" or before < 0 or after < 0:
            flow.freeze(op, labels, f"padded from its own ends by {op.where()}")
            out[-back] = None
        else:
            out[-back] = np.concatenate([np.repeat(FIXED, before), labels, np.repeat(FIXED, after)])
    return [out]


@rule("as_strided_", "as_strided")
def as_strided(flow: Propagation, op: Op) -> list[Dims]:
    """Change strides: a dimension with a step of one passes, one with sliding windows must stay."""
    dims, shape = _source(flow, op)
    new = _shape(flow, op)
    if shape == new:
        return [list(dims)]
    steps = strided_steps(flow.record, op) or [(None, 1)] * len(new)
    walked = [dim for dim, _ in steps]
    whole = {
        dim: axis
        for axis, (dim, count) in enumerate(steps)
        if dim is not None and count == 1 and new[axis] == shape[dim] and walked.count(dim) == 1
    }
    for axis, labels in enumerate(dims):
        if axis not in whole:
            flow.freeze(op, labels, f"reinterpreted by {op.where()}")
    return [[dims[dim] if dim is not None and whole.get(dim) == axis else None for axis, dim in enumerate(walked)]]


@rule("flip", "roll")
def reorder(flow: Propagation, op: Op) -> list[Dims]:
    """Reverse or rotate dimensions; a rotated labelled dimension must stay whole."""
    out = list(_source(flow, op)[0])
    for axis in op.args["dims"]:
        labels = out[axis]
        if op.name == "flip" and labels is not None:
            out[axis] = np.ascontiguousarray(labels[::-1])
        elif labels is not None:
            flow.freeze(op, labels, f"rotated by {op.where()}")
    return [out]


@rule("pixel_shuffle")
def pixel_shuffle(flow: Propagation, op: Op) -> list[Dims]:
    """Turn each run of r * r channels into space: the channels of a run are tied."""
    out = list(_source(flow, op)[0])
    labels = out[-3]
    if labels is not None:
        grid = labels.reshape(-1, op.args["upscale_factor"] ** 2)
        out[-3] = flow.tie(op, grid) if len(grid) > 1 else None
        if len(grid) == 1:
            flow.freeze(op, labels, f"turned into space by {op.where()}")
    return [out]


@rule("pixel_unshuffle")
def pixel_unshuffle(flow: Propagation, op: Op) -> list[Dims]:
    """Turn space into channels: each channel becomes a run of r * r."""
    out = list(_source(flow, op)[0])
    labels = out[-3]
    out[-3] = None if labels is None else np.repeat(labels, op.args["downscale_factor"] ** 2)
    return [out]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(flow: Propagation, op: Op) -> list[Dims]:
    """Interleave the channels of the parts; the i-th channels of all parts are tied."""
    out = list(_source(flow, op)[0])
    labels = out[1]
    if labels is not None:
        grid = labels.reshape(op.args["groups"], -1).T
        flow.tie(op, grid)
        out[1] = np.ascontiguousarray(grid).reshape(-1)
    return [out]


@rule("_pack_padded_sequence")
def pack_sequence(flow: Propagation, op: Op) -> list[Dims]:
    """Put the steps of sequences of several lengths into one dimension; channels pass."""
    dims = flow.of(op.args["input"].id)
    for labels in dims[:2]:
        flow.freeze(op, labels, f"used as time by {op.where()}")
    return [[None, *dims[2:]], [None]]


@rule("_pad_packed_sequence")
def pad_sequence(flow: Propagation, op: Op) -> list[Dims]:
    """Separate the steps of packed sequences again; channels pass."""
    rows, *channels = flow.of(op.args["data"].id)
    flow.freeze(op, rows, f"used as time by {op.where()}")
    return [[None, None, *channels], [None]]
