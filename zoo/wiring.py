"""Networks with unusual wiring: shared modules, tied weights, several inputs, a dictionary as output."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.mobile import conv_bn


class SharedNet(nn.Module):
    """Calls one residual block twice, so that both calls must lose the same channels."""

    def __init__(self, width: int = 16, inner: int = 24, classes: int = 10):
        super().__init__()
        self.stem = conv_bn(3, width, 3)
        self.block = nn.Sequential(conv_bn(width, inner, 3), conv_bn(inner, width, 3, act=nn.Identity))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = F.relu(x + self.block(x))
        return self.head(x.mean((2, 3)))


class TiedNet(nn.Module):
    """Two convolutions own one weight but have their own biases and norms."""

    def __init__(self, width: int = 16, classes: int = 10):
        super().__init__()
        self.stem = conv_bn(3, width, 3)
        self.first, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second.weight = self.first.weight
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(self.stem(x))))
        return self.head(F.relu(self.norm2(self.second(x))).mean((2, 3)))


class TiedAutoencoder(nn.Module):
    """The decoder's transposed convolutions own the encoder's weights."""

    def __init__(self, widths: tuple[int, ...] = (3, 12, 16)):
        super().__init__()
        pairs = list(pairwise(widths))
        self.encoder = nn.ModuleList(nn.Conv2d(i, o, 2, stride=2) for i, o in pairs)
        self.decoder = nn.ModuleList(nn.ConvTranspose2d(o, i, 2, stride=2) for i, o in reversed(pairs))
        for down, up in zip(self.encoder, reversed(self.decoder), strict=True):
            up.weight = down.weight

    def forward(self, x: Tensor) -> Tensor:
        for down in self.encoder:
            x = F.relu(down(x))
        for up in self.decoder[:-1]:
            x = F.relu(up(x))
        return self.decoder[-1](x)


class TwoInputs(nn.Module):
    """An image and a vector of attributes: the vector gates the image's features and joins them at the end."""

    def __init__(self, width: int = 16, attributes: int = 6, classes: int = 5):
        super().__init__()
        self.image = nn.Sequential(conv_bn(3, width, 3), nn.MaxPool2d(2), conv_bn(width, width, 3))
        self.vector = nn.Sequential(nn.Linear(attributes, 12), nn.ReLU())
        self.gate = nn.Linear(12, width)
        self.head = nn.Linear(width + 12, classes)

    def forward(self, image: Tensor, attributes: Tensor) -> Tensor:
        vector = self.vector(attributes)
        features = self.image(image).mean((2, 3)) * torch.sigmoid(self.gate(vector))
        return self.head(torch.cat((features, vector), dim=1))


class Detector(nn.Module):
    """A backbone with two scales and two heads each; the output is a dictionary."""

    def __init__(self, width: int = 12, classes: int = 4):
        super().__init__()
        self.fine = nn.Sequential(conv_bn(3, width, 3), conv_bn(width, width, 3, stride=2))
        self.coarse = conv_bn(width, 2 * width, 3, stride=2)
        self.lateral = nn.Conv2d(2 * width, width, 1)
        self.classes = nn.Sequential(conv_bn(width, width, 3), nn.Conv2d(width, classes, 1))
        self.boxes = nn.Sequential(conv_bn(width, width, 3), nn.Conv2d(width, 4, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        fine = self.fine(x)
        coarse = self.lateral(self.coarse(fine))
        merged = fine + F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        return {"scores": [self.classes(merged), self.classes(coarse)], "boxes": self.boxes(merged)}
