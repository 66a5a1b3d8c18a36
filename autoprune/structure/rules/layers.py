"""Whole layers: convolution, normalisation, pooling, resampling."""

from __future__ import annotations

from typing import Any

import numpy as np

from autoprune.structure.labels import INNER, OUTER, Dims, Labels, Propagation
from autoprune.structure.rules.arithmetic import add_bias, contract, fixed
from autoprune.structure.rules.products import argument, dims_of
from autoprune.structure.rules.registry import Narrowed, Product, known, rule
from autoprune.structure.tracing.record import Op, Record, Ref


def _convolution_macs(record: Record, op: Op) -> list[Product]:
    walked = argument(op, "input") if op.args["transposed"] else op.results()[0]
    return [(1, [(walked, 0), *dims_of(record, walked, 2), *dims_of(record, argument(op, "weight"))])]


def _time_first_macs(record: Record, op: Op) -> list[Product]:
    return [(1, [*dims_of(record, op.results()[0], 0, 2), *dims_of(record, argument(op, "weight"))])]


def _kept_groups(op: Op, narrowed: Narrowed) -> dict[str, Any]:
    return {"groups": kept_groups(op, narrowed.flow, narrowed.shape(argument(op, "input"))[1])}


def kept_groups(op: Op, flow: Propagation, channels: int) -> int:
    """Number of groups of a grouped convolution or group norm whose input keeps `channels` channels."""
    name = "groups" if "groups" in op.args else "group"
    value = flow.record.values[op.args["input"].id]
    per_group = value.shape[1] // op.args[name]
    inner = flow.sites.get(op.index) == INNER or op.args[name] == 1
    return int(op.args[name]) if inner else channels // per_group


known("conv_tbc", macs=_time_first_macs, weights=("weight",))


@rule("convolution", macs=_convolution_macs, resize=_kept_groups, weights=("weight",))
@rule("_convolution", "convolution_overrideable", macs=_convolution_macs, weights=("weight",))
def convolution(flow: Propagation, op: Op) -> list[Dims]:
    """Join input channels with the weight's, output channels pass.

    A grouped convolution is a site: ``OUTER`` removes whole groups, input and output channels together;
    ``INNER`` removes the i-th channel of every group. The default has the more units.
    """
    data, weight = flow.of(op.args["input"].id), flow.of(op.args["weight"].id)
    space: Dims = [None] * (len(data) - 2)
    for axis, labels in enumerate(data[2:]):
        if _pointwise(flow, op, axis):
            space[axis] = labels
        else:
            flow.freeze(op, labels, f"used as space by {op.where()}")
    for labels in weight[2:]:
        flow.freeze(op, labels, "kernel size")
    groups, transposed = op.args["groups"], op.args["transposed"]
    if groups == 1:
        contract(flow, op, data[1], weight[0] if transposed else weight[1])
        channels = weight[1] if transposed else weight[0]
    else:
        channels = _grouped(flow, op, data[1], weight, groups, transposed)
    out: Dims = [data[0], channels, *space]
    if isinstance(op.args.get("bias"), Ref):
        add_bias(flow, op, op.args["bias"], out[:2])
    return [out]


def _pointwise(flow: Propagation, op: Op, axis: int) -> bool:
    """Return whether each position along an axis of space is read separately, as by a kernel of one."""

    def at(name: str) -> int:
        given: list[int] = op.args[name]
        return given[axis % len(given)]

    kernel = flow.record.values[op.args["weight"].id].shape[2 + axis]
    return kernel == at("stride") == 1 and at("padding") == 0 and at("output_padding") == 0


