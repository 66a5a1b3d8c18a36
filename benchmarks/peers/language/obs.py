"""Optimal brain surgeon on the inputs of one linear layer: which go first, and the weights that remain, re-fitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.language.case import Moments

COMPACT = 8  # arrays are made smaller when this fraction of the units has gone, since the rest is passed over


@dataclass(frozen=True)
class Layer:
    """A linear layer and the damped second moments of its inputs.

    Attributes:
        weight: Its weights, float64, shape (outputs, inputs).
        gram: Mean outer product of its inputs, damped, float64, shape (inputs, inputs).
        block: Inputs that go together: 1 for neurons, those of all heads of a key-value group.
    """

    weight: Tensor
    gram: Tensor
    block: int

    @classmethod
    def of(cls, weight: Tensor, moments: Moments, block: int, damping: float) -> Layer:
        gram = moments.gram.double() / moments.count
        damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        return cls(weight.detach().double(), damped, block)

    def members(self, units: Tensor) -> Tensor:
        return (units[:, None] * self.block + torch.arange(self.block)).flatten()


def removal_order(layer: Layer, count: int, at_once: int = 1) -> Tensor:
    """The first `count` units to go, in order, int64, shape (count,).

    Each is the one whose removal costs least after all others adapt: ``tr(W_S [(H^-1)_SS]^-1 W_S^T)``, with W and the
    inverse of H after the removals before it.

    Args:
        layer: Weights and moments.
        count: Units to remove.
        at_once: Units that are taken between two updates; 1 is exact, more is faster.

    Reference:
        Kurtic, Frantar and Alistarh, "ZipLM", NeurIPS 2023, arXiv:2302.04089, equations 1 to 3 and algorithm 1; Ling
        et al., "SlimGPT", NeurIPS 2024, arXiv:2412.18110, for taking several at once.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(layer.gram))
    weight = layer.weight.clone()
    left = torch.arange(len(inverse) // layer.block)
    order: list[Tensor] = []
    while count:
        now = min(count, max(at_once, len(left) // COMPACT) if layer.block == 1 else at_once)
        gone = _take(weight, inverse, layer.block, now, at_once)
        order.append(left[gone])
        units = torch.ones(len(left), dtype=torch.bool)
        units[gone] = False
        stays = units.repeat_interleave(layer.block)
        weight = weight[:, stays]
        inverse = inverse[stays][:, stays]
        left = left[units]
        count -= now
    return torch.cat(order) if order else left[:0]


def _take(weight: Tensor, inverse: Tensor, block: int, count: int, at_once: int) -> Tensor:
    """Choose units to go and eliminate them from `weight` and `inverse`, in place; int64, shape (count,)."""
    order: list[Tensor] = []
    gone = torch.zeros(len(inverse) // block, dtype=torch.bool)
    for start in range(0, count, at_once):
        price = costs(weight, inverse, block).masked_fill(gone, torch.inf)
        least = price.argsort()[: min(at_once, count - start)]
        members = (least[:, None] * block + torch.arange(block)).flatten()
        factor = torch.linalg.solve(inverse[members][:, members], inverse[members])
        weight.sub_(weight[:, members] @ factor)
        inverse.sub_(inverse[:, members] @ factor)
        gone[least] = True
        order.append(least)
    return torch.cat(order)


def costs(weight: Tensor, inverse: Tensor, block: int) -> Tensor:
    """Squared error of the outputs, mean over tokens, if one unit more went, shape (units,)."""
    if block == 1:
        return weight.square().sum(0) / inverse.diagonal()
    found = []
    for part in torch.arange(len(inverse)).split(block):
        columns = weight[:, part]
        found.append((columns @ torch.linalg.solve(inverse[part][:, part], columns.T)).trace())
    return torch.stack(found)


def refitted(layer: Layer, kept: Tensor) -> Tensor:
    """Weights of the units kept that reproduce the outputs best, shape (outputs, members of those units)."""
    members = layer.members(kept)
    right = layer.gram[members] @ layer.weight.T
    return torch.cholesky_solve(right, torch.linalg.cholesky(layer.gram[members][:, members])).T
