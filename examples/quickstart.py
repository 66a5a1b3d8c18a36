"""Train a small residual network on real data, search it under a FLOPs budget, and check what comes out.

Everything runs on two cores in about two minutes; the data ships with scikit-learn.
"""

from __future__ import annotations

import argparse
import logging
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for 8x8 images: three stages of two blocks."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        layers, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(Block(inputs, width, 2 if stage and block == 0 else 1))
                inputs = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


def digits(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """1,797 handwritten digits of 8x8 pixels, in three parts that never mix."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    train, rest = train_test_split(np.arange(len(y)), test_size=797, random_state=seed, stratify=labels)
    validation, test = train_test_split(rest, test_size=397, random_state=seed, stratify=labels[rest])
    return {name: (x[i], y[i]) for name, i in (("train", train), ("validation", validation), ("test", test))}


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int, lr: float, seed: int = 0) -> None:
    """Plain cross-entropy training with small shifts of the images."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * (len(y) // 50))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(y), generator=generator).split(50):
            shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
            loss = F.cross_entropy(model(x[batch].roll(shift, (2, 3))), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return (model(data[0]).argmax(1) == data[1]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--short", action="store_true", help="hardly train, and search little")
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    options.output.mkdir(exist_ok=True)

    data = digits()
    make = partial(ResNet, (8, 8, 8), 1) if options.short else ResNet
    model = make()
    began = time.perf_counter()
    train(model, data["train"], epochs=1 if options.short else 15, lr=0.01)
    print(f"trained in {time.perf_counter() - began:.0f} s: test accuracy {accuracy(model, data['test']):.4f}\n")

    result = autoprune.search(
        model,
        "flops <= 50%",
        autoprune.Data(calibration=data["train"], validation=data["validation"], test=data["test"]),
        trials=6 if options.short else options.trials,
    )
    print(result)
    result.plot(options.output / "front.png")

    best = result.best("flops <= 50%" if options.short else "flops <= 25%")
    small = result.build(best)
    before = accuracy(small, data["test"])
    train(small, data["train"], epochs=1 if options.short else 4, lr=0.0005)
    share = best.costs["flops"] / result.dense.costs["flops"]
    print(
        f"\nbest within 25% of the FLOPs: trial {best.id} at {share:.1%}; test accuracy {before:.4f} as built, "
        f"{accuracy(small, data['test']):.4f} after 4 epochs of fine-tuning"
    )

    path = options.output / "small.safetensors"
    autoprune.save(small, path)
    loaded = autoprune.load(path, make()).eval()
    same = torch.equal(loaded(data["test"][0]), small(data["test"][0]))
    print(f"saved, loaded into a fresh model: outputs {'identical' if same else 'DIFFER'}; picture in {options.output}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