def _grouped(flow: Propagation, op: Op, data: Labels, weight: Dims, groups: int, transposed: bool) -> Labels:
    inputs, outputs = (_width(flow, op, side) for side in ("input", "output"))
    source = np.arange(inputs).reshape(groups, -1)
    target = np.arange(outputs).reshape(groups, -1)
    if data is None or weight[0] is None:
        flow.freeze(op, data, f"tied to a fixed weight by {op.where()}")
        for labels in weight[:2]:
            flow.freeze(op, labels, f"reads the model's input or another fixed dimension in {op.where()}")
        return None
    default = OUTER if groups >= source.shape[1] else INNER
    choice = default if source.shape[1] == 1 else flow.choose(op, default)
    rows, columns = weight[0], weight[1]
    if choice == OUTER:
        flow.freeze(op, columns, f"inside the groups of {op.where()}")
        kept = flow.tie(op, data[source])
        if transposed:
            contract(flow, op, data, rows)
            return np.repeat(kept, target.shape[1])
        return flow.join(op, rows, np.repeat(kept, target.shape[1]))
    kept = flow.tie(op, data[source].T)
    if transposed:
        contract(flow, op, data, rows)
        return None if columns is None else np.tile(columns, groups)
    contract(flow, op, kept, columns)
    flow.tie(op, rows[target].T)
    return rows


def _width(flow: Propagation, op: Op, side: str) -> int:
    value = op.args["input"].id if side == "input" else op.results()[0]
    return flow.record.values[value].shape[1]


@rule("native_batch_norm", statistics=True)
@rule("_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm", "miopen_batch_norm")
def batch_norm(flow: Propagation, op: Op) -> list[Dims]:
    """Join the affine parameters and the running statistics with the channels."""
    out = list(flow.of(op.args["input"].id))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(op.args.get(name), Ref):
            out[1] = flow.join(op, out[1], flow.of(op.args[name].id)[0])
    return [out, *fixed(flow, op.results()[1:])]


def _normalized_shape(op: Op, narrowed: Narrowed) -> dict[str, Any]:
    rank = len(op.args["normalized_shape"])
    return {"normalized_shape": list(narrowed.shape(argument(op, "input"))[-rank:])}


@rule("native_layer_norm", resize=_normalized_shape, statistics=True)
@rule("layer_norm", "_fused_rms_norm", "rms_norm", statistics=True)
def layer_norm(flow: Propagation, op: Op) -> list[Dims]:
    """Join the affine parameters with the trailing dimensions, whose statistics are over kept units."""
    out = list(flow.of(op.args["input"].id))
    for name in ("weight", "bias"):
        if isinstance(op.args.get(name), Ref):
            add_bias(flow, op, op.args[name], out)
    return [out, *fixed(flow, op.results()[1:])]


def _group_norm(op: Op, narrowed: Narrowed) -> dict[str, Any]:
    shape = narrowed.shape(argument(op, "input"))
    return {"N": shape[0], "C": shape[1], "group": kept_groups(op, narrowed.flow, shape[1])}


@rule("native_group_norm", resize=_group_norm, statistics=True)
@rule("group_norm", statistics=True)
def group_norm(flow: Propagation, op: Op) -> list[Dims]:
    """Treat a group norm as a site like a grouped convolution: whole groups (``OUTER``) or one channel of each."""
    out = list(flow.of(op.args["input"].id))
    channels = out[1]
    if channels is not None:
        grid = channels.reshape(op.args.get("group", op.args.get("num_groups")), -1)
        if len(grid) > 1 and grid.shape[1] > 1:
            choice = flow.choose(op, OUTER if len(grid) >= grid.shape[1] else INNER)
            flow.tie(op, grid if choice == OUTER else grid.T)
    for name in ("weight", "bias"):
        if isinstance(op.args.get(name), Ref):
            out[1] = flow.join(op, out[1], flow.of(op.args[name].id)[0])
    return [out, *fixed(flow, op.results()[1:])]


