"""Random networks, printable as the code that makes them, and what must hold for every one.

A `Spec` is made of plain frozen descriptions. Each fits itself to whatever width and size it meets, so that every
combination is a valid network, and a failing one shrinks to a short one: leave descriptions out, lower numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoprune.costs import StructuralCosts
from autoprune.protocols import Pruning
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from tests.candidates import gap, oracle_outputs, outputs_of, random_pruning, widths_of
from tests.oracle import count_macs, count_params
from zoo.entries import settled_parameters

SIZE = 8
Made = tuple[nn.Module, int, int]
"""A module with the channels and the size (height and width) of the maps that it gives."""


@dataclass(frozen=True)
class Conv:
    """`groups` is lowered to what divides both widths; 0 is a depthwise convolution."""

    width: int = 8
    kernel: int = 1
    groups: int = 1
    stride: int = 1

    def make(self, channels: int, size: int) -> Made:
        width, groups = (self.width, self.groups) if self.groups else (channels, channels)
        groups, stride = math.gcd(groups, channels, width), self.stride if size >= 4 else 1
        conv = nn.Conv2d(channels, width, self.kernel, stride, self.kernel // 2, groups=groups)
        return conv, width, (size - 1) // stride + 1


@dataclass(frozen=True)
class Transposed:
    width: int = 8
    groups: int = 1

    def make(self, channels: int, size: int) -> Made:
        stride = 2 if size < SIZE else 1
        groups = math.gcd(self.groups, channels, self.width)
        return nn.ConvTranspose2d(channels, self.width, stride, stride, groups=groups), self.width, size * stride


class ChannelsLast(nn.Module):
    """Runs a module over maps whose channels are the last dimension."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Norm:
    kind: str = "batch"

    def make(self, channels: int, size: int) -> Made:
        norms: dict[str, Callable[[], nn.Module]] = {
            "batch": lambda: nn.BatchNorm2d(channels),
            "group": lambda: nn.GroupNorm(math.gcd(4, channels), channels),
            "layer": lambda: ChannelsLast(nn.LayerNorm(channels)),
            # which refuses to train on maps of one position
            "instance": lambda: nn.InstanceNorm2d(channels, affine=True) if size > 1 else nn.Identity(),
        }
        return norms[self.kind](), channels, size


@dataclass(frozen=True)
class Act:
    kind: str = "ReLU"

    def make(self, channels: int, size: int) -> Made:
        return nn.PReLU(channels) if self.kind == "PReLU" else getattr(nn, self.kind)(), channels, size


class Chain(nn.Sequential):
    """Layers in a row."""


def chain(layers: tuple[Any, ...], channels: int, size: int) -> Made:
    made = []
    for layer in layers:
        module, channels, size = layer.make(channels, size)
        made.append(module)
    return Chain(*made), channels, size


class Joined(nn.Module):
    """Two branches, brought to the size of the first, added or concatenated."""

    def __init__(self, first: nn.Module, second: nn.Module, size: int, concat: bool):
        super().__init__()
        self.first, self.second, self.size, self.concat = first, second, size, concat

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(x), F.adaptive_avg_pool2d(self.second(x), self.size)
        return torch.cat((first, second), dim=1) if self.concat else first + second


@dataclass(frozen=True)
class Join:
    """Branches that both read the same; a convolution fits the second to the first where they are added."""

    first: tuple[Any, ...] = ()
    second: tuple[Any, ...] = ()
    concat: bool = False

    def make(self, channels: int, size: int) -> Made:
        first, width, new_size = chain(self.first, channels, size)
        second, other, _ = chain(self.second, channels, size)
        if not self.concat and width != other:
            second = nn.Sequential(second, nn.Conv2d(other, width, 1))
        return Joined(first, second, new_size, self.concat), width + other * self.concat, new_size


