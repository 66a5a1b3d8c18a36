"""Time of a dense pass by the size of batches, with and without channels last, next to what the search chooses.

Run ``python -m benchmarks.costs.arrangement`` from the root of the repository, about two minutes on one thread; names
of networks repeat these alone. All sizes take turns, on the same samples, and the median of the turns counts. The
target is that the choice takes no longer than batches of 64 as drawn, and at most 10 % longer than the best measured.
EfficientNet-Lite0 needs the packages of `benchmarks.support.pretrained`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.data.batch import default_forward
from autoprune.evaluators.activation_cache.limits import bytes_of
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.study.arranging import IMAGE_BYTES, suited
from benchmarks.costs.latency import ViT
from benchmarks.support import pretrained
from benchmarks.support.common import RESULTS, environment, table, write
from benchmarks.support.trained import NETWORKS
from zoo import mobilenet_v2

COMMAND = "python -m benchmarks.costs.arrangement"
STORED = RESULTS / "arrangement.json"
DRAWN = 64
SIZES = (DRAWN, 32, 16, 8, 4, 2, 1)
ROUNDS = 3
MOST = 1.1

CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20, 16x16": (NETWORKS["resnet20"], 16),
    "MobileNetV2, 64x64": (mobilenet_v2, 64),
    "ViT, 32x32": (ViT, 32),
    "EfficientNet-Lite0, 224x224": (pretrained.efficientnet_lite0, 224),
}


def largest_of(model: nn.Module, x: Tensor) -> int:
    """Bytes of the largest output of a layer, for one sample."""
    found: list[int] = []

    def note(_: nn.Module, args: object, output: object) -> None:
        found.extend([output.nbytes] if isinstance(output, Tensor) else [])

    layers = [part for part in model.modules() if not any(True for _ in part.children())]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    default_forward(model, x)
    for hook in hooks:
        hook.remove()
    return max(found)


@torch.no_grad()
def measure(make: Callable[[], nn.Module], size: int) -> dict[str, object]:
    """Milliseconds a sample of every arrangement, and the one that the search chooses."""
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randn(DRAWN, 3, size, size)
    one = x[:1]
    largest = largest_of(model, one)
    samples = min(suited(largest, bytes_of(model), analyse(Example(model, (one,))).macs), DRAWN)
    spent: dict[str, list[float]] = {}
    for turn, last, batch in product(range(ROUNDS), (False, True), SIZES):
        form = torch.channels_last if last else torch.contiguous_format
        parts = [part.contiguous(memory_format=form) for part in torch.split(x, batch)]
        if not turn:
            model(parts[0])  # kernels of new shapes are made once
        began = time.process_time()
        for part in parts:
            model(part)
        spent.setdefault(name_of(batch, last), []).append(1e3 * (time.process_time() - began) / DRAWN)
    milliseconds = {name: float(np.median(each)) for name, each in spent.items()}
    return {"milliseconds": milliseconds, "chosen": name_of(samples, largest >= IMAGE_BYTES)}


def name_of(batch: int, last: bool) -> str:
    return f"{batch}{' last' if last else ''}"


def report(found: dict[str, dict[str, dict[str, float]]]) -> tuple[str, list[str]]:
    """Table, and the cases that miss the target."""
    lines, missed = [], []
    for name, each in found.items():
        spent, chosen = each["milliseconds"], str(each["chosen"])
        rule, drawn, best = spent[chosen], spent[name_of(DRAWN, last=False)], min(spent, key=lambda key: spent[key])
        lines += [
            [name if not last else "... with channels last", *(f"{spent[name_of(n, last)]:.3g}" for n in SIZES)]
            + (["", ""] if last else [chosen, best])
            for last in (False, True)
        ]
        if rule > max(drawn, MOST * spent[best]):
            missed.append(f"{name}: {rule:.3g} ms, as drawn {drawn:.3g}, best {spent[best]:.3g}")
    header = ("network", *map(str, SIZES), "chosen", "best")
    told = "Target met." if not missed else "Target NOT met:\n\n" + "\n".join(f"- {line}" for line in missed)
    return f"Milliseconds of processor time a sample, by samples a batch.\n\n{table(header, lines)}\n\n{told}", missed


def main(names: Iterable[str]) -> int:
    torch.set_num_threads(1)
    where = environment(COMMAND)
    found = json.loads(STORED.read_text())["found"] if STORED.exists() else {}
    for name in names:
        found[name] = measure(*CASES[name])
        text, missed = report(found)
        write("arrangement", "Samples a batch", {"environment": where, "missed": missed, "found": found}, text)
    return 1 if report(found)[1] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=[*CASES])
    sys.exit(main(parser.parse_args().networks))
