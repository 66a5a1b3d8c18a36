"""Small models that tests of the structure share, and what they ask of what is found in them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from tests.candidates import gap, oracle_outputs, outputs_of, random_pruning
from zoo import draw, settled

IMAGE = (3, 8, 8)
Forward = Callable[..., Any]


class Net(nn.Module):
    """Modules, parameters and other attributes by name, and a forward that reads them."""

    def __init__(self, run: Forward, **attributes: Any):
        super().__init__()
        self.run = run
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


def known(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> tuple[nn.Module, tuple[Tensor, ...], Structure]:
    model, args = settled(make, shapes or (IMAGE,)), draw(shapes or (IMAGE,))
    return model, args, analyse(Example(model, args))


def assert_right(model: nn.Module, args: tuple[Any, ...], structure: Structure, seed: int = 0) -> None:
    """Check that modules built from any units of any group equal the masked dense model."""
    rng = np.random.default_rng(seed)
    for _ in range(10):
        pruning = random_pruning(structure, rng)
        found = outputs_of(structure.build(model, pruning), args)
        assert gap(found, oracle_outputs(model, structure.edit(pruning), args)) <= 1e-5


def slots_of(structure: Structure) -> dict[str, tuple[int, str]]:
    """Size of each group and the parameter dimensions that it touches, for example ``"stem.weight:0"``."""
    return {
        group.name: (group.size, " ".join(sorted(f"{slot.tensor}:{slot.dim}" for slot in group.slots)))
        for group in structure.groups
    }


def reasons(structure: Structure, tensor: str) -> str:
    return "; ".join(frozen.reason for frozen in structure.frozen if frozen.tensor == tensor)


def perceptron(inputs: int = 4, hidden: int = 8) -> nn.Sequential:
    """Two linear layers; the first one's units can go."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def chain(layers: int, width: int = 8) -> nn.Sequential:
    """Linear layers of one width behind each other, from 4 inputs to 2 outputs."""
    middle = [each for _ in range(layers - 2) for each in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), *middle, nn.Linear(width, 2)).eval()


def residual() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.stem(x)
        return s.head(F.relu(y + s.body(y)))

    return Net(forward, stem=conv(3, 8, padding=1), body=conv(8, 8, padding=1), head=conv(8, 2, 1, bias=False))


def flattened() -> nn.Module:
    return nn.Sequential(conv(3, 5), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(20, 3))


def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 24, groups=4, padding=1), nn.BatchNorm2d(24), conv(24, 2, 1))


def picks(forward: Forward, **extra: Any) -> Callable[[], nn.Module]:
    """A convolution of 8 channels, a function of it, and a 1x1 convolution that reads 8."""
    return lambda: Net(forward, **{"a": conv(3, 8), "head": conv(8, 2, 1), **extra})


def branches() -> nn.Module:
    """A residual block, a depthwise convolution, a concatenation and a flattened map."""

    def forward(s: Net, x: Tensor) -> Tensor:
        x = s.stem(x)
        x = F.relu(x + s.body(x))
        x = torch.cat((s.depth(x), s.side(x)), 1)
        return s.head(F.max_pool2d(s.norm(x), 3).flatten(1))

    layers = {"stem": conv(3, 4, padding=1), "body": conv(4, 4, padding=1), "depth": conv(4, 4, groups=4)}
    return Net(forward, **layers, side=conv(4, 3), norm=nn.BatchNorm2d(7), head=nn.Linear(28, 3))
