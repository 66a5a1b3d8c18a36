"""Zeros in a ResNet-20 and a MobileNetV2 trained on hard digits, by LAMP and by searches with fitted weights.

Run ``python -m benchmarks.peers.sparsity_digits``. All networks keep at most the same number of elements of
convolutions and linear layers, get batch-norm statistics from the same calibration samples, and are judged on test data
before and after the same fine-tuning, in which zeros stay. Each cell is written when it is done; cells that are there
are not computed again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import autoprune
from autoprune.evaluators import Masked
from autoprune.evaluators.adaptive_bn import recalibrate
from autoprune.importance.masks import allocation
from autoprune.protocols import IntArray, Pruning
from autoprune.structure.slicing.slicing import build
from autoprune.structure.slicing.zeros import zero_masks
from autoprune.study.study import Study
from autoprune.testing.contexts import study_for
from benchmarks.peers.methods import FINETUNE_EPOCHS, FINETUNE_LR
from benchmarks.peers.sparsity import mean_and_interval
from benchmarks.support.common import RESULTS, environment, table, write
from benchmarks.support.trained import Trained, score, train, trained

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.peers.sparsity_digits"
NAME = "sparsity_digits"
NETWORKS = ("resnet20", "mobilenet_v2")
SHARES = (0.8, 0.9, 0.95)
LEVELS = (0.0, *(round(1 - 0.8**i, 4) for i in range(1, 20)))  # what stays falls by a fifth from level to level
SPACE = autoprune.Sparsity(levels=LEVELS)
NEAR = 0.97
"""A search looks for networks with this share of the elements of its budget, and more."""


@dataclass
class Case:
    """A trained network, whose weights get zeros.

    Attributes:
        network: With its data.
        seed: Of the network and of searches.
        trials: Candidates of a search.
        folder: For the weights of all levels.
    """

    network: Trained
    seed: int
    trials: int
    folder: Path
    found: dict[float, IntArray] = field(default_factory=dict)  # by searches that are done

    @cached_property
    def data(self) -> autoprune.Data:
        parts = self.network.data
        return autoprune.Data(calibration=parts["train"], validation=parts["validation"], test=parts["test"])

    @cached_property
    def study(self) -> Study:
        """A search, set up and not begun; all levels are solved here."""
        limit = "nonzero_params <= 50%"
        return study_for(self.network.model, limit, self.data, space=SPACE, evaluator=self.fitted, seed=self.seed)

    @cached_property
    def fitted(self) -> Masked:
        return Masked(folder=self.folder, store="weights")

    @cached_property
    def in_order(self) -> Masked:
        evaluator = Masked(folder=self.folder, sequential=True)
        evaluator.prepare(self.study.context)
        return evaluator

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Convolutions and linear layers."""
        return {name: self.network.model.get_parameter(name).detach() for name in self.study.context.structure.weights}

    def nonzero(self, share: float) -> int:
        """Elements of the weights that stay."""
        return round((1 - share) * sum(weight.numel() for weight in self.weights.values()))

    def pruning(self, share: float) -> Pruning:
        """Zeros as LAMP divides them."""
        kept = allocation.lamp(self.weights, self.nonzero(share))
        zeros = {name: weight.numel() - kept[name] for name, weight in self.weights.items()}
        return Pruning(zeroed={name: count for name, count in zeros.items() if count})

    def adapted(self, share: float, evaluator: Masked) -> nn.Module:
        """LAMP's numbers of zeros, where an evaluator sets them."""
        model, context = self.network.model, self.study.context
        edit = self.study.context.structure.edit(self.pruning(share))
        by_magnitude = {name: n for name, n in edit.zeroed.items() if name not in self.fitted.database.tables}
        module = build(model, replace(edit, zeroed=by_magnitude)).eval()
        with torch.no_grad():
            evaluator.adapt(module, edit, lambda batch: context.forward(module, batch))
        return module

    def searched(self, share: float) -> IntArray:
        """The candidate that a search finds; LAMP's zeros are among those that it begins with."""
        if share not in self.found:
            kept = {name: self.weights[name].numel() - count for name, count in self.pruning(share).zeroed.items()}
            others = sum(each.numel() for each in self.network.model.parameters())
            others -= sum(weight.numel() for weight in self.weights.values())
            nonzero = self.nonzero(share)
            result = autoprune.search(
                self.network.model,
                f"{others + int(NEAR * nonzero)} <= nonzero_params <= {others + nonzero}",
                self.data,
                space=SPACE,
                evaluator=Masked(folder=self.folder, store="weights"),
                trials=self.trials,
                start=[self.study.context.space.near(kept)],
                seed=self.seed,
                execution=autoprune.Execution(progress=False),
            )
            self.found[share] = np.array(result.best().candidate)
        return self.found[share]


def by_lamp(case: Case, share: float) -> nn.Module:
    """LAMP as published: least magnitudes go, and the others stay as they are."""
    return case.study.context.structure.build(case.network.model, case.pruning(share))


