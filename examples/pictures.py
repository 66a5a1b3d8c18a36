"""Draw the pictures of the documents: train and search the network of the quickstart, then draw its result."""

from __future__ import annotations

from pathlib import Path

import torch

import autoprune
from examples.quickstart import ResNet, digits, train

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"


def main() -> None:
    torch.manual_seed(0)
    data = digits()
    model = ResNet()
    train(model, data["train"], epochs=15, lr=0.01)
    parts = autoprune.Data(calibration=data["train"], validation=data["validation"], test=data["test"])
    draw(autoprune.search(model, "flops <= 50%", parts, trials=200))


def draw(result: autoprune.SearchResult) -> None:
    PICTURES.mkdir(exist_ok=True)
    drawn = {
        "front": result.plot(),
        "layers": result.plot_layers("flops <= 40%"),
        "sensitivity": result.plot_sensitivity(),
        "convergence": result.plot_convergence(),
    }
    for name, axes in drawn.items():
        axes.figure.savefig(PICTURES / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
