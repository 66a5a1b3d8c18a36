"""A model in half precision has the removable units that it has in float32, and the networks built of it run."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from tests.candidates import random_pruning
from tests.small_networks import Net, conv

WIDTH = 24
HEAD = 6
INNER = 512  # so much that training is followed even where it would keep the heads


class Attention(nn.Module):
    """Attention of 4 heads with `groups` heads of keys, which are appended to a cache that each call makes empty."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, groups * HEAD), nn.Linear(WIDTH, groups * HEAD)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        empty = torch.tensor([], dtype=k.dtype, device=k.device)
        k, v = torch.cat([empty, k], dim=-2), torch.cat([empty, v], dim=-2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def block(s: Net, x: Tensor) -> Tensor:
    x = s.stem(x)
    x = x + s.attention(s.norm(x))
    return s.head(x + s.down(F.silu(s.up(x))))


def transformer(groups: int) -> nn.Module:
    parts = {"stem": nn.Linear(5, WIDTH), "norm": nn.LayerNorm(WIDTH), "attention": Attention(groups)}
    return Net(block, **parts, up=nn.Linear(WIDTH, INNER), down=nn.Linear(INNER, WIDTH), head=nn.Linear(WIDTH, 3))


def residual(s: Net, x: Tensor) -> Tensor:
    x = s.stem(x).relu()
    return s.head((x + s.b(s.norm(s.a(x)).relu())).mean((2, 3)))


def convolutions() -> nn.Module:
    inner = {"a": conv(8, 6), "norm": nn.BatchNorm2d(6), "b": conv(6, 8, padding=2)}
    return Net(residual, stem=conv(3, 8), **inner, head=nn.Linear(8, 4))


MODELS = {
    "heads": (lambda: transformer(4), (2, 7, 5), {"stem": WIDTH, "attention.q": 4, "up": INNER}),
    "groups_of_heads": (lambda: transformer(2), (2, 7, 5), {"stem": WIDTH, "attention.q": 2, "up": INNER}),
    "convolutions": (convolutions, (2, 3, 8, 8), {"stem": 8, "a": 6}),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_the_units_and_the_built_networks_are_those_of_float32(name: str, precision: str):
    make, shape, units = MODELS[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
            return model(x)

    def built(structure: Structure) -> nn.Module:
        return structure.build(model, random_pruning(structure, np.random.default_rng(1)))

    with torch.no_grad():
        expected = built(analyse(Example(model, (x,))))(x)
        model, x = model.to(dtype), x.to(dtype)
        structure = analyse(Example(model, (x,), forward=forward))
        found = forward(built(structure), x)
    assert {group.name: group.size for group in structure.groups} == units
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
