"""Attention and mixing written by hand, each with a spelling of its own for heads and gates."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TransformerClassifier(nn.Module):
    """`nn.TransformerEncoder` over tokens (b, t), one of each kind of norm placement, then mean and linear layer."""

    def __init__(self, words: int = 50, width: int = 32, heads: int = 4, classes: int = 5):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.before, self.after = (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(width, heads, 48, batch_first=True, norm_first=first),
                num_layers=1,
                enable_nested_tensor=False,
            )
            for first in (True, False)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.after(self.before(self.embed(tokens))).mean(1))


class CrossAttention(nn.Module):
    """Learned queries read an image's features through `nn.MultiheadAttention` (after DETR); classes and boxes."""

    def __init__(self, width: int = 32, heads: int = 4, queries: int = 5, classes: int = 6):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, stride=8)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 56), nn.ReLU(), nn.Linear(56, width))
        self.classes, self.boxes = nn.Linear(width, classes), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        memory = self.stem(x).flatten(2).transpose(1, 2)
        queries = self.queries.expand(len(x), -1, -1)
        read, _ = self.attention(queries, memory, memory, need_weights=False)
        out = self.norm(queries + read)
        out = out + self.feed(out)
        return {"classes": self.classes(out), "boxes": self.boxes(out)}


class EinsumAttention(nn.Module):
    """Heads as a dimension of the parameters, in einsum notation throughout."""

    def __init__(self, width: int, heads: int, size: int):
        super().__init__()
        self.query, self.key, self.value = (
            nn.Parameter(torch.randn(width, heads, size) / math.sqrt(width)) for _ in range(3)
        )
        self.out = nn.Parameter(torch.randn(heads, size, width) / math.sqrt(heads * size))
        self.scale = size**-0.5

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (torch.einsum("btd,dhe->bhte", x, part) for part in (self.query, self.key, self.value))
        weights = (torch.einsum("bhte,bhse->bhts", query, key) * self.scale).softmax(-1)
        return torch.einsum("bhts,bhse,hed->btd", weights, value, self.out)


class EinsumVit(nn.Module):
    """A vision transformer (Dosovitskiy et al., 2021) around `EinsumAttention`, patches cut by reshaping."""

    def __init__(self, width: int = 48, heads: int = 3, size: int = 12, depth: int = 2, patch: int = 4, side: int = 16):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(3 * patch**2, width)
        self.start = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width) / 2)
        self.attention = nn.ModuleList(EinsumAttention(width, heads, size) for _ in range(depth))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 80), nn.GELU(), nn.Linear(80, width)) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        p = self.patch
        x = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        x = self.embed(x.reshape(batch, -1, channels * p * p))
        x = torch.cat((self.start.expand(batch, -1, -1), x), dim=1) + self.positions
        for i, (attention, feed) in enumerate(zip(self.attention, self.feed, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + feed(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x)[:, 0])


class CausalAttention(nn.Module):
    """One projection for queries, keys and values, split by a width and viewed by a number of heads kept in Python."""

    def __init__(self, width: int, heads: int, longest: int):
        super().__init__()
        self.width, self.heads = width, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("causal", torch.ones(longest, longest).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        d = self.width // self.heads
        q, k, v = (part.view(b, t, self.heads, d).transpose(1, 2) for part in self.qkv(x).split(self.width, dim=2))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(d)
        weights = scores.masked_fill(~self.causal[:t, :t], float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).contiguous().view(b, t, self.width))


class Gpt(nn.Module):
    """A small GPT-2 with the head tied to the embedding."""

    def __init__(self, words: int = 50, width: int = 48, heads: int = 4, depth: int = 2, longest: int = 16):
        super().__init__()
        self.embed, self.positions = nn.Embedding(words, width), nn.Embedding(longest, width)
        self.attention = nn.ModuleList(CausalAttention(width, heads, longest) for _ in range(depth))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width)) for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for i, (attention, feed) in enumerate(zip(self.attention, self.feed, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + feed(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


class SwiGlu(nn.Module):
    """Gate and value from one projection (Shazeer, 2020)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.enter, self.leave = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.enter(x).chunk(2, dim=-1)
        return self.leave(F.silu(gate) * value)


class Mixer(nn.Module):
    """An MLP-Mixer (Tolstikhin et al., 2021) with SwiGLU layers over tokens and over channels."""

    def __init__(self, width: int = 40, tokens: int = 16, depth: int = 2, classes: int = 10):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.over_tokens = nn.ModuleList(SwiGlu(tokens, 20) for _ in range(depth))
        self.over_channels = nn.ModuleList(SwiGlu(width, 64) for _ in range(depth))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for i, (tokens, channels) in enumerate(zip(self.over_tokens, self.over_channels, strict=True)):
            x = x + tokens(self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * i + 1](x))
        return self.head(x.mean(1))
