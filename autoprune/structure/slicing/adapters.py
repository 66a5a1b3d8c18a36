"""Adapters that make modules follow the sizes of their weights: PyTorch's own layers, and classes of users."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autoprune.arguments import shown, why_no_function

Change = Callable[[Any], None]


@dataclass(frozen=True)
class Adapter:
    """Adapter of one class of modules.

    Attributes:
        resize: Called on a module after it or a part of it was sliced; sets attributes that mirror sizes.
        prepare: Called once on each copy that autoprune makes, before it runs; may set ``module.__class__`` to an
            equivalent whose sizes follow its weights.
    """

    resize: Change | None = None
    prepare: Change | None = None


ADAPTERS: dict[type[nn.Module], Adapter] = {}


def register_adapter(kind: type[nn.Module], *, resize: Change | None = None, prepare: Change | None = None) -> None:
    """Register a module class whose sizes autoprune cannot find itself.

    Args:
        kind: The class; also for subclasses, unless registered themselves.
        resize: Sets the attributes that mirror sizes, from the remaining weights.
        prepare: Called once on each private copy before it runs.

    Raises:
        TypeError: If `kind` is no class of modules, or the others are no functions of one.

    Example:
        >>> class Heads(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.q, self.heads, self.head_dim = nn.Linear(8, 8), 4, 2
        >>> def follow(module):
        ...     module.heads = module.q.weight.shape[0] // module.head_dim
        >>> register_adapter(Heads, resize=follow)
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"kind must be a class of modules, got {shown(kind)}")
    for name, change in (("resize", resize), ("prepare", prepare)):
        if change is not None and (why := why_no_function(change, 1)):
            raise TypeError(f"{name} must be a function {name}(module), or None, {why}")
    ADAPTERS[kind] = Adapter(resize, prepare)


def adapter_of(module: nn.Module) -> Adapter | None:
    """Find the adapter of the nearest class that has one."""
    return next((ADAPTERS[kind] for kind in type(module).__mro__ if kind in ADAPTERS), None)


def _convolution(module: _ConvNd) -> None:
    outputs, inputs = module.weight.shape[:2]
    module.out_channels = outputs
    module.in_channels = inputs * module.groups


def _transposed(module: _ConvTransposeNd) -> None:
    inputs, outputs = module.weight.shape[:2]
    module.in_channels = inputs
    module.out_channels = outputs * module.groups


def _linear(module: nn.Linear) -> None:
    module.out_features, module.in_features = module.weight.shape


def _embedding(module: nn.Embedding) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _norm(module: _NormBase) -> None:
    tensor = module.weight if module.weight is not None else module.running_mean
    if tensor is not None:
        module.num_features = tensor.shape[0]


def _layer_norm(module: nn.LayerNorm | nn.RMSNorm) -> None:
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def _group_norm(module: nn.GroupNorm) -> None:
    if module.weight is not None:
        module.num_channels = module.weight.shape[0]


def _prelu(module: nn.PReLU) -> None:
    module.num_parameters = module.weight.shape[0]


def refresh_flat_weights(module: nn.Module) -> None:
    """Rebuild the second list of weights of a recurrent layer, which a swapped parameter does not reach."""
    if isinstance(module, nn.RNNBase):
        object.__setattr__(module, "_flat_weights", [getattr(module, n, None) for n in module._flat_weights_names])


def _recurrent(module: nn.RNNBase) -> None:
    module.input_size = module.get_parameter("weight_ih_l0").shape[1]
    if module.proj_size == 0:
        module.hidden_size = module.get_parameter("weight_hh_l0").shape[1]
    refresh_flat_weights(module)


def _cell(module: nn.RNNCellBase) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


class SlicedAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` whose heads need not add up to the width of its inputs.

    The parent's forward compares sizes in Python; this one reads them off the weights.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as the parent does; shapes as there."""
        unbatched = query.ndim == 2
        if unbatched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._split(x) for x in self._project(query, key, value))
        mask = _join_masks(attn_mask, key_padding_mask, q)
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            attended = F.dropout(weights, self.dropout, self.training) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        if unbatched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights.squeeze(0) if unbatched else weights

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None:
            matrices = self.in_proj_weight.chunk(3)
        else:
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), matrices, biases, strict=True)]


def _join_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """Join masks to one additive mask that broadcasts to (batch, heads, queries, keys)."""
    parts = []
    if attn_mask is not None:
        parts.append(attn_mask if attn_mask.ndim == 2 else attn_mask.view(query.shape[0], -1, *attn_mask.shape[-2:]))
    if key_padding_mask is not None:
        parts.append(key_padding_mask.view(query.shape[0], 1, 1, -1))
    total = None
    for part in parts:
        added = part.to(query.dtype)
        if part.dtype == torch.bool:
            added = torch.zeros_like(part, dtype=query.dtype).masked_fill(part, float("-inf"))
        total = added if total is None else total + added
    return total


def _can_slice(module: nn.MultiheadAttention) -> bool:
    return module.bias_k is None and not module.add_zero_attn


def _prepare_attention(module: nn.MultiheadAttention) -> None:
    if _can_slice(module):
        module.__class__ = SlicedAttention
        module._qkv_same_embed_dim = False  # disables the fused path of TransformerEncoderLayer, which needs full sizes


def _resize_attention(module: nn.MultiheadAttention) -> None:
    """Keep the parent's class while its heads fill its width, so that a dense module is unchanged."""
    if not _can_slice(module):
        return
    packed = module.in_proj_weight is not None
    weight = module.in_proj_weight if packed else module.q_proj_weight
    rows = weight.shape[0] // 3 if packed else weight.shape[0]
    module.embed_dim = weight.shape[1]
    module.num_heads = rows // module.head_dim
    module.kdim = module.embed_dim if packed else module.k_proj_weight.shape[1]
    module.vdim = module.embed_dim if packed else module.v_proj_weight.shape[1]
    full = rows == module.embed_dim and module.out_proj.weight.shape[0] == rows
    module.__class__ = nn.MultiheadAttention if full else SlicedAttention
    module._qkv_same_embed_dim = full and packed


def _resize_encoder(module: nn.TransformerEncoder) -> None:
    """Disable nested tensors, which only the fused path takes, and that needs full sizes."""
    weights = [part.in_proj_weight for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
    if any(weight is not None and weight.shape[0] != 3 * weight.shape[1] for weight in weights):
        module.use_nested_tensor = False


ADAPTERS |= {
    _ConvNd: Adapter(_convolution),
    _ConvTransposeNd: Adapter(_transposed),
    nn.Linear: Adapter(_linear),
    nn.Embedding: Adapter(_embedding),
    nn.EmbeddingBag: Adapter(_embedding),
    _NormBase: Adapter(_norm),
    nn.LayerNorm: Adapter(_layer_norm),
    nn.RMSNorm: Adapter(_layer_norm),
    nn.GroupNorm: Adapter(_group_norm),
    nn.PReLU: Adapter(_prelu),
    nn.RNNBase: Adapter(_recurrent, refresh_flat_weights),
    nn.RNNCellBase: Adapter(_cell),
    nn.MultiheadAttention: Adapter(_resize_attention, _prepare_attention),
    nn.TransformerEncoder: Adapter(_resize_encoder),
}
