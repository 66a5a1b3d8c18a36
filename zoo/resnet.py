"""Residual networks in their CIFAR shapes: basic, bottleneck and pre-activation blocks, ResNeXt, GroupNorm."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
Block = Callable[[int, int, int], nn.Module]  # input channels, output channels, stride


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size of the map at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)


class Padded(nn.Module):
    """The parameter-free shortcut (option A): every `stride`-th pixel, zeros as the missing channels."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def shortcut(inputs: int, outputs: int, stride: int, norm: Norm = nn.BatchNorm2d, pad: bool = False) -> nn.Module:
    """The identity where the shape allows it, else a projection (option B) or zero padding (option A)."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    if pad:
        return Padded(inputs, outputs, stride)
    return nn.Sequential(conv(inputs, outputs, 1, stride), norm(outputs))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm = nn.BatchNorm2d, pad: bool = False):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), norm(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), norm(outputs)
        self.shortcut = shortcut(inputs, outputs, stride, norm, pad)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; with `groups` above 1 the block of ResNeXt (Xie et al., 2017)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4, groups: int = 1):
        super().__init__()
        inner = outputs // expansion
        self.conv1, self.bn1 = conv(inputs, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride, groups), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = shortcut(inputs, outputs, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        y += self.shortcut(x)
        return self.relu(y)


class PreActivation(nn.Module):
    """Norm and activation before each convolution (He et al., 2016b); projections read the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.projection = None if same else conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        skip = x if self.projection is None else self.projection(active)
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + skip


class ResNet(nn.Module):
    """A stem, three stages that double the width and halve the map, pooling and a classifier."""

    def __init__(
        self, block: Block, blocks: int, stem: nn.Module, widths: tuple[int, ...], last: nn.Module, classes: int
    ):
        super().__init__()
        self.stem = stem
        stages, inputs = [], widths[0]
        for i, width in enumerate(widths[1:]):
            strides = [1 if i == 0 else 2] + [1] * (blocks - 1)
            stages.append(nn.Sequential(*(block(width if j else inputs, width, s) for j, s in enumerate(strides))))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.last = last
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.last(self.stages(self.stem(x))), 1).flatten(1))


def blocks_in(depth: int, layers: int = 2) -> int:
    """Blocks a stage in a network of three stages whose blocks have `layers` convolutions each."""
    blocks, rest = divmod(depth - 2, 3 * layers)
    if blocks < 1 or rest:
        raise ValueError(f"depth must be {3 * layers} n + 2 with n >= 1, got {depth}")
    return blocks


def resnet(
    depth: int,
    width: int = 16,
    classes: int = 10,
    channels: int = 3,
    pad: bool = False,
    norm: Norm = nn.BatchNorm2d,
) -> nn.Module:
    """The CIFAR ResNet (He et al., 2016a) of `depth` 6n + 2; `pad` chooses zero-padded shortcuts (option A)."""
    widths = (width, width, 2 * width, 4 * width)
    stem = nn.Sequential(conv(channels, width), norm(width), nn.ReLU())
    return ResNet(partial(BasicBlock, norm=norm, pad=pad), blocks_in(depth), stem, widths, nn.Identity(), classes)


def bottleneck_resnet(
    depth: int = 20, width: int = 8, classes: int = 10, groups: int = 1, expansion: int = 4
) -> nn.Module:
    """`depth` is 9n + 2, `width` that of the first stage's 3x3 convolutions; `groups` above 1 makes a ResNeXt."""
    widths = tuple(width * expansion * scale for scale in (1, 2, 4))
    stem = nn.Sequential(conv(3, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    block = partial(Bottleneck, expansion=expansion, groups=groups)
    return ResNet(block, blocks_in(depth, 3), stem, (width, *widths), nn.Identity(), classes)


def preactivation_resnet(depth: int = 14, width: int = 12, classes: int = 10) -> nn.Module:
    widths = (width, width, 2 * width, 4 * width)
    last = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
    return ResNet(PreActivation, blocks_in(depth), conv(3, width), widths, last, classes)
