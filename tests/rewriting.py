"""Random networks over tokens whose code takes sizes from shapes, printable as the code that makes them."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from tests.fuzzing import checked_candidates
from tests.oracle import SoftmaxOverKept

SIDE = 4
"""Tokens along each side of the map."""

Sizes = tuple[int, int]


class Attention(nn.Module):
    """Attention whose head size is the width of its input divided by the heads; a `Attend` says how it is spelled."""

    def __init__(self, width: int, spec: "Attend"):
        super().__init__()
        self.spec, self.heads = spec, math.gcd(spec.heads, width)
        self.drop = 0.1
        if spec.layout == "separate":
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        elif spec.layout == "convolved":
            self.qkv = nn.Conv2d(width, 3 * width, 1)
        elif spec.layout == "reduced":
            self.q, self.kv, self.reduce = (
                nn.Linear(width, width),
                nn.Linear(width, 2 * width),
                nn.Conv2d(width, width, 2, 2),
            )
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        if spec.extra == "temperature":
            self.temperature = nn.Parameter(torch.rand(self.heads, 1, 1) + 0.5)
        if spec.extra == "talking":
            self.talk = nn.Linear(self.heads, self.heads)
        if spec.extra == "table":
            self.table = nn.Parameter(torch.randn((2 * SIDE - 1) ** 2, self.heads))
            at = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")).flatten(1)
            apart = (at[:, :, None] - at[:, None, :] + SIDE - 1).permute(1, 2, 0)
            self.register_buffer("index", apart[..., 0] * (2 * SIDE - 1) + apart[..., 1])

    def project(self, x: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
        b, n, c = x.shape
        h, layout = self.heads, self.spec.layout
        if layout == "stacked":
            q, k, v = self.qkv(x).reshape(b, n, 3, h, c // h).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        if layout == "chunked":
            q, k, v = (part.view(b, -1, h, c // h).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
            return q, k, v
        if layout == "convolved":
            maps = self.qkv(x.transpose(1, 2).reshape(b, c, *sizes))
            q, k, v = maps.reshape(b, 3, h, c // h, -1).permute(1, 0, 2, 4, 3)
            return q, k, v
        if layout == "reduced":
            q = self.q(x).reshape(b, n, h, c // h).permute(0, 2, 1, 3)
            small = self.reduce(x.permute(0, 2, 1).reshape(b, c, *sizes)).reshape(b, c, -1).permute(0, 2, 1)
            k, v = self.kv(small).reshape(b, -1, 2, h, c // h).permute(2, 0, 3, 1, 4)
            return q, k, v
        q, k, v = (f(x).reshape(b, n, h, c // h).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k, v

    def forward(self, x: Tensor, sizes: Sizes) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.project(x, sizes)
        scale = (c // self.heads) ** -0.5
        if self.spec.extra == "fused":
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.drop if self.training else 0.0)
        elif self.spec.extra == "channels":  # of each head among themselves, as in XCiT
            q, k = F.normalize(q.transpose(-2, -1), dim=-1), F.normalize(k.transpose(-2, -1), dim=-1)
            out = ((q @ k.transpose(-2, -1)).softmax(-1) @ v.transpose(-2, -1)).transpose(-2, -1)
        else:
            scores = (q * scale) @ k.transpose(-2, -1)
            if self.spec.extra == "temperature":
                scores = scores * self.temperature
            if self.spec.extra == "table":  # of one size, as relative positions are
                scores = scores + self.table[self.index.view(-1)].view(SIDE**2, SIDE**2, -1).permute(2, 0, 1)[None]
            if self.spec.extra == "talking":
                scores = self.talk(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            out = F.dropout(scores.softmax(-1), self.drop, self.training) @ v
        if self.spec.out == "contiguous":
            return self.proj(out.permute(0, 2, 1, 3).contiguous().view(b, n, c))
        return self.proj(out.transpose(1, 2).reshape(b, n, c))


@dataclass(frozen=True)
class Attend:
    heads: int = 2
    layout: str = "stacked"
    extra: str = "plain"
    out: str = "reshape"

    def make(self, width: int) -> nn.Module:
        extra = "plain" if self.layout == "reduced" and self.extra in ("table", "channels") else self.extra
        return Attention(width, Attend(self.heads, self.layout, extra, self.out))


class Windowed(nn.Module):
    """Attention in windows of a map that is rolled, with a mask, as in Swin."""

    def __init__(self, width: int, inner: nn.Module, window: int, shift: int):
        super().__init__()
        self.inner, self.window, self.shift = inner, window, shift

    def forward(self, x: Tensor, sizes: Sizes) -> Tensor:
        (b, n, c), (height, width), w = x.shape, sizes, self.window
        x = torch.roll(x.view(b, height, width, c), (-self.shift, -self.shift), (1, 2))
        x = x.view(b, height // w, w, width // w, w, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w * w, c)
        x = self.inner(x, (w, w))
        x = x.view(b, height // w, width // w, w, w, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, height, width, c)
        return torch.roll(x, (self.shift, self.shift), (1, 2)).view(b, n, c)


@dataclass(frozen=True)
class Windows:
    inner: Attend = Attend()
    window: int = 2
    shift: int = 0

    def make(self, width: int) -> nn.Module:
        extra = "plain" if self.inner.extra == "table" else self.inner.extra
        inner = Attend(self.inner.heads, self.inner.layout, extra, self.inner.out).make(width)
        return Windowed(width, inner, self.window, self.shift)


class ByClass(nn.Module):
    """One token asks all others, as in CaiT; its answer is added to each."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = math.gcd(heads, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, sizes: Sizes) -> Tensor:
        all_of_it = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1)
        b, n, c = all_of_it.shape
        h = self.heads
        q = self.q(all_of_it[:, 0]).unsqueeze(1).reshape(b, 1, h, c // h).permute(0, 2, 1, 3)
        k, v = (f(all_of_it).reshape(b, n, h, c // h).permute(0, 2, 1, 3) for f in (self.k, self.v))
        out = ((q * (c // h) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, 1, c)).expand(-1, n - 1, -1)


@dataclass(frozen=True)
class ClassToken:
    heads: int = 2

    def make(self, width: int) -> nn.Module:
        return ByClass(width, self.heads)


class Local(nn.Module):
    """A depthwise convolution over the map of tokens, or layers over all tokens of a batch in one matrix."""

    def __init__(self, width: int, how: str):
        super().__init__()
        self.how = how
        self.depth, self.first, self.second = (
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.Linear(width, 12),
            nn.Linear(12, width),
        )

    def forward(self, x: Tensor, sizes: Sizes) -> Tensor:
        b, n, c = x.shape
        if self.how == "depthwise":
            return self.depth(x.transpose(1, 2).view(b, c, *sizes)).flatten(2).transpose(1, 2) + 0 * self.second(
                self.first(x)
            )
        if self.how == "gate":
            gate = self.second(self.first(x.mean(1)).relu()).sigmoid().view(b, 1, c)
            x = x * gate
        return self.second(self.first(x.reshape(b * n, c)).relu()).reshape(b, n, c) + self.depth.bias[
            :, None
        ].T.reshape(1, 1, c)


@dataclass(frozen=True)
class Plain:
    how: str = "depthwise"

    def make(self, width: int) -> nn.Module:
        return Local(width, self.how)


class Network(nn.Module):
    def __init__(self, width: int, layers: list[nn.Module], tied: bool):
        super().__init__()
        self.stem, self.layers, self.head = nn.Conv2d(3, width, 2, 2), nn.ModuleList(layers), nn.Linear(width, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in layers)
        self.tied = tied

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        sizes = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), sizes)
            if self.tied:  # called twice
                x = x + layer(norm(x), sizes)
        return self.head(x.mean(1))


@dataclass(frozen=True)
class TokenSpec:
    layers: tuple[Any, ...] = ()
    width: int = 8
    tied: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = Network(self.width, [layer.make(self.width) for layer in self.layers], self.tied)
        for norm in model.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        return model.eval().double()


def image(batch: int = 2, height: int = 2 * SIDE, width: int = 2 * SIDE) -> tuple[Tensor]:
    return (torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0)).double(),)


HEADS = st.sampled_from((2, 4))
ATTEND = st.builds(
    Attend,
    HEADS,
    st.sampled_from(("stacked", "chunked", "separate", "convolved", "reduced")),
    st.sampled_from(("plain", "fused", "temperature", "talking", "table", "channels")),
    st.sampled_from(("reshape", "contiguous")),
)
LAYERS = st.one_of(
    ATTEND,
    ATTEND,
    st.builds(Windows, ATTEND, st.just(2), st.sampled_from((0, 1))),
    st.builds(ClassToken, HEADS),
    st.builds(Plain, st.sampled_from(("depthwise", "matrix", "gate"))),
)
TOKEN_SPECS = st.builds(
    TokenSpec, st.lists(LAYERS, min_size=1, max_size=3).map(tuple), st.sampled_from((8, 16, 24)), st.booleans()
)


@dataclass
class Rewritten:
    """Numbers of networks, of their modules that became graphs, and of their groups of units."""

    networks: int = 0
    graphs: int = 0
    groups: int = 0
    stuck: int = 0

    def add(self, other: "Rewritten") -> None:
        self.networks += other.networks
        self.graphs += other.graphs
        self.groups += other.groups
        self.stuck += other.stuck


def check_tokens(spec: TokenSpec, candidates: int = 2) -> Rewritten:
    """Assert that what is built is right for the inputs traced and for others, by independent answers."""
    model, args = spec.model(), image()
    table = any("table" in repr(layer) for layer in spec.layers)
    others = [image(3)] if table else [image(3), image(1, 4 * SIDE, 2 * SIDE)]
    structure = analyse(Example(model, args))
    for built in checked_candidates(model, structure, args, candidates, others, SoftmaxOverKept):
        assert list(built.state_dict()) == list(model.state_dict())
        built.train()(*args).sum().backward()
        unread = {name for name, p in model.named_parameters() if name in structure.untouched}
        assert all(p.grad is not None for name, p in built.named_parameters() if name not in unread)
    residual = structure.units_of.get("stem.bias", (None,))[0]
    stuck = residual is None or bool((residual < 0).any()) or structure.groups[0].size < spec.width
    return Rewritten(1, len(structure.graphs), len(structure.groups), int(stuck))
