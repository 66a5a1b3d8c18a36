"""Better networks that a network in training learns from, as functions of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from autoprune.data.batch import Batch, Forward, tensors
from autoprune.errors import UnsupportedModelError
from autoprune.metrics.scorers import main_output
from autoprune.structure.given import unwrap
from autoprune.structure.slicing.slicing import Edit, Slicer

Better = Callable[[Batch], Tensor | None]
"""Main output of a better network for the samples of a batch, or for the first of them; None where there is none."""


def private(model: nn.Module, device: torch.device) -> nn.Module:
    """The model in evaluation mode, with modules and buffers of its own, and the parameters of the one given.

    Raises:
        UnsupportedModelError: If it is on another device.
    """
    model = unwrap(model)
    found = device_of(model)
    if found != device:
        raise UnsupportedModelError(f"teacher must be on the device of the model, {device}, got {found}")
    return Slicer(model).cut(Edit({}, {})).eval()


def device_of(module: nn.Module) -> torch.device:
    """Device of a module's first parameter or buffer.

    Raises:
        ValueError: If it has none.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    raise ValueError(f"{type(module).__name__} has no parameters to train")


def kept_outputs(batches: Sequence[Batch], outputs: Sequence[Tensor | None]) -> Better:
    """Look up the outputs of a better network that were computed before, by the identity of a batch's first tensor."""

    def key(batch: Batch) -> int:
        return id(next(tensors(batch)))

    found: Mapping[int, Tensor | None] = dict(zip(map(key, batches), outputs, strict=True))
    return lambda batch: found[key(batch)]


def fresh_outputs(dense: nn.Module, forward: Forward) -> Better:
    """Compute the outputs of a better network for each batch."""

    def better(batch: Batch) -> Tensor:
        with torch.no_grad():
            return main_output(forward(dense, batch))

    return better


def none_better(batch: Batch) -> None:
    """Give no outputs: there is no better network."""