METHODS: dict[str, Callable[[Case, float], nn.Module]] = {
    "LAMP": by_lamp,
    "LAMP's shares, fitted": lambda case, share: case.adapted(share, case.fitted),
    "LAMP's shares, in order": lambda case, share: case.adapted(share, case.in_order),
    "search": lambda case, share: case.fitted.build(case.searched(share)),
    "search, then in order": lambda case, share: case.in_order.build(case.searched(share)),
}
BASELINE = "LAMP"


def judged(case: Case, share: float, method: str) -> dict[str, float]:
    """Scores on test data before and after fine-tuning with the zeros held."""
    began = time.process_time()
    module = METHODS[method](case, share)
    seconds = time.process_time() - began
    left = sum(int(module.get_parameter(name).count_nonzero()) for name in case.weights)
    if left > case.nonzero(share):
        raise RuntimeError(f"{method} keeps {left} elements, of {case.nonzero(share)} allowed")
    found = {"nonzero": left, "cpu_seconds": round(seconds, 1)}
    found |= scored(case, module, "before")
    hold_zeros(module)
    train(module, case.network.data["train"], FINETUNE_EPOCHS, FINETUNE_LR, case.seed)
    after = sum(int(module.get_parameter(name).count_nonzero()) for name in case.weights)
    if after > left:
        raise RuntimeError(f"{method} has {after} nonzero elements after training, and {left} before")
    return found | scored(case, module, "after")


def hold_zeros(module: nn.Module) -> None:
    """Keep elements that are zero so in training: gradients are zero there, and AdamW then leaves them alone."""
    for name, mask in zero_masks(module).items():
        module.get_parameter(name).register_hook(lambda gradient, mask=mask: gradient.masked_fill(mask, 0.0))


def scored(case: Case, module: nn.Module, when: str) -> dict[str, float]:
    recalibrate(module, case.study.context.subsets.calibration, lambda batch: module(batch[0]))
    accuracy, loss = score(module, case.network.data["test"])
    return {f"accuracy {when}": accuracy, f"loss {when}": loss}


def section(network: str, share: float, cells: Mapping[str, dict[str, float]]) -> str:
    """The table of one network and share; differences are paired over seeds."""
    rows = []
    own = {
        seed: {m: cells[key_of(network, seed, share, m)] for m in METHODS} for seed in complete(network, share, cells)
    }
    if not own:
        return ""
    for method in METHODS:
        row: list[str] = [method]
        for when in ("before", "after"):
            for score_of in ("accuracy", "loss"):
                name = f"{score_of} {when}"
                row.append(mean_and_interval([run[method][name] for run in own.values()]))
                less = [run[method][name] - run[BASELINE][name] for run in own.values()]
                row.append("" if method == BASELINE else mean_and_interval(less))
        rows.append(row)
    head = [""]
    for when in ("before", "after"):
        head += [f"accuracy {when}", "- LAMP's", f"loss {when}", "- LAMP's"]
    return f"## {network}, {share:.0%} zeros, {len(own)} seeds\n\n{table(head, rows)}"


def complete(network: str, share: float, cells: Mapping[str, Any]) -> list[int]:
    """Seeds with a cell for every method."""
    seeds = {int(name.split(" | ")[1]) for name in cells}
    return [seed for seed in sorted(seeds) if all(key_of(network, seed, share, m) in cells for m in METHODS)]


def key_of(network: str, seed: int, share: float, method: str) -> str:
    return f"{network} | {seed} | {share} | {method}"


def report(found: Mapping[str, Any]) -> str:
    sections = [section(network, share, found["cells"]) for network in NETWORKS for share in SHARES]
    dense = [f"{name} {a:.3f} / {loss:.3f}" for name, (a, loss) in found["dense"].items()]
    return (
        "Networks trained on hard digits; a percentage is of the elements of convolutions and the linear layer. "
        "Before: with batch-norm statistics from the same 512 training samples, no training. After: "
        f"{FINETUNE_EPOCHS} epochs with zeros held. Mean over seeds [95 % interval], on 1,194 test images; loss in "
        "nats. Fitted: SparseGPT's masks and the update on them, for inputs of the dense network; in order: for those "
        f"of the layers before, `Masked(sequential=True)`. The search sees 800 validation images, {found['trials']} "
        "candidates, and begins with LAMP's shares among others. LAMP keeps exactly as many elements as are allowed, "
        "a search at most as many.\n\nDense accuracy / loss by network and seed: "
        + ", ".join(dense)
        + "\n\n"
        + "\n\n".join(filter(None, sections))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--trials", type=int, default=60, help="candidates of a search")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored = RESULTS / f"{NAME}.json"
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {"cells": {}, "dense": {}}
    found |= {"environment": environment(COMMAND), "trials": options.trials}
    for seed, network in product(options.seeds, options.networks):
        left = [(s, m) for s in SHARES for m in METHODS if key_of(network, seed, s, m) not in found["cells"]]
        if not left:
            continue
        with tempfile.TemporaryDirectory() as folder:
            case = Case(trained(network, seed), seed, options.trials, Path(folder))
            found["dense"][f"{network} {seed}"] = score(case.network.model, case.network.data["test"])
            for share, method in left:
                found["cells"][key_of(network, seed, share, method)] = judged(case, share, method)
                write(NAME, "Zeros in networks for hard digits", found, report(found))


if __name__ == "__main__":
    main()
