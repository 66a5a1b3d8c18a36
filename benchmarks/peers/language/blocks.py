"""The blocks of a Llama, run one at a time, and the parts of them that methods remove."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Call = dict[str, Any]  # keyword arguments that every block takes besides its input: rotary angles and mask


def layers_of(model: nn.Module) -> nn.ModuleList:
    found = model.get_submodule("model.layers")
    assert isinstance(found, nn.ModuleList)
    return found


def parameters(model: nn.Module) -> int:
    """Parameters other than those of the embedding and of the output layer, counted in the module itself."""
    parts = (layers_of(model), model.get_submodule("model.norm"))
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def embedded(model: nn.Module, ids: Tensor) -> tuple[Tensor, Call]:
    """The input of the first block, shape (n, tokens, width), and what all blocks are called with besides it."""
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"attention must be 'sdpa', where no mask is a causal one, got {model.config}")
    stem = model.get_submodule("model")
    x = stem.embed_tokens(ids)
    angles = stem.rotary_emb(x, position_ids=torch.arange(ids.shape[1])[None])
    return x, {"attention_mask": None, "position_embeddings": angles}


def attended(layer: nn.Module, x: Tensor, call: Call) -> Tensor:
    """The residual stream after the attention of a block."""
    return x + layer.self_attn(hidden_states=layer.input_layernorm(x), **call)[0]


def fed(layer: nn.Module, x: Tensor) -> Tensor:
    """The residual stream after the feed-forward part of a block."""
    out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return out


class Skipped(nn.Module):
    """A branch that is left out: adds nothing to the residual stream."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        nothing = hidden_states.new_zeros(())
        return (nothing, None) if self.attention else nothing


def drop_blocks(model: nn.Module, dropped: set[int]) -> nn.Module:
    """Leave out whole blocks, in place."""
    kept = [layer for i, layer in enumerate(layers_of(model)) if i not in dropped]
    model.get_submodule("model").layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    for i, layer in enumerate(kept):
        if hasattr(layer.self_attn, "layer_idx"):
            layer.self_attn.layer_idx = i  # the place of its keys in a cache
    return model


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer of these very weights, shape (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer


def keep_neurons(layer: nn.Module, kept: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
    """Keep these neurons of a feed-forward part, in place; none: leave it out.

    Args:
        layer: The block.
        kept: Their indices, int64, shape (k,).
        weight: Columns of the last layer for them, (width, k), if re-fitted.
        bias: Bias of the last layer, (width,), if it gets one.
    """
    if len(kept) == 0:
        layer.mlp = Skipped(attention=False)
        layer.post_attention_layernorm = nn.Identity()
        return
    mlp = layer.mlp
    last = mlp.down_proj.weight
    mlp.gate_proj = linear(mlp.gate_proj.weight[kept])
    mlp.up_proj = linear(mlp.up_proj.weight[kept])
    mlp.down_proj = linear(last[:, kept] if weight is None else weight.to(last.dtype), _like(bias, last))


def keep_groups(layer: nn.Module, kept: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
    """Keep these key-value groups, each with all its heads, in place; none: leave the attention out.

    Args are those of `keep_neurons`, but that `weight` has the columns of all heads of the groups kept.
    """
    if len(kept) == 0:
        layer.self_attn = Skipped(attention=True)
        layer.input_layernorm = nn.Identity()
        return
    attention = layer.self_attn
    last = attention.o_proj.weight
    queries = columns_of(kept, attention.head_dim * attention.num_key_value_groups)
    keys = columns_of(kept, attention.head_dim)
    attention.q_proj = linear(attention.q_proj.weight[queries])
    attention.k_proj = linear(attention.k_proj.weight[keys])
    attention.v_proj = linear(attention.v_proj.weight[keys])
    attention.o_proj = linear(last[:, queries] if weight is None else weight.to(last.dtype), _like(bias, last))


def columns_of(groups: Tensor, size: int) -> Tensor:
    """Indices of the members of groups of `size` consecutive ones, shape (len(groups) * size,)."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _like(bias: Tensor | None, other: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(other.dtype)


@torch.no_grad()
def mean_loss(model: nn.Module, ids: Tensor, batch: int = 4) -> float:
    """Mean cross-entropy of the next token, in nats, over all positions but the last of each sequence."""
    total = 0.0
    for part in ids.split(batch):
        logits = model(input_ids=part, use_cache=False).logits
        for each, words in zip(logits, part, strict=True):  # one at a time: float32 logits of all would be large
            total += float(F.cross_entropy(each[:-1].float(), words[1:], reduction="sum"))
    return total / (ids.numel() - len(ids))
