"""Networks with depthwise convolutions: MobileNet V1, V2 and V3, ShuffleNet V2."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = tuple[tuple[int, int, int, int], ...]


def conv_bn(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: type = nn.ReLU
) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act())


def mobilenet_v1(widths: tuple[int, ...] = (8, 16, 16, 32, 32, 48), classes: int = 10) -> nn.Module:
    """Depthwise separable convolutions (Howard et al., 2017), halving the map at every second one."""
    layers = [conv_bn(3, widths[0], 3)]
    for i, (narrow, wide) in enumerate(pairwise(widths)):
        layers += [conv_bn(narrow, narrow, 3, stride=1 + i % 2, groups=narrow), conv_bn(narrow, wide)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate computed from all channels' means (Hu et al., 2018)."""

    def __init__(self, width: int, reduction: int = 4):
        super().__init__()
        self.squeeze = nn.Conv2d(width, width // reduction, 1)
        self.excite = nn.Conv2d(width // reduction, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))


class InvertedResidual(nn.Module):
    """Expand, filter by depth, project linearly (Sandler et al., 2018); optionally with squeeze-excite."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        expansion: int,
        kernel: int = 3,
        act: type = nn.ReLU6,
        excite: bool = False,
    ):
        super().__init__()
        inner = inputs * expansion
        layers = [] if expansion == 1 else [conv_bn(inputs, inner, act=act)]
        layers.append(conv_bn(inner, inner, kernel, stride, groups=inner, act=act))
        if excite:
            layers.append(SqueezeExcite(inner))
        layers.append(conv_bn(inner, outputs, act=nn.Identity))
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(
    rows: Rows = MOBILENET_V2, width: float = 1.0, stem: int = 32, head: int = 1280, classes: int = 10
) -> nn.Module:
    """MobileNet V2 in the strides usual at 32x32 inputs.

    Args:
        rows: Expansion, output channels, blocks and first stride of each stage; the default is the published network.
        width: Factor on all channel counts but the head's.
        stem: Channels of the first convolution.
        head: Channels of the last convolution.
        classes: Number of classes.
    """
    inputs = int(stem * width)
    layers = [conv_bn(3, inputs, 3, act=nn.ReLU6)]
    for expansion, channels, blocks, stride in rows:
        outputs = int(channels * width)
        for i in range(blocks):
            layers.append(InvertedResidual(inputs, outputs, 1 if i else stride, expansion))
            inputs = outputs
    layers.append(conv_bn(inputs, head, act=nn.ReLU6))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(head, classes))


def mobilenet_v3(classes: int = 10) -> nn.Module:
    """Hard swish, squeeze-excite and 5x5 kernels (Howard et al., 2019)."""
    return nn.Sequential(
        conv_bn(3, 8, 3, act=nn.Hardswish),
        InvertedResidual(8, 8, 1, expansion=1, act=nn.ReLU, excite=True),
        InvertedResidual(8, 16, 2, expansion=3, act=nn.ReLU),
        InvertedResidual(16, 16, 1, expansion=4, kernel=5, act=nn.Hardswish, excite=True),
        InvertedResidual(16, 24, 2, expansion=4, kernel=5, act=nn.Hardswish, excite=True),
        conv_bn(24, 64, act=nn.Hardswish),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 48),
        nn.Hardswish(),
        nn.Linear(48, classes),
    )


class ShuffleUnit(nn.Module):
    """Half the channels pass, half are filtered, all are shuffled (Ma et al., 2018); stride 2 filters both halves."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        half = outputs // 2
        entering = inputs if stride == 2 else inputs // 2
        self.main = nn.Sequential(
            conv_bn(entering, half), conv_bn(half, half, 3, stride, groups=half, act=nn.Identity), conv_bn(half, half)
        )
        self.side = None
        if stride == 2:
            depthwise = conv_bn(entering, entering, 3, 2, groups=entering, act=nn.Identity)
            self.side = nn.Sequential(depthwise, conv_bn(entering, half))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.side is None else (self.side(x), x)
        x = torch.cat((left, self.main(right)), dim=1)
        batch, channels, height, width = x.shape
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def shufflenet_v2(widths: tuple[int, ...] = (12, 16, 32), head: int = 48, classes: int = 10) -> nn.Module:
    layers = [conv_bn(3, widths[0], 3)]
    for narrow, wide in pairwise(widths):
        layers += [ShuffleUnit(narrow, wide, 2), ShuffleUnit(wide, wide, 1), ShuffleUnit(wide, wide, 1)]
    layers.append(conv_bn(widths[-1], head))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, classes))
