"""Train a pruned model with accelerate (pip install accelerate): `prepare` takes it as any other module.

python examples/own_loops/with_accelerate.py [--short], or accelerate launch examples/own_loops/with_accelerate.py
"""

import sys

from accelerate import Accelerator
from built import accuracy, built, told
from torch import optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


def main() -> None:
    short = "--short" in sys.argv
    small, data = built(short)
    before = accuracy(small.eval(), data["test"])
    loader = DataLoader(TensorDataset(*data["train"]), batch_size=50, shuffle=True)
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(small, optim.AdamW(small.parameters(), lr=1e-3), loader)
    model.train()
    for _ in range(1 if short else 8):
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
    told("accelerate", accelerator.unwrap_model(model), data, before)


if __name__ == "__main__":
    main()
