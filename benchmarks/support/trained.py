"""Small networks trained on digits, clean or hard, that the benchmarks prune; kept in ``runs/trained``.

Clean digits end near 99 % whatever is pruned. The hard variant is made to spread: few originals, each drawn several
times with another rotation, size, place, colour of ink and paper, and with noise.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import mobilenet_v2, preactivation_resnet, resnet, vgg

FOLDER = Path("runs") / "trained"
Part = tuple[Tensor, Tensor]
SIZE = 16
ORIGINALS = {"train": 800, "validation": 400, "test": 597}
COPIES = {"train": 3, "validation": 2, "test": 2}
NOISE = 0.2
BATCH = 64

_SMALL_V2 = ((1, 8, 1, 1), (4, 12, 2, 2), (4, 20, 2, 2), (4, 32, 2, 2))
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": partial(resnet, 20, width=8),
    "mobilenet_v2": partial(mobilenet_v2, _SMALL_V2, stem=8, head=96),
    "vgg": vgg,
}
"""A deep residual network, a compact one of depthwise convolutions, and a plain one; for 16x16 images in colour."""

_V2 = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 2, 2))
WIDE_SIZE = 32
WIDE: dict[str, Callable[[], nn.Module]] = {
    "resnet20_wide": partial(resnet, 20, width=16),
    "preactivation_resnet38_wide": partial(preactivation_resnet, 38, width=16),
    "mobilenet_v2_wide": partial(mobilenet_v2, _V2, stem=16, head=192),
}
"""Wide enough that channels, more than calls, take the time; for 32x32 images in colour."""


@dataclass(frozen=True)
class Trained:
    """A network with its data.

    Attributes:
        model: In evaluation mode.
        data: Images (n, 3, size, size) and labels (n,) of ``"train"``, ``"validation"`` and ``"test"``.
        name: Network, variant of the data and seed.
    """

    model: nn.Module
    data: dict[str, Part]
    name: str


def digits(seed: int, hard: bool, size: int = SIZE) -> dict[str, Part]:
    """Digits of size x size pixels in three channels, in three parts whose originals never mix."""
    images, labels = load_digits(return_X_y=True)
    y = torch.tensor(labels)
    x = F.interpolate(torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, size, mode="bilinear")
    fit, rest = train_test_split(np.arange(len(y)), train_size=ORIGINALS["train"], random_state=seed, stratify=labels)
    check, test = train_test_split(rest, train_size=ORIGINALS["validation"], random_state=seed, stratify=labels[rest])
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, originals in (("train", fit), ("validation", check), ("test", test)):
        own = np.tile(originals, COPIES[name]) if hard else originals
        parts[name] = (_disturbed(x[own], generator) if hard else x[own].expand(-1, 3, -1, -1).clone(), y[own])
    return parts


def _disturbed(x: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, resize, move and colour images (n, 1, h, w), and add noise; shape (n, 3, h, w)."""

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(x), *shape, generator=generator)

    angle, scale, move = draw(-0.5, 0.5), draw(0.8, 1.4), draw(-0.25, 0.25, 2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)]
    moved = F.grid_sample(x, F.affine_grid(torch.stack(rows, 1), list(x.shape), False), align_corners=False)
    ink, paper = draw(0.5, 1.0, 3, 1, 1), draw(0.0, 0.3, 3, 1, 1)
    coloured = moved * ink + (1 - moved) * paper
    return coloured + NOISE * torch.randn(coloured.shape, generator=generator)


def train(model: nn.Module, data: Part, epochs: float, lr: float, seed: int = 0) -> None:
    """Cross-entropy training with AdamW and one cycle of the learning rate; in place."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    steps = max(int(epochs * len(y) / BATCH), 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    order: list[Tensor] = []
    for _ in range(steps):
        order = order or list(torch.randperm(len(y), generator=generator).split(BATCH))[: len(y) // BATCH]
        batch = order.pop()
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def score(model: nn.Module, data: Part) -> tuple[float, float]:
    """Accuracy and loss in nats."""
    outputs = torch.cat([model.eval()(batch) for batch in data[0].split(256)])
    return (outputs.argmax(1) == data[1]).float().mean().item(), F.cross_entropy(outputs, data[1]).item()


def trained(network: str, seed: int, hard: bool = True, epochs: float = 12, lr: float = 0.01) -> Trained:
    """A network trained on its data, from ``runs/trained`` if this very code has trained it before."""
    data = digits(seed, hard, WIDE_SIZE if network in WIDE else SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {**NETWORKS, **WIDE}[network]()
        code = inspect.getsource(inspect.getmodule(digits)) + repr(model) + f"{network} {seed} {hard} {epochs} {lr}"
        path = (
            FOLDER / f"{network}-{'hard' if hard else 'clean'}-{seed}-{hashlib.sha1(code.encode()).hexdigest()[:8]}.pt"
        )
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            train(model, data["train"], epochs, lr, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
    return Trained(model.eval(), data, f"{network} on {'hard' if hard else 'clean'} digits, seed {seed}")
