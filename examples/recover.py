"""Bring back what pruning took: distillation from the dense network, few or all parameters, and a receipt.

python examples/recover.py [--short]: prunes the demo's network to 15 % of its FLOPs, and trains it in three ways.
"""

import copy
import sys

import torch
from quickstart import ResNet, digits, train

import autoprune


def main() -> None:
    short = "--short" in sys.argv
    torch.manual_seed(0)
    data, model = digits(), ResNet((8, 8, 8), 1) if short else ResNet()
    train(model, data["train"], epochs=1 if short else 15, lr=0.01)
    samples = autoprune.Data(calibration=data["train"], validation=data["validation"], test=data["test"])
    result = autoprune.search(model, "flops <= 15%", samples, trials=4 if short else 100)
    small = result.build()
    steps = 6 if short else 300
    for parameters in ("all", "norm+bias", "lora"):
        receipt = autoprune.recover(copy.deepcopy(small), samples, teacher=model, train=parameters, steps=steps)
        print(f"\n{receipt}")
    averaged = autoprune.Recovery(ema=0.98, patience=5)
    receipt = autoprune.recover(small, samples, model, steps=steps, checkpoint="recovery.safetensors", recipe=averaged)
    print(f"\n{receipt}")
    autoprune.save(small, "recovered.safetensors")


if __name__ == "__main__":
    main()
