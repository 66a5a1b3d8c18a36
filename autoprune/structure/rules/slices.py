"""Parts of a dimension, taken or put together: selection, slicing, splitting, concatenation, padding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from autoprune.protocols import IntArray
from autoprune.structure.labels import FIXED, Dims, Labels, Propagation
from autoprune.structure.rules.registry import Narrowed, rule
from autoprune.structure.rules.views import source
from autoprune.structure.tracing.record import Op


def _index(op: Op, narrowed: Narrowed) -> dict[str, Any]:
    index = narrowed.alive(op.args["self"].id)[op.args["dim"]]
    return {} if index is None else {"index": int(np.searchsorted(index, op.args["index"]))}


@rule("select", resize=_index)
@rule("select_copy")
def select(flow: Propagation, op: Op) -> list[Dims]:
    """Take one index of a dimension, which must then stay."""
    dims, _ = source(flow, op)
    axis = op.args["dim"] % len(dims)
    taken = dims[axis]
    if not flow.read.isdisjoint(op.results()):  # where not read, only its shape was asked for
        flow.freeze(op, taken, f"indexed by position in {op.where()}")
    return [[labels for i, labels in enumerate(dims) if i != axis]]


def _ends(op: Op, narrowed: Narrowed) -> dict[str, Any]:
    index = narrowed.alive(op.args["self"].id)[op.args["dim"]]
    if index is None:
        return {}
    size = narrowed.record.values[op.args["self"].id].shape[op.args["dim"]]
    begin, end, _ = slice(op.args.get("start"), op.args.get("end")).indices(size)
    return {"start": int((index < begin).sum()), "end": int((index < end).sum())}


@rule("slice", resize=_ends, passes=True)
@rule("slice_copy", "narrow")
def slice_(flow: Propagation, op: Op) -> list[Dims]:
    """Take a range of a dimension."""
    dims, shape = source(flow, op)
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


def _sizes(op: Op, narrowed: Narrowed) -> dict[str, Any]:
    sizes = [narrowed.shape(value)[op.args.get("dim", 0)] for value in op.results()]
    name = "split_sizes" if "split_sizes" in op.args else "split_size"
    return {name: sizes if name == "split_sizes" or isinstance(op.args[name], list) else sizes[0]}


@rule("split", "split_with_sizes", "unsafe_split", "split_copy", resize=_sizes)
@rule("unsafe_chunk")
def split(flow: Propagation, op: Op) -> list[Dims]:
    """Cut a dimension into parts. Equal parts stay equal: the i-th units of all parts are tied."""
    dims, _ = source(flow, op)
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


@rule("unbind", "unbind_copy")
def unbind(flow: Propagation, op: Op) -> list[Dims]:
    """Cut a dimension into single indices, each of which must stay."""
    dims, _ = source(flow, op)
    axis = op.args.get("dim", 0) % len(dims)
    flow.freeze(op, dims[axis], f"unpacked one by one by {op.where()}")
    return [[labels for i, labels in enumerate(dims) if i != axis] for _ in op.results()]


@rule("unfold")
def windows(flow: Propagation, op: Op) -> list[Dims]:
    """Make windows along one dimension, which must stay; their length comes last."""
    dims = list(source(flow, op)[0])
    axis = op.args["dimension"] % max(len(dims), 1)
    flow.freeze(op, dims[axis], f"cut into windows by {op.where()}")
    return [[*dims[:axis], None, *dims[axis + 1 :], None]]


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


@rule("constant_pad_nd", *[f"{kind}_pad{rank}d" for kind in ("reflection", "replication") for rank in (1, 2, 3)])
def pad(flow: Propagation, op: Op) -> list[Dims]:
    """Pad from the last dimension backwards; the code fixes the number of padded channels, so they stay."""
    out = list(source(flow, op)[0])
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
