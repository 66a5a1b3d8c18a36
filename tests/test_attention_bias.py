"""A bias of attention scores that is passed as a mask belongs to the heads: it shrinks with them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.protocols import Pruning
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import Slicer

HEADS, SIZE, TOKENS = 4, 6, 5


class Attention(nn.Module):
    """Self-attention with a bias of each head, a table by distance, zeros by the number of heads, slopes, or none."""

    def __init__(self, bias):
        super().__init__()
        self.heads, self.bias = HEADS, bias
        self.q, self.k, self.v = (nn.Linear(10, HEADS * SIZE) for _ in range(3))
        self.o = nn.Linear(HEADS * SIZE, 10)
        self.table = nn.Embedding(TOKENS, HEADS)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
        places = torch.arange(TOKENS)
        mask = torch.zeros(1, 1, TOKENS, TOKENS)
        if self.bias == "table":
            mask = self.table((places[:, None] - places).abs()).permute(2, 0, 1)[None]
        elif self.bias == "zeros":
            mask = torch.zeros(1, self.heads, TOKENS, TOKENS)
        elif self.bias == "fixed":
            mask = torch.arange(4.0)[:, None, None] * -(places[:, None] - places).abs().float()
            mask = mask[None]
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def network(bias):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 10), Attention(bias), nn.Linear(10, 2)).eval()


@pytest.mark.parametrize("bias", ["table", "zeros", "none"])
@torch.no_grad()
def test_heads_go_with_their_bias(bias):
    model, x = network(bias), torch.randn(2, TOKENS, 3)
    structure = analyse(Example(model, (x,)))
    (group,) = [group for group in structure.groups if group.size == HEADS]
    small = Slicer(model).cut(structure.edit(Pruning({group.name: (0, 2)})))
    assert small[1].q.out_features == (HEADS - 2) * SIZE
    masked = network(bias)
    for head in (1, 3):
        masked[1].o.weight[:, head * SIZE : (head + 1) * SIZE] = 0
    torch.testing.assert_close(small(x), masked(x))
    assert small[1].table.embedding_dim == (2 if bias == "table" else HEADS)


def test_a_bias_of_each_head_that_code_fixes_keeps_the_heads():
    structure = analyse(Example(network("fixed"), (torch.randn(2, TOKENS, 3),)))
    assert not [group for group in structure.groups if group.size == HEADS]
    assert any(part.tensor == "1.q.weight" for part in structure.frozen)
