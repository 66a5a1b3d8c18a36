"""Search with a metric and an evaluator of your own.

python examples/own_parts.py [--short]: a network that locates a bright spot is judged by the share of spots that it
finds within a tenth of the picture, and a candidate is scored with the weights it inherits, after new biases alone.
docs/extending.md says what each kind of part must promise; `autoprune.testing.contracts` tests it.
"""

import sys

import torch
from torch import Tensor, nn

import autoprune
from autoprune.evaluators import Adapted, Context

SIZE = 12


class BiasesOnly:
    """Shifts the last layer of a candidate so that its mean outputs are the dense network's."""

    def prepare(self, context: Context) -> None:
        batches = context.subsets.calibration
        with torch.no_grad():
            wanted = torch.cat([context.forward(context.model, batch) for batch in batches]).mean(0)

        def adapt(module, edit, run):
            with torch.no_grad():
                found = torch.cat([run(batch) for batch in batches]).mean(0)
                module[-1].bias = nn.Parameter(module[-1].bias + wanted - found)

        self._adapted = Adapted(context, adapt)

    def evaluate(self, candidates, chunk=None):
        return self._adapted.evaluate(candidates, chunk)

    def test(self, candidate):
        return self._adapted.test(candidate)

    def build(self, candidate):
        return self._adapted.build(candidate)


def found(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return ((outputs - batch[1]).norm(dim=1) < 0.1).float()


def spots(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(count, 2, generator=generator)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, SIZE)] * 2, indexing="ij"))
    distance = (grid[None] - places[:, :, None, None]).square().sum(1, keepdim=True)
    return (-60 * distance).exp() + 0.1 * torch.randn(distance.shape, generator=generator), places


def main() -> None:
    short = "--short" in sys.argv
    torch.manual_seed(0)
    conv = (nn.Conv2d(1, 12, 3, 2), nn.ReLU(), nn.Conv2d(12, 16, 3, 2), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(*conv, nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 2))
    x, y = spots(512, 0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(10 if short else 600):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    metric = autoprune.Metric(found, higher_is_better=True, name="found")
    data = autoprune.Data(calibration=(x, y), validation=spots(256, 1), test=spots(256, 2))
    trials = 5 if short else 80
    print(autoprune.search(model.eval(), "flops <= 50%", data, metric=metric, evaluator=BiasesOnly(), trials=trials))


if __name__ == "__main__":
    main()
