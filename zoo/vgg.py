"""VGG (Simonyan and Zisserman, 2015) with and without batch norm, an MLP, nets in one and three dimensions."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


def vgg(
    widths: tuple[int | str, ...] = (16, "pool", 24, 24, "pool", 32, 32, "pool"),
    hidden: int = 48,
    classes: int = 10,
    channels: int = 3,
    size: int = 16,
    batch_norm: bool = True,
) -> nn.Module:
    """Convolutions, then linear layers over the flattened map of a `size` x `size` image."""
    layers: list[nn.Module] = []
    for width in widths:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
            size //= 2
            continue
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU(inplace=True))
        channels = width
    head = (nn.Linear(channels * size**2, hidden), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(hidden, classes))
    return nn.Sequential(*layers, nn.Flatten(), *head)


def mlp(widths: tuple[int, ...] = (64, 48, 32, 24), classes: int = 10) -> nn.Module:
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.BatchNorm1d(narrow), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


class DilatedNet(nn.Module):
    """Residual stack of gated, dilated convolutions over a sequence (van den Oord et al., 2016: WaveNet)."""

    def __init__(self, channels: int = 4, width: int = 16, classes: int = 6, dilations: tuple[int, ...] = (1, 2, 4)):
        super().__init__()
        self.stem = nn.Conv1d(channels, width, 3, padding=1)
        self.filters = nn.ModuleList(nn.Conv1d(width, width, 3, padding=d, dilation=d) for d in dilations)
        self.gates = nn.ModuleList(nn.Conv1d(width, width, 3, padding=d, dilation=d) for d in dilations)
        self.mixers = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in dilations)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in dilations)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, gate, mixer, norm in zip(self.filters, self.gates, self.mixers, self.norms, strict=True):
            x = x + norm(mixer(conv(x).tanh() * gate(x).sigmoid()))
        return self.head(F.relu(x).amax(2))


def volume_net(channels: int = 1, widths: tuple[int, ...] = (8, 12, 16), classes: int = 4) -> nn.Module:
    """Three-dimensional convolutions over a volume."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv3d(channels, width, 3, padding=1, bias=False), nn.BatchNorm3d(width), nn.ReLU()]
        layers.append(nn.MaxPool3d(2))
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(channels, classes))
