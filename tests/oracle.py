"""Independent answers to test against: what a pruned model must output, and what it costs.

Nothing here uses autoprune. The outputs of a pruned model are those of the dense model in which every removed slice of
every parameter is zero: a producer then emits zeros, and a consumer ignores whatever arrives in their place. Only
normalisation over channels also needs its statistics taken over the channels that stay.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

Removed = Mapping[str, Mapping[int, Tensor]]


@torch.no_grad()
def masked_forward(model: nn.Module, removed: Removed, args: tuple[Any, ...]) -> Any:
    """Run the dense model as if the removed units did not exist; the model stays as it was.

    Covers modules called several times, tied weights and parameters used by functions, because it masks tensors, not
    the outputs of modules. Wrong where channels vanish in front of a LayerNorm or GroupNorm without parameters or of
    a norm written out by hand, and where a removed unit reaches an output of the model.

    Args:
        model: The dense model.
        removed: For the name of each sliced parameter or buffer, under any of its aliases, the indices removed along
            each sliced dimension, int64. Buffers only have to exist: they act through parameters.
        args: Positional arguments of the model.

    Returns:
        What the model returns.

    Raises:
        KeyError: If `removed` names neither a parameter nor a buffer.
        IndexError: If an index or a dimension lies outside its tensor.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    kept: dict[int, Tensor] = {}
    for name, dims in removed.items():
        if name in buffers:
            continue
        if name not in parameters:
            raise KeyError(f"removed must name parameters or buffers of the model, got {name!r}")
        tensor = parameters[name]
        mask = kept.setdefault(id(tensor), torch.ones_like(tensor))
        for dim, indices in dims.items():
            mask.index_fill_(dim, indices.to(mask.device), 0)
    masked = {id(tensor): tensor * kept[id(tensor)] for tensor in parameters.values() if id(tensor) in kept}
    state = {name: masked.get(id(tensor), tensor) for name, tensor in parameters.items()}
    state |= {name: buffer.clone() for name, buffer in buffers.items()}  # batch norm in training mode writes to them
    with _NormsOverKept({id(masked[key]): mask for key, mask in kept.items()}):
        return torch.func.functional_call(model, state, args)


def count_macs(model: nn.Module, args: tuple[Any, ...]) -> int:
    """Multiply-accumulates of one forward pass over all samples in `args`; FlopCounterMode counts two for each."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    return counter.get_total_flops() // 2


def count_params(model: nn.Module) -> int:
    """Number of parameter elements, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


class SoftmaxOverKept(TorchFunctionMode):
    """Leaves out of a softmax what masked weights make zero throughout: a channel that does not exist has no share."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.softmax, torch.softmax, F.softmax):
            scores, dim = args[0], args[1] if len(args) > 1 else kwargs["dim"]
            across = -2 if dim in (-1, scores.ndim - 1) else -1
            gone = (scores == 0).all(dim=across, keepdim=True)
            gone &= (scores != 0).any(dim=across, keepdim=True).any(dim=dim, keepdim=True)
            args = (scores.masked_fill(gone, -math.inf), *args[1:])
        return func(*args, **kwargs)


class _NormsOverKept(TorchFunctionMode):
    """Computes norms whose weight lost channels by their definition, over the channels that stay."""

    def __init__(self, kept: Mapping[int, Tensor]):
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        norm = _NORMS.get(func)
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        if norm is None or id(weight) not in self.kept:
            return func(*args, **kwargs)
        return norm(self.kept[id(weight)], *args, **kwargs)


def _layer_norm(
    kept: Tensor, x: Tensor, shape: Any, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    y = _normalised(x, kept, tuple(range(-weight.ndim, 0)), eps) * weight
    return y if bias is None else y + bias


def _rms_norm(kept: Tensor, x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _normalised(x, kept, tuple(range(-weight.ndim, 0)), eps, centre=False) * weight


def _group_norm(
    kept: Tensor, x: Tensor, groups: int, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    grouped = x.reshape(len(x), groups, -1, *x.shape[2:])
    per_channel = (1, -1) + (1,) * (x.ndim - 2)
    mask = kept.view(groups, -1, *per_channel[2:])
    y = _normalised(grouped, mask, tuple(range(2, grouped.ndim)), eps).reshape(x.shape) * weight.view(per_channel)
    return y if bias is None else y + bias.view(per_channel)


def _normalised(x: Tensor, kept: Tensor, dims: tuple[int, ...], eps: float, centre: bool = True) -> Tensor:
    count = kept.expand_as(x).sum(dims, keepdim=True).clamp(min=1)  # a group may have lost all its channels
    if centre:
        x = x - (x * kept).sum(dims, keepdim=True) / count
    variance = (x * kept).square().sum(dims, keepdim=True) / count
    return x / (variance + eps).sqrt()


_NORMS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
}
