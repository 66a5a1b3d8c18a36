"""Build a plain, smaller module: sliced parameters and buffers, and attributes that mirror sizes rewritten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from autoprune.protocols import IntArray
from autoprune.structure.trace import skeleton

Slices = Mapping[str, Mapping[int, IntArray]]
"""Indices that stay, ascending, of each tensor (by qualified name) along each dimension that shrinks."""


@dataclass(frozen=True)
class Edit:
    """Everything that turns a dense model into a pruned one; small, and JSON-ready with lists for arrays.

    Attributes:
        slices: What stays of each tensor that shrinks.
        groups: Number of groups of each grouped convolution or group norm that may lose whole groups, by module.
    """

    slices: Slices
    groups: Mapping[str, int]


class Slicer:
    """Applies edits to one model's skeleton again and again, sharing whatever does not shrink.

    Args:
        model: The dense model; it stays as it is, and its parameters are shared by what `cut` returns.
    """

    def __init__(self, model: nn.Module) -> None:
        self.skeleton = skeleton(model)
        self._owners = list(owners(self.skeleton))
        self._modules = dict(self.skeleton.named_modules())
        self._resized: set[str] = set()

    def cut(self, edit: Edit) -> nn.Module:
        """Return the skeleton as edited: valid until the next call. Buffers are always private copies."""
        made: dict[int, Tensor] = {}
        for name, holder, key, tensor in self._owners:
            if id(tensor) not in made:
                made[id(tensor)] = _sliced(tensor, edit.slices.get(name, {}))
            holder[key] = made[id(tensor)]
        for name, count in edit.groups.items():
            set_groups(self._modules[name], count)
        resized = {name.rpartition(".")[0] for name in edit.slices}
        for name in self._resized | resized:  # what the last edit resized may be dense again
            mirror_sizes(self._modules[name])
        self._resized = resized
        return self.skeleton


def build(model: nn.Module, edit: Edit) -> nn.Module:
    """Build a plain module that shares no state with `model`.

    Args:
        model: The dense model; stays as it is.
        edit: What to keep. An empty edit gives a copy.

    Returns:
        A module of the same class, in the same training mode, on the same device.
    """
    slicer = Slicer(model)
    module = slicer.cut(edit)
    shared = {id(p) for p in model.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for _, holder, key, _ in slicer._owners:
        tensor = holder[key]
        if id(tensor) in shared and isinstance(tensor, nn.Parameter):
            if id(tensor) not in copies:
                copies[id(tensor)] = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            holder[key] = copies[id(tensor)]
    return module


def owners(model: nn.Module) -> Iterable[tuple[str, dict[str, Any], str, Tensor]]:
    """Where each parameter and buffer hangs: (first qualified name, dictionary, key, tensor)."""
    first: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            for key, tensor in holder.items():
                if tensor is not None:
                    name = first.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                    yield name, holder, key, tensor


def _sliced(tensor: Tensor, kept: Mapping[int, IntArray]) -> Tensor:
    if not kept and isinstance(tensor, nn.Parameter):
        return tensor
    data = tensor.detach()
    for dim, index in kept.items():
        data = data.index_select(dim, torch.from_numpy(index).to(data.device))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data if kept else data.clone()


def mirror_sizes(module: nn.Module) -> None:
    """Make the size attributes of PyTorch's own layers follow their weights."""
    weight = module._parameters.get("weight")
    if isinstance(module, _ConvTransposeNd) and weight is not None:
        module.in_channels, module.out_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, _ConvNd) and weight is not None:
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear) and weight is not None:
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding) and weight is not None:
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, _NormBase):
        tensor = weight if weight is not None else module.running_mean
        if tensor is not None:
            module.num_features = tensor.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.PReLU) and weight is not None:
        module.num_parameters = weight.shape[0]


def set_groups(module: nn.Module, count: int) -> None:
    """Set the number of groups of a convolution or group norm; other modules compute theirs."""
    if isinstance(module, _ConvNd):
        module.groups = count
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = count