@rule(
    *[f"{kind}_pool{rank}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for rank in (1, 2, 3)],
    *[f"max_pool{rank}d_with_indices" for rank in (2, 3)],
    *[f"_adaptive_avg_pool{rank}d" for rank in (2, 3)],
    *[f"{kind}{rank}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for rank in (1, 2, 3)],
    *["upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d"],
    *["upsample_trilinear3d", "_upsample_bicubic2d_aa"],
)
def spatial(flow: Propagation, op: Op) -> list[Dims]:
    """Fix the space of pooling and resampling, which change nothing else."""
    source = op.args["self"] if "self" in op.args else op.args["input"]
    dims = flow.of(source.id)
    rank = next(int(character) for character in op.name if character.isdigit())
    for labels in dims[len(dims) - rank :]:
        flow.freeze(op, labels, f"used as space by {op.where()}")
    return [[*dims[: len(dims) - rank], *[None] * rank] for _ in op.results()]


@rule(*[f"max_unpool{rank}d" for rank in (2, 3)], *[f"fractional_max_pool{rank}d" for rank in (2, 3)])
def pooled_places(flow: Propagation, op: Op) -> list[Dims]:
    """Join the channels of pooling with positions of maxima, or random ones, for each channel; space is fixed."""
    rank = int(op.name[-2])
    dims = flow.of(op.args["self"].id)
    lead = list(dims[: len(dims) - rank])
    further = flow.of(op.args["indices" if "indices" in op.args else "random_samples"].id)
    if "indices" in op.args:
        lead = [flow.join(op, a, b) for a, b in zip(lead, further[: len(lead)], strict=True)]
        space = [*dims[-rank:], *further[-rank:]]
    else:
        lead = [flow.join(op, a, b) for a, b in zip(lead, further[2 - len(lead) : 2], strict=True)]
        space = [*dims[-rank:]]
    for labels in space:
        flow.freeze(op, labels, f"used as space by {op.where()}")
    return [[*lead, *[None] * rank] for _ in op.results()]


@rule("grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(flow: Propagation, op: Op) -> list[Dims]:
    """Read a map (n, c, ...) at places (n, ..., 2 or 3), the same for all channels."""
    dims, places = flow.of(op.args["input"].id), flow.of(op.args["grid"].id)
    for labels in (*dims[2:], *places[1:]):
        flow.freeze(op, labels, f"used as space by {op.where()}")
    return [[flow.join(op, dims[0], places[0]), dims[1], *[None] * (len(dims) - 2)]]


@rule("im2col")
def patches(flow: Propagation, op: Op) -> list[Dims]:
    """Unfold patches of a map to columns: each channel gives as many rows as a patch has places."""
    dims = flow.of(op.args["self"].id)
    for labels in dims[-2:]:
        flow.freeze(op, labels, f"used as space by {op.where()}")
    channels = dims[-3]
    rows = None if channels is None else np.repeat(channels, np.prod(op.args["kernel_size"]))
    return [[*dims[:-3], rows, None]]


@rule("col2im")
def from_patches(flow: Propagation, op: Op) -> list[Dims]:
    """Fold columns back into a map: the rows of one channel are tied."""
    dims = flow.of(op.args["self"].id)
    flow.freeze(op, dims[-1], f"used as space by {op.where()}")
    rows = dims[-2]
    channels = None if rows is None else flow.tie(op, rows.reshape(-1, np.prod(op.args["kernel_size"])))
    return [[*dims[:-2], channels, None, None]]


@rule("_fft_c2c", "_fft_r2c", "_fft_c2r")
def fourier(flow: Propagation, op: Op) -> list[Dims]:
    """Transform some dimensions, which must stay; the others pass."""
    out = list(flow.of(op.args["self"].id))
    for axis in op.args["dim"]:
        flow.freeze(op, out[axis], f"transformed by {op.where()}")
        out[axis] = None
    return [out]


@rule("_weight_norm_interface", "_weight_norm", statistics=True)
def weight_norm(flow: Propagation, op: Op) -> list[Dims]:
    """Scale each slice of a weight to a length of its own; the norm is over kept inputs."""
    out = list(flow.of(op.args["v"].id))
    add_bias(flow, op, op.args["g"], out)
    axis = op.args["dim"] % len(out)
    norms: Dims = [labels if i == axis else None for i, labels in enumerate(out)]
    return [out, norms][: len(op.results())]
