"""Multiply-accumulates of operations: formulas by name, and the operations without one.

Operations that sum products count: convolutions, matrix products of all forms, bilinear layers, distances, weighted
bags and attention. Elementwise products, norms, pooling, resampling and fast Fourier transforms do not, as in PyTorch's
own counter. A product of complex numbers counts as one, and a sparse matrix by the entries that it stores.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from autoprune.structure.record import Op, Record, Ref

Product = tuple[float, list[tuple[int, int]]]
"""Product of a constant and sizes of dimensions, each given as (value, dimension)."""

Formula = Callable[[Record, Op], list[Product]]

FORMULAS: dict[str, Formula] = {}

FREE = frozenset(
    (
        *("grid_sampler_2d", "grid_sampler_3d", "_grid_sampler_2d_cpu_fallback", "max_unpool2d", "max_unpool3d"),
        *("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"),
        *("normal", "linalg_cross", "polar", "complex", "renorm", "segment_reduce", "rrelu_with_noise"),
        *("masked_scatter", "masked_scatter_", "take", "put", "put_"),
        *("mse_loss", "huber_loss", "smooth_l1_loss", "soft_margin_loss", "multi_margin_loss", "_ctc_loss"),
        *("binary_cross_entropy", "binary_cross_entropy_with_logits", "nll_loss_forward", "nll_loss2d_forward"),
        *("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "_native_batch_norm_legit", "native_batch_norm"),
        *("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "_fused_moving_avg_obs_fq_helper"),
    )
)
"""Operations on several tensors that sum no products, in addition to those that have a rule or are elementwise."""


def formula(*names: str) -> Callable[[Formula], Formula]:
    """Register a formula for operations by name, without namespace and overload, for example ``"bmm"``."""

    def register(function: Formula) -> Formula:
        for name in names:
            FORMULAS[name] = function
        return function

    return register


def products_of(record: Record, op: Op) -> list[Product]:
    """Multiply-accumulates of an operation, for the whole traced batch; empty if it has no formula."""
    counted = FORMULAS.get(op.name)
    return [] if counted is None else counted(record, op)


def dense_macs(record: Record, op: Op) -> float:
    """Multiply-accumulates of an operation at the sizes that were traced."""
    products = products_of(record, op)
    return sum(each * prod(record.values[value].shape[dim] for value, dim in dims) for each, dims in products)


def _dims(record: Record, value: int, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
    return [(value, dim) for dim in range(len(record.values[value].shape))[start:stop]]


def _id(op: Op, name: str) -> int:
    return int(op.args[name].id)


@formula("convolution", "_convolution", "convolution_overrideable")
def _convolution(record: Record, op: Op) -> list[Product]:
    weight, walked = _id(op, "weight"), _id(op, "input") if op.args["transposed"] else op.results()[0]
    return [(1, [(walked, 0), *_dims(record, walked, 2), *_dims(record, weight)])]


@formula("conv_tbc")
def _conv_tbc(record: Record, op: Op) -> list[Product]:
    return [(1, [*_dims(record, op.results()[0], 0, 2), *_dims(record, _id(op, "weight"))])]


MATRICES = {
    "mm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "addbmm": ("batch1", "batch2"),
    "_sparse_addmm": ("mat1", "mat2"),
    "_addmm_activation": ("mat1", "mat2"),
    "_scaled_mm": ("self", "mat2"),
    "_int_mm": ("self", "mat2"),
}
"""Names of the two factors of each matrix product."""


@formula(*MATRICES)
def _matrices(record: Record, op: Op) -> list[Product]:
    a, b = (_id(op, name) for name in MATRICES[op.name])
    columns = (b, len(record.values[b].shape) - 1)
    if record.values[a].stored is not None:
        return [(float(record.values[a].stored or 0), [columns])]
    if record.values[b].stored is not None:
        return [(float(record.values[b].stored or 0), [(a, 0)])]
    return [(1, [*_dims(record, a), columns])]


@formula("linear", "_linear")
def _linear(record: Record, op: Op) -> list[Product]:
    return [(1, [*_dims(record, _id(op, "input")), (_id(op, "weight"), 0)])]


@formula("mv", "addmv", "dot", "vdot")
def _vectors(record: Record, op: Op) -> list[Product]:
    matrix = _id(op, "mat" if op.name == "addmv" else "self")
    stored = record.values[matrix].stored
    return [(1, _dims(record, matrix))] if stored is None else [(float(stored), [])]


@formula("addr")
def _outer(record: Record, op: Op) -> list[Product]:
    return [(1, [(_id(op, "vec1"), 0), (_id(op, "vec2"), 0)])]


@formula("_grouped_mm", "_scaled_grouped_mm")
def _grouped(record: Record, op: Op) -> list[Product]:
    """Count products of each row with one matrix of a stack, or of each matrix of a stack with its columns or rows."""
    a, b = _id(op, "self"), _id(op, "mat2")
    rank, other = len(record.values[a].shape), len(record.values[b].shape)
    return [(1, [*_dims(record, a, 1 if rank > other else 0), (b, other - 1)])]


@formula("_trilinear")
def _trilinear(record: Record, op: Op) -> list[Product]:
    """Count a sum of products of three tensors, each broadcast along its missing dimensions: a bilinear layer."""
    dims: dict[int, tuple[int, int]] = {}
    for name, broadcast in (("i1", "expand1"), ("i2", "expand2"), ("i3", "expand3")):
        value, expanded = _id(op, name), op.args[broadcast]
        rank = len(record.values[value].shape) + len(expanded)
        own = [axis for axis in range(rank) if axis not in expanded]
        for dim, axis in enumerate(own):
            dims.setdefault(axis, (value, dim))
    return [(1, list(dims.values()))]


@formula("_cdist_forward", "_euclidean_dist")
def _distances(record: Record, op: Op) -> list[Product]:
    a, b = _id(op, "x1"), _id(op, "x2")
    return [(1, [*_dims(record, a), (b, len(record.values[b].shape) - 2)])]


@formula("_pdist_forward")
def _own_distances(record: Record, op: Op) -> list[Product]:
    return [(1, [(op.results()[0], 0), (_id(op, "self"), 1)])]


@formula("_embedding_bag", "_embedding_bag_forward_only", "embedding_bag")
def _weighted_bags(record: Record, op: Op) -> list[Product]:
    """Count a bag, which multiplies only if each entry has a separate weight."""
    if not isinstance(op.args.get("per_sample_weights"), Ref):
        return []
    return [(1, [*_dims(record, _id(op, "indices")), (_id(op, "weight"), 1)])]


@formula(
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
    *("_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math"),
    *("_scaled_dot_product_attention_math_for_mps", "scaled_dot_product_attention"),
)
def _attention(record: Record, op: Op) -> list[Product]:
    """Count scores and their sum over values, with masked entries: (batch, heads, positions, channels)."""
    query, key, value = (_id(op, name) for name in ("query", "key", "value"))
    rank = len(record.values[query].shape)
    scores = [*_dims(record, query, 0, -1), (key, rank - 2)]
    return [(1, [*scores, (query, rank - 1)]), (1, [*scores, (value, rank - 1)])]


@formula("_flash_attention_forward", "_efficient_attention_forward")
def _attention_by_position(record: Record, op: Op) -> list[Product]:
    """Count attention of (batch, positions, heads, channels)."""
    query, key, value = (_id(op, name) for name in ("query", "key", "value"))
    if len(record.values[query].shape) != 4:
        return []
    scores = [*_dims(record, query, 0, 3), (key, 1)]
    return [(1, [*scores, (query, 3)]), (1, [*scores, (value, 3)])]


def uncounted(record: Record) -> tuple[str, ...]:
    """List operations that may multiply a parameter with data and have no formula, with their modules, once each.

    These are operations on several tensors of floats, one of which depends on parameters and one on the inputs.
    """
    learned = {i for i, value in enumerate(record.values) if value.kind == "parameter"}
    given = set(record.inputs)
    found: dict[str, None] = {}
    for op in record.ops[: record.first]:
        read = set(op.inputs())
        if learned & read and given & read and not _is_free(record, op):
            found.setdefault(f"{op.func.namespace}::{op.where()}")
        for reached in (learned, given):
            if reached & read:
                reached.update(op.results(), _written(op))
    return tuple(found)


def _written(op: Op) -> list[int]:
    arguments = [a.name for a in op.func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [op.args[name].id for name in arguments if isinstance(op.args.get(name), Ref)]


def _is_free(record: Record, op: Op) -> bool:
    """Return whether an operation has a formula, or sums no products."""
    from autoprune.structure.rules import rule_of

    def floats(values: list[int]) -> list[int]:
        dtypes = ((i, record.values[i].dtype) for i in values if record.values[i].shape)
        return [i for i, dtype in dtypes if dtype.is_floating_point or dtype.is_complex]

    if op.name in FORMULAS or op.name in FREE or torch.Tag.pointwise in op.func.tags:
        return True
    if op.func.namespace == "aten" and (rule_of(op) is not None or op.name.startswith("_foreach")):
        return True
    return len(set(floats(op.inputs()))) < 2 or not floats(op.results())
