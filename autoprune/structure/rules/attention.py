"""Attention: its heads are units; the head dimension stays, because the scale depends on it."""

from __future__ import annotations

import numpy as np

from autoprune.structure.labels import Dims, Labels, Propagation
from autoprune.structure.rules.arithmetic import fixed
from autoprune.structure.rules.products import argument, dims_of
from autoprune.structure.rules.registry import Product, known, rule
from autoprune.structure.tracing.record import Op, Record, Ref


def _scores_and_values(record: Record, op: Op) -> list[Product]:
    """Count scores and their sum over values, with masked entries: (batch, heads, positions, channels)."""
    query, key, value = (argument(op, name) for name in ("query", "key", "value"))
    rank = len(record.values[query].shape)
    scores = [*dims_of(record, query, 0, -1), (key, rank - 2)]
    return [(1, [*scores, (query, rank - 1)]), (1, [*scores, (value, rank - 1)])]


def _by_position(record: Record, op: Op) -> list[Product]:
    """Count attention of (batch, positions, heads, channels)."""
    query, key, value = (argument(op, name) for name in ("query", "key", "value"))
    if len(record.values[query].shape) != 4:
        return []
    scores = [*dims_of(record, query, 0, 3), (key, 1)]
    return [(1, [*scores, (query, 3)]), (1, [*scores, (value, 3)])]


known("_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps", macs=_scores_and_values)
known("_flash_attention_forward", "_efficient_attention_forward", macs=_by_position)


@rule("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", macs=_scores_and_values)
@rule("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention", macs=_scores_and_values)
@rule("_scaled_dot_product_fused_attention_overrideable", "scaled_dot_product_attention", macs=_scores_and_values)
def attention(flow: Propagation, op: Op) -> list[Dims]:
    """Join the heads of q, k, v and of a mask; the head dimension stays, because the scale depends on it."""
    query, key, value = (flow.of(op.args[name].id) for name in ("query", "key", "value"))
    heads = query[1]
    for shared in (key, value):
        heads = _share_heads(flow, op, heads, shared[1])
    mask = op.args.get("attn_mask") or op.args.get("attn_bias")
    if isinstance(mask, Ref) and len(scores := flow.of(mask.id)) > 3 and flow.record.values[mask.id].shape[1] != 1:
        heads = flow.join(op, heads, scores[1])  # a bias of each head, learned or made from sizes
    for labels in (query[-1], key[-1], value[-1]):
        flow.freeze(op, labels, f"head dimension of {op.where()}")
    for labels in (query[2], key[2], value[2]):
        flow.freeze(op, labels, f"positions attended over by {op.where()}")
    return [[None, heads, None, None], *fixed(flow, op.results()[1:])]


def _share_heads(flow: Propagation, op: Op, heads: Labels, shared: Labels) -> Labels:
    """Join query heads with the key or value heads that serve several of them each."""
    if heads is None or shared is None:
        return flow.join(op, heads, shared)
    return flow.join(op, heads, np.repeat(shared, len(heads) // len(shared)))
