"""A pruned model to train on, and its data: what the loops in this folder begin with."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import autoprune

sys.path.insert(0, str(Path(__file__).parents[1]))
from quickstart import ResNet, accuracy, digits, train

Split = tuple[Tensor, Tensor]


def built(short: bool) -> tuple[nn.Module, dict[str, Split]]:
    """The demo's network, trained, searched and cut to 30 % of its FLOPs; in a short mode hardly trained."""
    torch.manual_seed(0)
    data, model = digits(), ResNet((8, 8, 8), 1) if short else ResNet()
    train(model, data["train"], epochs=1 if short else 15, lr=0.01)
    samples = autoprune.Data(calibration=data["train"], validation=data["validation"], test=data["test"])
    result = autoprune.search(model, "flops <= 30%", samples, trials=4 if short else 100)
    return result.build(), data


def told(name: str, small: nn.Module, data: dict[str, Split], before: float) -> None:
    print(f"{name}: test accuracy {before:.4f} as built, {accuracy(small.eval(), data['test']):.4f} after training")
