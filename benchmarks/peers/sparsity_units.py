"""Units first and then zeros in what stays, zeros alone, and units alone: a ResNet-20 trained on hard digits.

Run ``python -m benchmarks.peers.sparsity_units``. Each kind of pruning is a search of its own for each budget: on
nonzero elements, and on bytes as stored in the smallest of three forms. Each cell is written when it is done; cells
that are there are not computed again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import autoprune
from autoprune.costs.zeros import stored_as
from autoprune.evaluators import Masked
from autoprune.evaluators.adaptive_bn import recalibrate
from autoprune.search_spaces import Channels, Product, Sparsity
from benchmarks.peers.methods import FINETUNE_EPOCHS, FINETUNE_LR
from benchmarks.peers.sparsity_digits import LEVELS, NEAR, hold_zeros
from benchmarks.support.common import RESULTS, environment, table, write
from benchmarks.support.trained import Trained, score, train, trained
from tests.counting import counted_macs

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.peers.sparsity_units"
NAME = "sparsity_units"
NETWORK = "resnet20"
BUDGETS = (("nonzero_params", 0.2), ("nonzero_params", 0.1), ("stored_bytes", 0.3), ("stored_bytes", 0.2))
KINDS = {
    "units, then zeros": (Product(Channels(), Sparsity(levels=LEVELS)), "masked"),
    "zeros alone": (Sparsity(levels=LEVELS), "masked"),
    "units alone": (Channels(), "compensated"),
}
COSTS = ("nonzero_params", "stored_bytes", "flops")


def judged(network: Trained, kind: str, cost: str, share: float, seed: int, trials: int) -> dict[str, float]:
    """Costs of what a search finds, and scores on test data before and after fine-tuning with the zeros held."""
    began = time.process_time()
    space, evaluator = KINDS[kind]
    parts = network.data
    limited = "params" if kind == "units alone" else cost  # of networks without zeros, both are shares of parameters
    result = autoprune.search(
        network.model,
        f"{NEAR * share:.4%} <= {limited} <= {share:.4%}",
        autoprune.Data(calibration=parts["train"], validation=parts["validation"], test=parts["test"]),
        space=space,
        evaluator=Masked() if evaluator == "masked" else evaluator,
        trials=trials,
        seed=seed,
        execution=autoprune.Execution(progress=False),
    )
    module = result.build()
    image = parts["test"][0][:1]
    dense = counted(network.model, image)
    found = {name: value / dense[name] for name, value in counted(module.eval(), image).items()}
    found["cpu_seconds"] = round(time.process_time() - began, 1)
    calibration = [(x, None) for x in parts["train"][0][:512].split(64)]
    for when in ("before", "after"):
        if when == "after":
            hold_zeros(module)
            train(module, parts["train"], FINETUNE_EPOCHS, FINETUNE_LR, seed)
        recalibrate(module, calibration, lambda batch: module(batch[0]))
        found[f"accuracy {when}"], found[f"loss {when}"] = score(module, parts["test"])
    return found


def counted(module: nn.Module, image: Tensor) -> dict[str, float]:
    """Costs of a network as it is built."""
    parameters = list(module.parameters())
    stored = sum(buffer.nbytes for buffer in module.buffers())
    for each in parameters:
        sizes = (len(each), each.numel(), int((each == 0).sum()), each.element_size())
        as_it_is, *compressed = stored_as(*map(np.int64, sizes))
        stored += int(min(as_it_is, *compressed) if each.ndim > 1 else as_it_is)
    return {
        "nonzero_params": float(sum(int(each.count_nonzero()) for each in parameters)),
        "stored_bytes": float(stored),
        "flops": float(counted_macs(module, lambda m: m(image))),
    }


def report(found: Mapping[str, Any]) -> str:
    """A row for each kind of pruning under each budget, and each seed."""
    rows = []
    for name, cell in found["cells"].items():
        scores = (f"{cell[f'accuracy {when}']:.3f} / {cell[f'loss {when}']:.3f}" for when in ("before", "after"))
        cost, share, kind, seed = name.split(" | ")
        shares = (f"{cell[each]:.1%}" for each in COSTS)
        rows.append([f"{cost} <= {float(share):.0%}", seed, kind, *shares, *scores])
    rows.sort(key=lambda row: row[:2], reverse=True)
    head = ["budget", "seed", "", *COSTS, "accuracy / loss before", "after"]
    dense = ", ".join(f"{seed}: {a:.3f} / {loss:.3f}" for seed, (a, loss) in found["dense"].items())
    return (
        f"ResNet-20 on hard digits; dense accuracy / loss by seed: {dense}. Costs are shares of the dense network's. "
        f"Each row is the best of a search with {found['trials']} candidates by validation data, on 1,194 test images "
        f"before and after {FINETUNE_EPOCHS} epochs with zeros held; batch-norm statistics from 512 training samples "
        f"both times. Loss in nats.\n\n{table(head, rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--trials", type=int, default=60, help="candidates of each search")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored = RESULTS / f"{NAME}.json"
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {"cells": {}, "dense": {}}
    found |= {"environment": environment(COMMAND), "trials": options.trials}
    for seed in options.seeds:
        network = trained(NETWORK, seed)
        found["dense"][str(seed)] = score(network.model, network.data["test"])
        for cost, share in BUDGETS:
            for kind in KINDS:
                name = f"{cost} | {share} | {kind} | {seed}"
                if name not in found["cells"]:
                    found["cells"][name] = judged(network, kind, cost, share, seed, options.trials)
                    write(NAME, "Units first, then zeros in what stays", found, report(found))


if __name__ == "__main__":
    main()
