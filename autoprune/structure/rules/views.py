"""Views: the same elements under another shape, repeated, or in another order of dimensions."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from autoprune.protocols import IntArray
from autoprune.structure.checks.strides import contiguous_strides, strided_steps
from autoprune.structure.labels import OUTER, Dims, Labels, Propagation
from autoprune.structure.rules.arithmetic import size_of_result
from autoprune.structure.rules.registry import Narrowed, rule
from autoprune.structure.tracing.record import Op


def source(flow: Propagation, op: Op) -> tuple[Dims, tuple[int, ...]]:
    """Labels and shape of the tensor that an operation rearranges."""
    value = op.args["self"].id
    return flow.of(value), flow.record.values[value].shape


def result_shape(flow: Propagation, op: Op) -> tuple[int, ...]:
    """Shape of the first result."""
    return flow.record.values[op.results()[0]].shape


@rule("view", "_unsafe_view", "reshape", resize=size_of_result, passes=True, rearranges=True)
@rule("_reshape_alias", resize=size_of_result, rearranges=True)
@rule("view_copy", resize=size_of_result)
def view(flow: Propagation, op: Op) -> list[Dims]:
    """Match runs of old and new dimensions with equal products; inside a run merge, then split."""
    dims, old = source(flow, op)
    new = result_shape(flow, op)
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
    runs = []
    i = 0
    k = 0
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


@rule("permute", passes=True, rearranges=True)
def permute(flow: Propagation, op: Op) -> list[Dims]:
    """Reorder dimensions."""
    dims, _ = source(flow, op)
    return [[dims[axis] for axis in op.args["dims"]]]


@rule("transpose", passes=True, rearranges=True)
@rule("t", rearranges=True)
@rule("transpose_", "t_", "numpy_T")
def transpose(flow: Propagation, op: Op) -> list[Dims]:
    """Swap two dimensions."""
    dims = list(source(flow, op)[0])
    if len(dims) > 1:
        a, b = op.args.get("dim0", 0), op.args.get("dim1", 1)
        dims[a], dims[b] = dims[b], dims[a]
    return [dims]


@rule("unsqueeze", passes=True, rearranges=True)
@rule("unsqueeze_")
def unsqueeze(flow: Propagation, op: Op) -> list[Dims]:
    """Insert a dimension of size 1."""
    dims = list(source(flow, op)[0])
    dims.insert(op.args["dim"] % (len(dims) + 1), None)
    return [dims]


@rule("squeeze", passes=True, rearranges=True)
@rule("squeeze_")
def squeeze(flow: Propagation, op: Op) -> list[Dims]:
    """Drop dimensions of size 1."""
    dims, shape = source(flow, op)
    axes = op.args.get("dim", range(len(shape)))
    listed = [axes] if isinstance(axes, int) else axes
    axes = {axis % len(shape) for axis in listed} if shape else set()
    return [[labels for axis, labels in enumerate(dims) if not (axis in axes and shape[axis] == 1)]]


@rule("expand", resize=size_of_result, passes=True, rearranges=True)
@rule("expand_copy", resize=size_of_result)
def expand(flow: Propagation, op: Op) -> list[Dims]:
    """Repeat dimensions of size 1; the repeated ones follow whatever they meet."""
    dims, shape = source(flow, op)
    new = result_shape(flow, op)
    out: Dims = []
    for back in range(len(new), 0, -1):
        same = back <= len(shape) and shape[-back] == new[-back]
        out.append(dims[-back] if same else flow.fresh(new[-back]))
    return [out]


def _repeats(op: Op, narrowed: Narrowed) -> dict[str, Any]:
    new = narrowed.shape(op.results()[0])
    old = narrowed.shape(op.args["self"].id)
    lead = (1,) * (len(new) - len(old))
    return {"repeats": [wide // narrow for wide, narrow in zip(new, (*lead, *old), strict=True)]}


@rule("repeat", resize=_repeats)
def repeat(flow: Propagation, op: Op) -> list[Dims]:
    """Tile each dimension."""
    dims, shape = source(flow, op)
    times = op.args["repeats"]
    lead = len(times) - len(shape)
    out: Dims = []
    for axis, count in enumerate(times):
        size = shape[axis - lead] if axis >= lead else 1
        labels = dims[axis - lead] if axis >= lead else None
        tiled = None if labels is None else np.tile(labels, count)
        out.append(flow.fresh(count) if size == 1 else tiled)
    return [out]


@rule("repeat_interleave")
def repeat_interleave(flow: Propagation, op: Op) -> list[Dims]:
    """Repeat each index in place; only a constant number of times."""
    dims, _ = source(flow, op)
    axis = op.args.get("dim")
    times = op.args["repeats"]
    if not isinstance(times, int) or axis is None:
        for labels in dims:
            flow.freeze(op, labels, f"repeated a varying number of times by {op.where()}")
        return [[None] * len(result_shape(flow, op))]
    out = list(dims)
    labels = out[axis]
    out[axis] = None if labels is None else np.repeat(labels, times)
    return [out]


@rule("view_as_complex", "view_as_real")
def complex_view(flow: Propagation, op: Op) -> list[Dims]:
    """Take pairs of real numbers for complex ones, or the other way round; the pair is fixed."""
    dims = list(source(flow, op)[0])
    if op.name == "view_as_real":
        return [[*dims, None]]
    flow.freeze(op, dims[-1], f"real and imaginary part in {op.where()}")
    return [dims[:-1]]


def _strides(op: Op, narrowed: Narrowed) -> dict[str, Any]:
    """Compute strides that follow the sizes: each is a number of steps along one dimension of the source."""
    source = op.args["self"].id
    shape = narrowed.shape(op.results()[0])
    if not narrowed.shrinks(source):
        return {}
    steps = strided_steps(narrowed.record, op)
    if steps is None:
        return {"size": list(shape), "stride": list(contiguous_strides(shape))}
    strides = contiguous_strides(narrowed.shape(source))
    return {"size": list(shape), "stride": [1 if dim is None else count * strides[dim] for dim, count in steps]}


@rule("as_strided", resize=_strides, rearranges=True)
@rule("as_strided_", resize=_strides)
def as_strided(flow: Propagation, op: Op) -> list[Dims]:
    """Change strides: a dimension with a step of one passes, one with sliding windows must stay."""
    dims, shape = source(flow, op)
    new = result_shape(flow, op)
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
