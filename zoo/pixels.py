"""Networks with an image or a map as output: segmentation and super-resolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.concat import double
from zoo.mobile import conv_bn


class Aspp(nn.Module):
    """Dilated convolutions of several rates and the mean of the image, side by side (DeepLabv3)."""

    def __init__(self, inputs: int, outputs: int, rates: tuple[int, ...] = (2, 4)):
        super().__init__()
        self.branches = nn.ModuleList([conv_bn(inputs, outputs)])
        for rate in rates:
            conv = nn.Conv2d(inputs, outputs, 3, padding=rate, dilation=rate, bias=False)
            self.branches.append(nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU()))
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn(inputs, outputs))
        self.project = conv_bn((len(rates) + 2) * outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        mean = F.interpolate(self.pooled(x), size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*(branch(x) for branch in self.branches), mean], dim=1))


class DeepLab(nn.Module):
    """Encoder, ASPP, and a decoder that sees an early map again (Chen et al., 2018)."""

    def __init__(self, width: int = 12, classes: int = 4):
        super().__init__()
        self.early = nn.Sequential(conv_bn(3, width, 3, stride=2), conv_bn(width, width, 3))
        self.late = nn.Sequential(conv_bn(width, 2 * width, 3, stride=2), conv_bn(2 * width, 3 * width, 3))
        self.aspp = Aspp(3 * width, 2 * width)
        self.lateral = conv_bn(width, 8)
        self.decode = nn.Sequential(conv_bn(2 * width + 8, 2 * width, 3), nn.Conv2d(2 * width, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        early = self.early(x)
        late = F.interpolate(self.aspp(self.late(early)), size=early.shape[-2:], mode="bilinear", align_corners=False)
        scores = self.decode(torch.cat((late, self.lateral(early)), dim=1))
        return F.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)


class AttentionGate(nn.Module):
    """Scales a skip connection by where the decoder looks (Oktay et al., 2018)."""

    def __init__(self, skip: int, gate: int, inner: int):
        super().__init__()
        self.skip, self.gate = nn.Conv2d(skip, inner, 1), nn.Conv2d(gate, inner, 1)
        self.score = nn.Conv2d(inner, 1, 1)

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        return skip * torch.sigmoid(self.score(F.relu(self.skip(skip) + self.gate(gate))))


class AttentionUNet(nn.Module):
    """A U-Net whose skips pass attention gates."""

    def __init__(self, width: int = 8, classes: int = 3):
        super().__init__()
        self.fine, self.middle, self.deep = double(3, width), double(width, 2 * width), double(2 * width, 4 * width)
        self.up_middle, self.up_fine = (nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in (2 * width, width))
        self.gate_middle, self.gate_fine = (AttentionGate(w, w, w // 2) for w in (2 * width, width))
        self.merge_middle, self.merge_fine = double(4 * width, 2 * width), double(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        middle = self.middle(F.max_pool2d(fine, 2))
        up = self.up_middle(self.deep(F.max_pool2d(middle, 2)))
        x = self.merge_middle(torch.cat((self.gate_middle(middle, up), up), dim=1))
        up = self.up_fine(x)
        return self.head(self.merge_fine(torch.cat((self.gate_fine(fine, up), up), dim=1)))


class Edsr(nn.Module):
    """Residual super-resolution without norms, enlarged by a pixel shuffle (Lim et al., 2017)."""

    def __init__(self, width: int = 16, depth: int = 3, scale: int = 2):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.45, 0.44, 0.40]).view(1, 3, 1, 1))
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(depth)
        )
        self.body = nn.Conv2d(width, width, 3, padding=1)
        grow = nn.Conv2d(width, width * scale**2, 3, padding=1)
        self.tail = nn.Sequential(grow, nn.PixelShuffle(scale), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        start = features = self.head(x - self.mean)
        for block in self.blocks:
            features = features + 0.1 * block(features)
        return self.tail(start + self.body(features)) + self.mean


class DenseResidual(nn.Module):
    """Convolutions that each see the results of all before, around a scaled shortcut (Wang et al., 2018)."""

    def __init__(self, width: int, growth: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width + i * growth, growth, 3, padding=1) for i in range(4))
        self.last = nn.Conv2d(width + 4 * growth, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for conv in self.convs:
            features.append(F.leaky_relu(conv(torch.cat(features, dim=1)), 0.2))
        return x + 0.2 * self.last(torch.cat(features, dim=1))


class RealEsrgan(nn.Module):
    """The generator of Real-ESRGAN for a factor of two: unshuffled pixels, residuals in residuals, nearest growth."""

    def __init__(self, width: int = 16, growth: int = 8, depth: int = 2):
        super().__init__()
        self.first = nn.Conv2d(3 * 4, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(*(DenseResidual(width, growth) for _ in range(2))) for _ in range(depth)
        )
        self.body_end = nn.Conv2d(width, width, 3, padding=1)
        self.grow = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.last = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(width, 3, 3, 1, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        start = features = self.first(F.pixel_unshuffle(x, 2))
        for block in self.body:
            features = features + 0.2 * block(features)
        features = start + self.body_end(features)
        for grow in self.grow:
            features = F.leaky_relu(grow(F.interpolate(features, scale_factor=2.0, mode="nearest")), 0.2)
        return self.last(features)
