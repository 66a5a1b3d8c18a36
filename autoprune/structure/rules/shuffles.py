"""Other orders of the indices of a dimension: interleaving, turning, pixel shuffles, packed sequences."""

from __future__ import annotations

import numpy as np

from autoprune.structure.labels import Dims, Propagation
from autoprune.structure.rules.registry import rule
from autoprune.structure.rules.views import source
from autoprune.structure.tracing.record import Op


@rule("glu")
def glu(flow: Propagation, op: Op) -> list[Dims]:
    """Gate one half of a dimension by the other: the i-th units of both are tied."""
    out = list(source(flow, op)[0])
    axis = op.args["dim"] % len(out)
    labels = out[axis]
    if labels is not None:
        out[axis] = flow.tie(op, labels.reshape(2, -1).T)
    return [out]


@rule("pixel_shuffle")
def pixel_shuffle(flow: Propagation, op: Op) -> list[Dims]:
    """Turn each run of r * r channels into space: the channels of a run are tied."""
    out = list(source(flow, op)[0])
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
    out = list(source(flow, op)[0])
    labels = out[-3]
    out[-3] = None if labels is None else np.repeat(labels, op.args["downscale_factor"] ** 2)
    return [out]


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(flow: Propagation, op: Op) -> list[Dims]:
    """Interleave the channels of the parts; the i-th channels of all parts are tied."""
    out = list(source(flow, op)[0])
    labels = out[1]
    if labels is not None:
        grid = labels.reshape(op.args["groups"], -1).T
        flow.tie(op, grid)
        out[1] = np.ascontiguousarray(grid).reshape(-1)
    return [out]


@rule("flip")
@rule("roll", passes=True)
def reorder(flow: Propagation, op: Op) -> list[Dims]:
    """Reverse or rotate dimensions; a rotated labelled dimension must stay whole."""
    out = list(source(flow, op)[0])
    for axis in op.args["dims"]:
        labels = out[axis]
        if op.name == "flip" and labels is not None:
            out[axis] = np.ascontiguousarray(labels[::-1])
        elif labels is not None:
            flow.freeze(op, labels, f"rotated by {op.where()}")
    return [out]


@rule("rot90")
def rotate(flow: Propagation, op: Op) -> list[Dims]:
    """Turn the plane of two dimensions, which must stay."""
    dims = list(source(flow, op)[0])
    for axis in op.args.get("dims", (0, 1)):
        flow.freeze(op, dims[axis], f"turned by {op.where()}")
        dims[axis] = None
    return [dims]


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
