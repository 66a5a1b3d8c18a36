"""Entries for networks of any input, and weights for them under which a mistake in slicing shows in the outputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zoo import Entry
from zoo.settle import BATCH_NORMS

Inputs = tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class AnyEntry(Entry):
    """One network that takes positional or keyword arguments.

    Attributes:
        inputs: Makes the same arguments each time for the same ``batch=2`` and ``seed=0``: positional ones as a tuple,
            keyword ones as a dictionary.
        outputs: Key of the output that matters, or None if all of them do.
    """

    inputs: Callable[..., Inputs]
    outputs: str | None = None

    def forward(self, model: nn.Module, inputs: Inputs) -> Any:
        """Call `model`, and return the outputs that matter."""
        outputs = _call(model, inputs)
        return outputs if self.outputs is None else outputs[self.outputs]


def _call(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def settled_parameters(make: Callable[[], nn.Module], inputs: Callable[..., Inputs], seed: int = 0) -> nn.Module:
    """Build a network in eval mode, every parameter and statistic of which matters; the global RNG stays as it was.

    Like `zoo.settled`, for modules that own parameters of their own kinds. Published initialisers (a deviation
    of 0.02, zeros, ones, a layer scale of 1e-6) would leave outputs that hardly depend on what is inside.

    Args:
        make: Builds the network.
        inputs: Called with ``batch`` and ``seed``, makes the arguments with which batch norms see data.
        seed: Of everything drawn.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().eval()
        seen: set[int] = set()
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:  # a tied weight keeps the scale of its first owner, the embedding
                    _spread(module, name, parameter)
                seen.add(id(parameter))
        _settle_batch_norms(model, inputs(batch=16, seed=seed + 1))
    return model


@torch.no_grad()
def _spread(module: nn.Module, name: str, parameter: Tensor) -> None:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        parameter.normal_(std=0.5)
    elif "Norm" in type(module).__name__ and "weight" in name:
        one_plus = parameter.mean() < 0.5  # Gemma's norms scale by 1 + weight
        parameter.uniform_(0.5, 1.5).sub_(1.0 if one_plus else 0.0)
    elif "bias" in name and parameter.ndim == 1:
        parameter.normal_(std=0.2)
    elif ("weight" in name or "proj" in name) and parameter.ndim > 1:
        parameter.normal_(std=_fan_in(module, parameter) ** -0.5)
    elif parameter.ndim and parameter.abs().max() < 0.1:
        parameter.normal_(std=0.5)  # tokens, positions and tables, which begin at or near zero
    elif parameter.ndim:
        parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))


def _fan_in(module: nn.Module, weight: Tensor) -> int:
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d) or type(module).__name__ == "Conv1D":
        return weight.shape[0]  # (inputs, outputs, ...); the Conv1D of GPT-2 is a transposed linear layer
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return max(1, weight[0].numel() // 2)  # of activations that lose half their power in a rectifier
    return weight.shape[-1]  # also of experts stacked as (experts, outputs, inputs)


@torch.no_grad()
def _settle_batch_norms(model: nn.Module, inputs: Inputs) -> None:
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:  # these alone: in training mode others would drop, mask and skip at random
        norm.train().momentum = None
    _call(model, inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        mean += 0.3 * variance.sqrt() * torch.randn_like(mean)
        variance *= 0.8 + 0.5 * torch.rand_like(variance)
