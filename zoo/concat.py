"""Networks that concatenate channels: DenseNet, an Inception net, U-Net."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.mobile import conv_bn


class DenseLayer(nn.Module):
    """Appends `growth` new channels to those it reads."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat((x, new), dim=1)


def densenet(growth: int = 8, blocks: tuple[int, ...] = (3, 3, 3), classes: int = 10) -> nn.Module:
    """DenseNet-BC (Huang et al., 2017): transitions halve the channels and the map between dense blocks."""
    width = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
    for i, depth in enumerate(blocks):
        if i:
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
        for _ in range(depth):
            layers.append(DenseLayer(width, growth))
            width += growth
    layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return nn.Sequential(*layers)


class InceptionBlock(nn.Module):
    """Four parallel branches, concatenated (Szegedy et al., 2015)."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.point = conv_bn(inputs, width)
        self.small = nn.Sequential(conv_bn(inputs, width), conv_bn(width, 2 * width, 3))
        self.large = nn.Sequential(conv_bn(inputs, width // 2), conv_bn(width // 2, width, 5))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_bn(inputs, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.point(x), self.small(x), self.large(x), self.pooled(x)], dim=1)


def inception(width: int = 8, classes: int = 10) -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 2 * width, 3),
        InceptionBlock(2 * width, width),
        nn.MaxPool2d(2),
        InceptionBlock(5 * width, width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5 * width, classes),
    )


def double(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(conv_bn(inputs, outputs, 3), conv_bn(outputs, outputs, 3))


class UNet(nn.Module):
    """Encoder, decoder and skips between them (Ronneberger et al., 2015); the output is a map of classes."""

    def __init__(self, width: int = 8, depth: int = 2, classes: int = 3):
        super().__init__()
        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(double(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(double(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for block in self.down:
            x = block(F.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips[:-1]), strict=True):
            x = merge(torch.cat((skip, up(x)), dim=1))
        return self.head(x)
