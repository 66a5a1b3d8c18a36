"""Detectors: a pyramid with dense heads that predict without anchors, and single-shot boxes on several scales."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.mobile import conv_bn


class Cbs(nn.Sequential):
    """Convolution, batch norm, SiLU: what the detectors of the YOLO family are made of."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.SiLU(inplace=True))


class C2f(nn.Module):
    """Splits its channels in two, and joins both halves and the outcome of every bottleneck (YOLOv8)."""

    def __init__(self, inputs: int, outputs: int, depth: int = 1, shortcut: bool = True):
        super().__init__()
        self.hidden, self.shortcut = outputs // 2, shortcut
        self.enter = Cbs(inputs, 2 * self.hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(Cbs(self.hidden, self.hidden, 3), Cbs(self.hidden, self.hidden, 3)) for _ in range(depth)
        )
        self.leave = Cbs((2 + depth) * self.hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).split((self.hidden, self.hidden), dim=1))
        for block in self.blocks:
            last = parts[-1]
            parts.append(last + block(last) if self.shortcut else block(last))
        return self.leave(torch.cat(parts, dim=1))


class Sppf(nn.Module):
    """Pools one map again and again, and joins what every pooling gave (YOLOv5)."""

    def __init__(self, width: int):
        super().__init__()
        self.enter, self.leave = Cbs(width, width // 2), Cbs(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, stride=1, padding=2))
        return self.leave(torch.cat(parts, dim=1))


class DenseHead(nn.Module):
    """Boxes as distributions over distances, and class scores, for all cells of all scales in one tensor."""

    def __init__(self, widths: tuple[int, ...], classes: int, bins: int = 4):
        super().__init__()
        self.classes, self.bins = classes, bins
        self.boxes = nn.ModuleList(nn.Sequential(Cbs(w, 16, 3), nn.Conv2d(16, 4 * bins, 1)) for w in widths)
        self.scores = nn.ModuleList(nn.Sequential(Cbs(w, 20, 3), nn.Conv2d(20, classes, 1)) for w in widths)
        self.register_buffer("distances", torch.arange(float(bins)))

    def forward(self, maps: list[Tensor]) -> Tensor:
        rows = [
            torch.cat((boxes(x), scores(x)), dim=1).view(len(x), 4 * self.bins + self.classes, -1)
            for x, boxes, scores in zip(maps, self.boxes, self.scores, strict=True)
        ]
        boxes, scores = torch.cat(rows, dim=2).split((4 * self.bins, self.classes), dim=1)
        weights = boxes.view(len(boxes), 4, self.bins, -1).softmax(dim=2)
        sides = torch.einsum("bskn,k->bsn", weights, self.distances)
        return torch.cat((sides, scores.sigmoid()), dim=1)


class Yolo(nn.Module):
    """Backbone, pyramid down and up, and a dense head on three scales, in the arrangement of YOLOv8."""

    def __init__(self, width: int = 8, classes: int = 5):
        super().__init__()
        w1, w2, w3, w4 = (width * 2**i for i in range(4))
        self.stem = nn.Sequential(Cbs(3, w1, 3, 2), Cbs(w1, w2, 3, 2), C2f(w2, w2))
        self.middle = nn.Sequential(Cbs(w2, w3, 3, 2), C2f(w3, w3, depth=2))
        self.deep = nn.Sequential(Cbs(w3, w4, 3, 2), C2f(w4, w4), Sppf(w4))
        self.down_middle = C2f(w4 + w3, w3, shortcut=False)
        self.down_fine = C2f(w3 + w2, w2, shortcut=False)
        self.shrink_fine, self.up_middle = Cbs(w2, w2, 3, 2), C2f(w2 + w3, w3, shortcut=False)
        self.shrink_middle, self.up_deep = Cbs(w3, w3, 3, 2), C2f(w3 + w4, w4, shortcut=False)
        self.head = DenseHead((w2, w3, w4), classes)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        middle = self.middle(fine)
        deep = self.deep(middle)
        middle = self.down_middle(torch.cat((F.interpolate(deep, scale_factor=2.0), middle), dim=1))
        fine = self.down_fine(torch.cat((F.interpolate(middle, scale_factor=2.0), fine), dim=1))
        middle = self.up_middle(torch.cat((self.shrink_fine(fine), middle), dim=1))
        deep = self.up_deep(torch.cat((self.shrink_middle(middle), deep), dim=1))
        return self.head([fine, middle, deep])


class Ssd(nn.Module):
    """Boxes and scores from maps of falling size, rows of one long table (Liu et al., 2016)."""

    def __init__(self, width: int = 12, classes: int = 4, anchors: int = 3):
        super().__init__()
        self.classes = classes
        self.stem = nn.Sequential(conv_bn(3, width, 3), nn.MaxPool2d(2), conv_bn(width, 2 * width, 3), nn.MaxPool2d(2))
        self.gain = nn.Parameter(torch.full((2 * width,), 2.0))  # of the normalised first map, as in the paper
        self.stages = nn.ModuleList(
            nn.Sequential(conv_bn(2 * width, width), conv_bn(width, 2 * width, 3, stride=2)) for _ in range(2)
        )
        self.boxes = nn.ModuleList(nn.Conv2d(2 * width, 4 * anchors, 3, padding=1) for _ in range(3))
        self.scores = nn.ModuleList(nn.Conv2d(2 * width, classes * anchors, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        maps = [F.normalize(x, dim=1) * self.gain.view(1, -1, 1, 1)]
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        boxes = [head(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for head, x in zip(self.boxes, maps, strict=True)]
        scores = [
            head(x).permute(0, 2, 3, 1).reshape(len(x), -1, self.classes)
            for head, x in zip(self.scores, maps, strict=True)
        ]
        return torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
