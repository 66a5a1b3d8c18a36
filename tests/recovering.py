"""Small networks that recoveries are tested on: a dense one, a pruned one that knows what it keeps, and samples."""

import itertools

import torch
from torch import Tensor, nn

import autoprune
from autoprune.protocols import Pruning
from autoprune.result.recipe import attach
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import build


def network(norm: bool = True) -> nn.Module:
    """Three linear layers, with batch norm between them or without."""
    torch.manual_seed(0)
    widths = [6, 12, 10]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), *([nn.BatchNorm1d(outputs)] if norm else []), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 4)).eval()


def halved(dense: nn.Module) -> nn.Module:
    """The network with every other unit of each group, and its recipe."""
    structure = analyse(Example(dense, (torch.randn(3, 6, generator=torch.Generator().manual_seed(0)),)))
    kept = {group.name: tuple(range(0, group.size, 2)) for group in structure.groups}
    edit = structure.edit(Pruning(kept))
    return attach(build(dense, edit), edit, dense)


def samples(dense: nn.Module, count: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normal inputs with the classes that the dense network gives them."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, dense(x).argmax(1)


def data_of(dense: nn.Module) -> autoprune.Data:
    """Samples to train on, to choose by, and to report on."""
    return autoprune.Data(samples(dense), samples(dense, 48, 1), samples(dense, 48, 2))


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
