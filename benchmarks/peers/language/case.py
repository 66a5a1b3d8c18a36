"""A model with its calibration sequences, as every method is given it, and statistics of one pass over them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from benchmarks.peers.language.blocks import attended, embedded, fed, layers_of, parameters

BATCH = 8
TOLERANCE = 0.0005  # of the share: widths are whole numbers, and 27 of 30 blocks are 90.0005 %


@dataclass
class Moments:
    """First and second moments of a layer's inputs.

    Attributes:
        count: Number of tokens.
        total: Sum of inputs, float64, shape (d,).
        gram: Sum of their outer products, float32, shape (d, d).
    """

    count: int
    total: Tensor
    gram: Tensor

    @classmethod
    def of(cls, width: int) -> Moments:
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width))

    def add(self, inputs: Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.count += len(rows)
        self.total += rows.sum(0, dtype=torch.float64)
        self.gram += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Sample variance of each input, float64, shape (d,)."""
        squares = self.gram.diagonal().double() - self.count * self.mean.square()
        return squares.clamp(min=0) / (self.count - 1)


@dataclass
class Statistics:
    """Averages over one pass of the dense model over the calibration sequences.

    Attributes:
        heads: Moments of the inputs of each block's `o_proj`.
        neurons: Those of each block's `down_proj`.
        cosines: Mean cosine of the angle between the residual streams before blocks i and j, (layers + 1, layers + 1).
        angles: Mean of that angle, in radians, at the last token of each sequence.
        streams: Moments of the streams that blocks read, each token scaled to a mean square of 1, over all norms.
    """

    heads: list[Moments]
    neurons: list[Moments]
    cosines: Tensor
    angles: Tensor
    streams: Moments


@dataclass
class Case:
    """One model and one draw of calibration sequences.

    Attributes:
        model: The dense model; methods copy it.
        ids: Calibration sequences, int64, shape (n, tokens).
        seed: Of the draw, and of whatever a method draws.
        evaluations: Candidates that a method that searches may score.
        dtype: Of forward passes; what they are used for is computed in float32 or float64.
    """

    model: nn.Module
    ids: Tensor
    seed: int = 0
    evaluations: int = 40
    dtype: torch.dtype = torch.bfloat16
    kept: dict[str, object] = field(default_factory=dict)  # what a method shares between its own cells

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    @property
    def layers(self) -> nn.ModuleList:
        return layers_of(self.model)

    @cached_property
    def fast(self) -> nn.Module:
        """The dense model in `dtype`, never changed."""
        return self.copy().to(self.dtype).eval()

    @cached_property
    def parameters(self) -> int:
        return parameters(self.model)

    def most(self, share: float) -> int:
        """Parameters that a network may have, those of the embedding not counted."""
        return int((share + TOLERANCE) * self.parameters)

    @cached_property
    def statistics(self) -> Statistics:
        return collect(self.fast, self.ids)


@torch.no_grad()
def collect(model: nn.Module, ids: Tensor) -> Statistics:
    """Run the dense model over the calibration sequences once."""
    layers = layers_of(model)
    heads = [Moments.of(layer.self_attn.o_proj.in_features) for layer in layers]
    neurons = [Moments.of(layer.mlp.down_proj.in_features) for layer in layers]
    streams = Moments.of(layers[0].mlp.gate_proj.in_features)
    hooks = [
        module.register_forward_pre_hook(lambda _, args, moments=moments: moments.add(args[0]))
        for layer, o, down in zip(layers, heads, neurons, strict=True)
        for module, moments in ((layer.self_attn.o_proj, o), (layer.mlp.down_proj, down))
    ]
    size = len(layers) + 1
    cosines = torch.zeros(size, size, dtype=torch.float64)
    angles = torch.zeros(size, size, dtype=torch.float64)
    for part in ids.split(BATCH):
        seen: list[Tensor] = []
        x, call = embedded(model, part)
        for layer in layers:
            seen.append(x)
            streams.add(unit(x))
            x = attended(layer, x, call)
            streams.add(unit(x))
            x = fed(layer, x)
        seen.append(x)
        each = nn.functional.normalize(torch.stack(seen).float(), dim=-1)
        pairs = torch.einsum("intd,jntd->ntij", each, each).double().clamp(-1, 1)
        cosines += pairs.sum((0, 1))
        angles += pairs[:, -1].arccos().sum(0)
    for hook in hooks:
        hook.remove()
    return Statistics(heads, neurons, cosines / ids.numel(), angles / len(ids), streams)


def unit(x: Tensor) -> Tensor:
    """Each token scaled to a mean square of 1, as RMSNorm does before its weight."""
    x = x.float()
    return x * x.square().mean(-1, keepdim=True).rsqrt()
