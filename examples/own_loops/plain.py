"""Train a pruned model in a loop of plain PyTorch: it is an ordinary module.

python examples/own_loops/plain.py [--short]
"""

import sys

from built import accuracy, built, told
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def train(small: nn.Module, data: tuple[Tensor, Tensor], epochs: int) -> None:
    loader = DataLoader(TensorDataset(*data), batch_size=50, shuffle=True)
    optimizer = optim.AdamW(small.parameters(), lr=1e-3)
    schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    small.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(small(x), y).backward()
            optimizer.step()
            schedule.step()


def main() -> None:
    short = "--short" in sys.argv
    small, data = built(short)
    before = accuracy(small.eval(), data["test"])
    train(small, data["train"], epochs=1 if short else 8)
    told("plain PyTorch", small, data, before)


if __name__ == "__main__":
    main()
