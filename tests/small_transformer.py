"""A transformer whose number of heads Python holds in a form of choice."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

HEADS = 4
WIDTH = 32
TOKENS = (9, 6)


@dataclass(frozen=True)
class Sizes:
    heads: int
    inner: dict[str, Any]


class Attention(nn.Module):
    """Self-attention; `tied` writes ``reshape(B, N, C)``, otherwise sizes come from where `held` puts them."""

    def __init__(self, held: str) -> None:
        super().__init__()
        self.held = held
        self.heads = HEADS if held in ("plain", "tied") else None
        self.shape = (1, HEADS, WIDTH // HEADS)
        self.listed = [3, HEADS]
        self.record = Sizes(HEADS, {"deep": {"heads": HEADS}})
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def number(self) -> int:
        places = {
            "tuple": lambda: self.shape[1],
            "list": lambda: self.listed[1],
            "dataclass": lambda: self.record.heads,
            "nested": lambda: self.record.inner["deep"]["heads"],
        }
        return self.heads or places[self.held]()

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        size = C // self.number() if self.held == "tied" else WIDTH // HEADS
        q, k, v = self.qkv(x).reshape(B, N, 3, self.number(), size).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) * size**-0.5).softmax(-1) @ v
        out: Tensor = self.proj(y.transpose(1, 2).reshape(B, N, C if self.held == "tied" else -1))
        return out


class Block(nn.Module):
    def __init__(self, held: str) -> None:
        super().__init__()
        self.n1, self.attention, self.n2 = nn.LayerNorm(WIDTH), Attention(held), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.down(self.up(self.n2(x)).relu())


def transformer(held: str, blocks: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(6, WIDTH), *[Block(held) for _ in range(blocks)], nn.Linear(WIDTH, 5))
