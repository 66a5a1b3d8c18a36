"""What the layers of the dense model read: means and covariances of their unfolded inputs, in float64."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.weak import WeakIdKeyDictionary

from autoprune.batches import Batch
from autoprune.criteria import private_copy
from autoprune.evaluators.memory import Halving
from autoprune.reconstruction import reads
from autoprune.structure.slicing import owners
from autoprune.structure.structure import Structure

log = logging.getLogger(__name__)

CHUNK_BYTES = 64 * 2**20
"""Most memory for rows on their way into a covariance."""


@dataclass
class Moments:
    """Of the inputs of one layer, unfolded to the columns that its weight matrix multiplies: (channel, position).

    Attributes:
        mean: Of each column over samples and positions, padding included, float64, shape (columns,).
        products: Mean of the products of any two columns, float64, shape (columns, columns), or None.
        rows: How many rows were averaged over.
        normalised: Whether batch norm reads what the layer gives, and so takes any constant off it.
    """

    mean: Tensor
    products: Tensor | None
    rows: int = 0
    normalised: bool = False

    def add(self, rows: Tensor) -> None:
        """Take one or more rows, shape (n, columns), into the averages."""
        self.rows += len(rows)
        share, rows = len(rows) / self.rows, rows.double()
        self.mean.lerp_(rows.mean(0), share)
        if self.products is not None:
            self.products.mul_(1 - share).addmm_(rows.T, rows, alpha=1 / self.rows)


def layer_moments(
    model: nn.Module,
    structure: Structure,
    batches: Sequence[Batch],
    forward: Callable[[nn.Module, Batch], Any],
    memory_bytes: int,
) -> dict[str, Moments]:
    """Moments of the layers that read units, in one pass of the dense model.

    Seen are ungrouped convolutions, transposed ones left out, and linear layers, with weights that no other layer
    shares, that the model calls and whose inputs are finite. A layer that is called several times is averaged over its
    calls.

    Args:
        model: The dense model; comes back unchanged.
        structure: Its structure.
        batches: Calibration data.
        forward: Runs the model on a batch.
        memory_bytes: Most memory for `Moments.products`; the largest are left out, with a warning in the log. 0 takes
            means only.
    """
    copied = private_copy(model)
    watched = _watched(copied, structure)
    # Anew for smaller batches, because part of one that did not fit was averaged.
    return Halving()(lambda parts: _moments_of(copied, _empty(copied, watched, memory_bytes), parts, forward), batches)


def _moments_of(
    copied: nn.Module,
    found: dict[str, Moments],
    batches: Sequence[Batch],
    forward: Callable[[nn.Module, Batch], Any],
) -> dict[str, Moments]:
    """Fill `found` in one pass over the batches."""
    made_by: MutableMapping[Tensor, str] = WeakIdKeyDictionary()

    def see(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            for rows in unfolded(layer, _first(args, kwargs)):
                found[name].add(rows)
            made_by[output] = name

        return hook

    def meet(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        name = made_by.get(_first(args, kwargs))
        if name is not None:
            found[name].normalised = True

    hooks = [copied.get_submodule(name).register_forward_hook(see(name), with_kwargs=True) for name in found]
    norms = [module for module in copied.modules() if isinstance(module, _BatchNorm)]
    hooks += [norm.register_forward_pre_hook(meet, with_kwargs=True) for norm in norms]
    try:
        with torch.no_grad():
            for batch in batches:
                forward(copied, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: moments for name, moments in found.items() if moments.rows and _finite(moments)}


def _watched(model: nn.Module, structure: Structure) -> list[str]:
    holders = Counter(owner.name for owner in owners(model))
    return [
        name
        for name in reads(model, structure)
        if holders[f"{name}.weight"] == 1 and not isinstance(model.get_submodule(name), _ConvTransposeNd)
    ]


def _first(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    return next(iter((*args, *kwargs.values())))


def unfolded(layer: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The inputs of a linear or convolution layer as rows that its flattened weight multiplies, (n, columns) each."""
    if isinstance(layer, _ConvNd):
        space = len(layer.kernel_size)
        x = x if x.ndim == space + 2 else x.unsqueeze(0)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
        for dim in range(space):
            size, dilation = layer.kernel_size[dim], layer.dilation[dim]
            x = x.unfold(2 + dim, dilation * (size - 1) + 1, layer.stride[dim])[..., ::dilation]
        x = x.movedim(1, 1 + space)  # samples, positions, channels, kernel: a view, and much larger than its storage
        columns = x.shape[1 + space :].numel()
    else:
        columns = x.shape[-1]
        x = x.reshape(-1, columns)
    for part in torch.split(x, max(1, CHUNK_BYTES // (8 * max(x[:1].numel(), 1)))):
        if part.numel():
            yield part.reshape(-1, columns)


def _empty(model: nn.Module, names: Sequence[str], memory_bytes: int) -> dict[str, Moments]:
    """Moments of nothing yet; the smallest products first, as long as they fit."""
    weights = {name: model.get_submodule(name).get_parameter("weight") for name in names}
    found, left = {}, memory_bytes
    for name, weight in sorted(weights.items(), key=lambda item: item[1][0].numel()):
        columns = weight[0].numel()
        mean = torch.zeros(columns, dtype=torch.float64, device=weight.device)
        size = 8 * columns**2
        if size <= left:
            left -= size
            found[name] = Moments(mean, mean.new_zeros(columns, columns))
            continue
        found[name] = Moments(mean, None)
        if memory_bytes:
            log.warning("%s keeps its weights: products of its inputs take %.0f MiB more", name, size / 2**20)
    return found


def _finite(moments: Moments) -> bool:
    parts = (moments.mean,) if moments.products is None else (moments.mean, moments.products)
    return all(bool(part.isfinite().all()) for part in parts)
