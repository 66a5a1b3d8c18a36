"""Weights of a module as copies: taken, and put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]
"""Parameters and buffers by name, shared ones once."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters and buffers, on the CPU."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Copy values into a model's parameters and buffers."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.copy_(weights[name])
