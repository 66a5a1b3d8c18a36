"""Networks with maps as output: segmentation, detection, depth, flow and pose."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.mobile import conv_bn


class Fcn(nn.Module):
    """Scores of three depths, raised by transposed convolutions and summed (Long et al., 2015)."""

    def __init__(self, width: int = 10, classes: int = 4):
        super().__init__()
        sizes = (3, width, 2 * width, 3 * width)
        self.stages = nn.ModuleList(conv_bn(i, o, 3, stride=2) for i, o in pairwise(sizes))
        self.scores = nn.ModuleList(nn.Conv2d(o, classes, 1) for o in sizes[1:])
        self.raise_ = nn.ModuleList(nn.ConvTranspose2d(classes, classes, 4, 2, 1, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        total = self.raise_[2](self.scores[2](maps[2]))
        total = self.raise_[1](total + self.scores[1](maps[1]))
        return self.raise_[0](total + self.scores[0](maps[0]))


class SegNet(nn.Module):
    """The places of the maxima are kept, and values put back there (Badrinarayanan et al., 2017)."""

    def __init__(self, width: int = 12, classes: int = 4):
        super().__init__()
        self.first, self.second = conv_bn(3, width, 3), conv_bn(width, 2 * width, 3)
        self.third, self.fourth = conv_bn(2 * width, width, 3), nn.Conv2d(width, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x, early = F.max_pool2d(self.first(x), 2, return_indices=True)
        x, late = F.max_pool2d(self.second(x), 2, return_indices=True)
        x = self.third(F.max_unpool2d(x, late, 2))
        return self.fourth(F.max_unpool2d(x, early, 2))


class PspNet(nn.Module):
    """Means over a pyramid of grids next to the map itself (Zhao et al., 2017)."""

    def __init__(self, width: int = 12, classes: int = 4):
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, width, 3, stride=2), conv_bn(width, 2 * width, 3))
        self.grids = (1, 2, 4)
        self.levels = nn.ModuleList(conv_bn(2 * width, 8) for _ in self.grids)
        self.head = nn.Sequential(conv_bn(2 * width + 24, 16, 3), nn.Conv2d(16, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        levels = [
            F.interpolate(level(F.adaptive_avg_pool2d(x, grid)), x.shape[-2:], mode="bilinear", align_corners=False)
            for grid, level in zip(self.grids, self.levels, strict=True)
        ]
        return self.head(torch.cat((x, *levels), dim=1))


class NestedUNet(nn.Module):
    """Every skip is a chain of nodes that read all nodes before them (Zhou et al., 2018)."""

    def __init__(self, width: int = 8, classes: int = 3):
        super().__init__()
        a, b, c = width, 2 * width, 3 * width
        self.n00, self.n10, self.n20 = conv_bn(3, a, 3), conv_bn(a, b, 3), conv_bn(b, c, 3)
        self.n01, self.n11, self.n02 = conv_bn(a + b, a, 3), conv_bn(b + c, b, 3), conv_bn(2 * a + b, a, 3)
        self.heads = nn.ModuleList(nn.Conv2d(a, classes, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        up = nn.functional.interpolate
        x00 = self.n00(x)
        x10 = self.n10(F.max_pool2d(x00, 2))
        x20 = self.n20(F.max_pool2d(x10, 2))
        x01 = self.n01(torch.cat((x00, up(x10, scale_factor=2.0)), 1))
        x11 = self.n11(torch.cat((x10, up(x20, scale_factor=2.0)), 1))
        x02 = self.n02(torch.cat((x00, x01, up(x11, scale_factor=2.0)), 1))
        return (self.heads[0](x01) + self.heads[1](x02)) / 2


class HighResolution(nn.Module):
    """Two resolutions side by side that add to each other, and joints as heat maps (after HRNet)."""

    def __init__(self, width: int = 10, joints: int = 4):
        super().__init__()
        self.stem = conv_bn(3, width, 3, stride=2)
        self.split = conv_bn(width, 2 * width, 3, stride=2)
        self.fine = nn.ModuleList(conv_bn(width, width, 3) for _ in range(2))
        self.coarse = nn.ModuleList(conv_bn(2 * width, 2 * width, 3) for _ in range(2))
        self.down = conv_bn(width, 2 * width, 3, stride=2)
        self.up = nn.ModuleList(conv_bn(2 * width, width) for _ in range(2))
        self.head = nn.Conv2d(width, joints, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        coarse = self.split(fine)
        for i in range(2):
            left, right = self.fine[i](fine), self.coarse[i](coarse)
            fine = left + F.interpolate(self.up[i](right), scale_factor=2.0)
            coarse = right + self.down(left) if i == 0 else right
        return self.head(fine)


class SharedHead(nn.Module):
    """One head reads every level of a feature pyramid, classes and boxes per anchor (after RetinaNet)."""

    def __init__(self, width: int = 12, anchors: int = 2, classes: int = 3):
        super().__init__()
        self.classes = classes
        sizes = (3, width, 2 * width, 3 * width)
        self.stages = nn.ModuleList(conv_bn(i, o, 3, stride=2) for i, o in pairwise(sizes))
        self.lateral = nn.ModuleList(nn.Conv2d(o, 16, 1) for o in sizes[1:])
        self.tower = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
        self.scores, self.boxes = nn.Conv2d(16, anchors * classes, 1), nn.Conv2d(16, anchors * 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        level, levels = self.lateral[2](maps[2]), []
        for i in (1, 0):
            levels.append(level)
            level = self.lateral[i](maps[i]) + F.interpolate(level, scale_factor=2.0)
        towers = [self.tower(each) for each in (*levels, level)]
        scores = [self.scores(t).permute(0, 2, 3, 1).reshape(len(t), -1, self.classes) for t in towers]
        boxes = [self.boxes(t).permute(0, 2, 3, 1).reshape(len(t), -1, 4) for t in towers]
        return torch.cat(scores, dim=1), torch.cat(boxes, dim=1)


class CentrePoints(nn.Module):
    """Heat map, sizes and offsets of objects from one map, in a dictionary (Zhou et al., 2019)."""

    def __init__(self, width: int = 12, classes: int = 3):
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, width, 3, stride=2), conv_bn(width, 2 * width, 3, stride=2))
        self.up = nn.Sequential(
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        counts = {"heat": classes, "size": 2, "offset": 2}
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Conv2d(width, 14, 3, padding=1), nn.ReLU(), nn.Conv2d(14, n, 1))
                for name, n in counts.items()
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.up(self.body(x))
        return {name: head(x) for name, head in self.heads.items()}


class Disparity(nn.Module):
    """Depth at several scales, each a sigmoid that the next scale reads (after Monodepth, Godard et al., 2017)."""

    def __init__(self, width: int = 10):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in ((3, width), (width, 2 * width)))
        self.up = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in ((2 * width, width), (width + 1, 8)))
        self.depth = nn.ModuleList(nn.Conv2d(i, 1, 3, padding=1) for i in (width, 8))

    def forward(self, x: Tensor) -> list[Tensor]:
        for conv in self.down:
            x = F.elu(conv(x))
        x = F.interpolate(F.elu(self.up[0](x)), scale_factor=2.0)
        coarse = torch.sigmoid(self.depth[0](x))
        x = F.interpolate(torch.cat((x, coarse), dim=1), scale_factor=2.0)
        return [coarse, torch.sigmoid(self.depth[1](F.elu(self.up[1](x))))]


class Correlation(nn.Module):
    """Flow from products of one image's features with shifted ones of the other (after PWC-Net)."""

    def __init__(self, width: int = 12, reach: int = 1):
        super().__init__()
        self.reach = reach
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.LeakyReLU(0.1), nn.Conv2d(width, width, 3, 2, 1))
        self.flow = nn.Sequential(
            nn.Conv2d((2 * reach + 1) ** 2 + width, 20, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(20, 2, 3, padding=1)
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.features(first), self.features(second)
        r, (height, breadth) = self.reach, a.shape[-2:]
        padded = F.pad(b, (r, r, r, r))
        shifts = [(i, j) for i in range(2 * r + 1) for j in range(2 * r + 1)]
        volume = [(a * padded[..., i : i + height, j : j + breadth]).sum(1, keepdim=True) for i, j in shifts]
        return self.flow(torch.cat((*volume, a), dim=1))


class TokenMaps(nn.Module):
    """Tokens of two depths put back into maps, fused and raised to a depth map (after DPT, Ranftl et al., 2021)."""

    def __init__(self, width: int = 24, patch: int = 4):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 36, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.maps = nn.ModuleList(nn.Conv2d(width, 12, 1) for _ in range(2))
        self.head = nn.Sequential(nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        height, breadth = x.shape[-2:]
        tokens, total = x.flatten(2).transpose(1, 2), 0
        for layer, to_map in zip(self.layers, self.maps, strict=True):
            tokens = layer(tokens)
            total = total + to_map(tokens.transpose(1, 2).unflatten(2, (height, breadth)))
        return self.head(F.interpolate(total, scale_factor=4.0, mode="bilinear", align_corners=False))


class MaskQueries(nn.Module):
    """Queries read a map and make a mask each by a product with it (after MaskFormer, Cheng et al., 2021)."""

    def __init__(self, width: int = 24, queries: int = 5, classes: int = 4):
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 12, 3, stride=2), conv_bn(12, width, 3, stride=2))
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.decode = nn.TransformerDecoderLayer(width, 4, 36, batch_first=True)
        self.classes, self.mask = nn.Linear(width, classes), nn.Linear(width, 16)
        self.pixels = nn.Conv2d(width, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.body(x)
        queries = self.decode(self.queries.expand(len(x), -1, -1), maps.flatten(2).transpose(1, 2))
        masks = torch.einsum("bqc,bchw->bqhw", self.mask(queries), self.pixels(maps))
        return torch.einsum("bqk,bqhw->bkhw", self.classes(queries).softmax(-1), masks.sigmoid())
