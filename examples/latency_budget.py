"""Search under a limit on measured latency: every network that comes back was measured on this machine.

python examples/latency_budget.py [--short]
"""

import sys

import torch
from torch import nn

import autoprune


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)).eval()


def main() -> None:
    short = "--short" in sys.argv
    model = network(8 if short else 48)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latency = autoprune.profile(model, x, batch=1, path="latency.json", networks=6 if short else 12)
    result = autoprune.search(
        model,
        "latency <= 90%" if short else "latency <= 60%",
        example=autoprune.Call(inputs=x, cost_batch=1),
        costs={"latency_ms": latency},
        trials=6 if short else 100,
    )
    print(result)
    best = result.best()
    print(f"{best.costs['latency_ms']:.3f} ms measured, dense {result.dense.costs['latency_ms']:.3f} ms")


if __name__ == "__main__":
    main()