class Parts(nn.Module):
    """Takes the channels apart: by a gate, as a sum, or one part goes through a convolution and back."""

    def __init__(self, channels: int, how: str, split: bool):
        super().__init__()
        self.how, self.split, self.half = how, split, channels // 2
        self.inner = nn.Conv2d(channels // 2, channels // 2, 1) if how == "inner" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split(self.half, dim=1) if self.split else x.chunk(2, dim=1)
        if self.how == "inner":
            return torch.cat((a, self.inner(b)), dim=1)
        return a * b.sigmoid() if self.how == "gate" else a + b


@dataclass(frozen=True)
class Halves:
    how: str = "gate"
    split: bool = False

    def make(self, channels: int, size: int) -> Made:
        if channels % 2:
            return nn.Identity(), channels, size
        return Parts(channels, self.how, self.split), channels if self.how == "inner" else channels // 2, size


class Shuffled(nn.Module):
    """Channel shuffle as ShuffleNet writes it."""

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


@dataclass(frozen=True)
class Shuffle:
    groups: int = 2

    def make(self, channels: int, size: int) -> Made:
        return Shuffled(math.gcd(self.groups, channels)), channels, size


@dataclass(frozen=True)
class PixelShuffle:
    """Channels become space, or space becomes channels."""

    up: bool = True

    def make(self, channels: int, size: int) -> Made:
        if self.up and channels % 4 == 0 and size < SIZE:
            return nn.PixelShuffle(2), channels // 4, size * 2
        if not self.up and size % 2 == 0 and channels < 16:
            return nn.PixelUnshuffle(2), channels * 4, size // 2
        return nn.Identity(), channels, size


class Scaled(nn.Module):
    """Groups of channels scaled by one number each, through a view."""

    def __init__(self, groups: int):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(groups) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(1, (len(self.scale), -1))
        return (grouped * self.scale.view(-1, 1, 1, 1)).flatten(1, 2)


@dataclass(frozen=True)
class GroupScale:
    groups: int = 2

    def make(self, channels: int, size: int) -> Made:
        return Scaled(math.gcd(self.groups, channels)), channels, size


class Excited(nn.Module):
    """Squeeze and excite over flattened means."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze, self.excite = nn.Linear(channels, 8), nn.Linear(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        return x * gate[:, :, None, None]


@dataclass(frozen=True)
class Excite:
    def make(self, channels: int, size: int) -> Made:
        return Excited(channels), channels, size


class Attended(nn.Module):
    """Residual attention over the pixels of a map, spelled in one of several ways."""

    def __init__(self, channels: int, heads: int, how: str):
        super().__init__()
        self.heads, self.head_dim, self.how = heads, channels // heads, how
        self.norm = nn.LayerNorm(channels)
        if how == "module":
            self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        elif how == "separate":
            self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
            self.out = nn.Linear(channels, channels)
        else:
            self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return x + self.attend(self.norm(tokens)).transpose(1, 2).reshape(x.shape)

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if self.how == "module":
            return self.attention(x, x, x, need_weights=False)[0]
        if self.how == "separate":
            parts = (part(x).view(b, t, self.heads, self.head_dim).transpose(1, 2) for part in (self.q, self.k, self.v))
            q, k, v = parts
            weights = (q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(-1)
            return self.out((weights @ v).transpose(1, 2).flatten(2))
        if self.how == "stacked":
            q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))


@dataclass(frozen=True)
class Attention:
    heads: int = 2
    how: str = "chunked"

    def make(self, channels: int, size: int) -> Made:
        return Attended(channels, math.gcd(self.heads, channels), self.how), channels, size


@dataclass(frozen=True)
class Mlp:
    """Two linear layers over the channels, as in ConvNeXt."""

    width: int = 8

    def make(self, channels: int, size: int) -> Made:
        inner = nn.Sequential(nn.Linear(channels, self.width), nn.GELU(), nn.Linear(self.width, channels))
        return ChannelsLast(inner), channels, size


class Read(nn.Module):
    """The head: classes from pooled or flattened maps, or a map of its own."""

    def __init__(self, channels: int, size: int, how: str):
        super().__init__()
        self.how = how
        self.layer = nn.Conv2d(channels, 3, 1) if how == "map" else nn.Linear(channels * size**2, 5)
        if how == "pool":
            self.layer = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mean((2, 3)) if self.how == "pool" else x.flatten(1) if self.how == "flatten" else x)


@dataclass(frozen=True)
class Spec:
    """A network: a first convolution to `width` channels, layers, and a head (``pool``, ``flatten`` or ``map``)."""

    layers: tuple[Any, ...] = ()
    width: int = 8
    head: str = "pool"

    def make(self) -> nn.Module:
        body, channels, size = chain((Conv(self.width, 3), *self.layers), 3, SIZE)
        return nn.Sequential(body, Read(channels, size, self.head))

    def model(self) -> nn.Module:
        """Make the model in evaluation mode and 64-bit floats, so that rounding hides nothing."""
        return settled_parameters(self.make, partial(inputs, dtype=torch.float32)).double()


def inputs(batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor]:
    return (torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype),)


WIDTHS = st.sampled_from((8, 12, 16, 24))
GROUPS = st.sampled_from((2, 4))
PLAIN = st.one_of(
    st.builds(Conv, WIDTHS, st.sampled_from((1, 3)), st.sampled_from((1, 2, 4, 0)), st.sampled_from((1, 2))),
    st.builds(Transposed, WIDTHS, st.sampled_from((1, 2))),
    st.builds(Norm, st.sampled_from(("batch", "group", "layer", "instance"))),
    st.builds(Act, st.sampled_from(("ReLU", "GELU", "Hardswish", "Tanh", "PReLU"))),
    st.builds(Halves, st.sampled_from(("gate", "sum", "inner")), st.booleans()),
    st.builds(Shuffle, GROUPS),
    st.builds(PixelShuffle, st.booleans()),
    st.builds(GroupScale, GROUPS),
    st.builds(Excite),
    st.builds(Attention, GROUPS, st.sampled_from(("chunked", "stacked", "separate", "module"))),
    st.builds(Mlp, WIDTHS),
)
BRANCH = st.lists(PLAIN, max_size=3).map(tuple)
LAYERS = st.one_of(PLAIN, PLAIN, st.builds(Join, BRANCH, BRANCH, st.booleans()))
MOST_FROZEN = 0.1
"""Share of the layers that make channels which may stay without need, over many networks."""

SPECS = st.builds(
    Spec, st.lists(LAYERS, min_size=1, max_size=6).map(tuple), WIDTHS, st.sampled_from(("pool", "flatten", "map"))
)


@dataclass
class Tally:
    """Producers, the layers that make channels, over all networks: how many there were, how many must keep some."""

    networks: int = 0
    producers: int = 0
    frozen: int = 0

    def add(self, other: "Tally") -> None:
        self.networks += other.networks
        self.producers += other.producers
        self.frozen += other.frozen


def check(spec: Spec, candidates: int = 2) -> Tally:
    """Assert that what is built from the network of a spec is right by independent answers."""
    model, args = spec.model(), inputs()
    structure = analyse(Example(model, args))
    for _ in checked_candidates(model, structure, args, candidates):
        pass
    return tally(model, structure)


def checked_candidates(
    model: nn.Module,
    structure: Structure,
    args: tuple[Tensor, ...],
    candidates: int,
    others: Sequence[tuple[Tensor, ...]] = (),
    around_oracle: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[nn.Module]:
    """Random candidates as built, each once it gave what independent answers say for the inputs and for `others`."""
    costs, rng = StructuralCosts(structure), np.random.default_rng(0)
    assert gap(outputs_of(structure.build(model, Pruning()), args), outputs_of(model, args)) == 0.0
    for _ in range(candidates):
        pruning = random_pruning(structure, rng)
        built = structure.build(model, pruning)
        for given in (args, *others):
            found = outputs_of(built, given)
            with around_oracle():
                expected = oracle_outputs(model, structure.edit(pruning), given)
            assert gap(found, expected) <= 1e-9 * max(1.0, *(out.abs().max().item() for out in expected))
        widths = widths_of(structure, [pruning])
        assert costs.flops(widths)[0] * len(args[0]) == macs(built, args)
        assert costs.params(widths)[0] == count_params(built)
        yield built


def macs(model: nn.Module, args: tuple[Tensor, ...]) -> int:
    """Count without fused attention, which the counter does not know."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return count_macs(model, args)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def tally(model: nn.Module, structure: Structure) -> Tally:
    """Count the layers that make channels, the head left out: their outputs may all go unless something stops them."""
    layers = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
    names = [name for name, module in model[0].named_modules(prefix="0") if isinstance(module, layers)]
    units = [structure.units_of.get(f"{name}.bias", (None,))[0] for name in names]
    return Tally(1, len(names), sum(own is None or bool((own < 0).any()) for own in units))


def kinds(layers: tuple[Any, ...]) -> list[str]:
    """Names of the layers in a network, those in branches too."""
    inner = [name for layer in layers if isinstance(layer, Join) for name in kinds((*layer.first, *layer.second))]
    return [type(layer).__name__ for layer in layers] + inner
