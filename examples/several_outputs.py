"""Prune a detector: a backbone, a pyramid of two scales, and heads for classes and boxes at each of them.

python examples/several_outputs.py [--short]: without labels, all of its outputs are to stay close to the dense
detector's: ``outputs`` selects and joins them. With boxes to compare with, pass an autoprune.Metric of the whole set.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU())


class Detector(nn.Module):
    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, width, 2), block(width, width))
        self.fine, self.coarse = block(width, 2 * width, 2), block(2 * width, 4 * width, 2)
        self.lateral = nn.ModuleList([nn.Conv2d(2 * width, width, 1), nn.Conv2d(4 * width, width, 1)])
        self.classes, self.boxes = nn.Conv2d(width, classes, 1), nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        fine = self.fine(self.stem(x))
        coarse = self.lateral[1](self.coarse(fine))
        levels = [self.lateral[0](fine) + F.interpolate(coarse, scale_factor=2.0), coarse]
        return {"scores": [self.classes(level) for level in levels], "boxes": [self.boxes(level) for level in levels]}


def flat(made: dict[str, list[Tensor]]) -> Tensor:
    """All outputs of a picture in one row."""
    return torch.cat([each.flatten(1) for name in ("scores", "boxes") for each in made[name]], 1)


def main() -> None:
    short = "--short" in sys.argv
    torch.manual_seed(0)
    model = Detector(8 if short else 32).eval()
    data = [torch.randn(8, 3, 32, 32) for _ in range(4 if short else 24)]
    call = autoprune.Call(outputs=flat)
    result = autoprune.search(
        model, "flops <= 60%", data, metric="relative_error", example=call, trials=5 if short else 100
    )
    print(result)
    made = result.build()(data[0])
    print({name: [tuple(each.shape) for each in levels] for name, levels in made.items()})


if __name__ == "__main__":
    main()
