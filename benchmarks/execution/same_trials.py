"""Compare the searches of two checkouts to the last bit: every trial, its scores and costs, and the front.

    python benchmarks/execution/same_trials.py OLD_TREE NEW_TREE [--quick]

Runs the same short searches with each checkout, in a process of its own, and prints the differences, or
``equal: N trials``. Three small networks, trained a few steps, are searched with every optimizer, and some with racing,
rungs, other evaluators and sparsity; ``--quick`` runs two optimizers. A change that only moves or rewrites code must
leave everything equal. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

SEED = 0
SAMPLES = 576
VALIDATION = 48
"""Samples that candidates are scored on, unless racing needs more."""
OPTIMIZERS = ("random", "nsga2", "level_switch", "bayes", "knapsack", "auto")
QUICK = ("random", "auto")
_UNTIMED = ("seconds",)
_SHOWN = 20


def networks() -> dict[str, tuple[Any, Any]]:
    """Make the three networks, each with data that it is trained on for a few steps."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, width: int, inner: int):
            super().__init__()
            self.first = nn.Conv2d(width, inner, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(inner)
            self.second = nn.Conv2d(inner, width, 3, padding=1, bias=False)
            self.end = nn.BatchNorm2d(width)

        def forward(self, x: Any) -> Any:
            return functional.relu(x + self.end(self.second(functional.relu(self.norm(self.first(x))))))

    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
            self.blocks = nn.Sequential(Block(12, 16), Block(12, 8))
            self.down = nn.Sequential(nn.Conv2d(12, 20, 3, stride=2, padding=1), nn.BatchNorm2d(20), nn.ReLU())
            self.head = nn.Linear(20, 4)

        def forward(self, x: Any) -> Any:
            return self.head(self.down(self.blocks(self.stem(x))).mean((2, 3)))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.place = nn.Parameter(torch.randn(8, 16) / 4)
            self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
            self.qkv = nn.ModuleList(nn.ModuleList(nn.Linear(16, 16) for _ in range(3)) for _ in range(2))
            self.out = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
            self.feed = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2))
            self.head = nn.Linear(16, 4)

        def forward(self, tokens: Any) -> Any:
            x = self.embed(tokens) + self.place
            for i in range(2):
                y = self.norms[2 * i](x)
                q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in self.qkv[i])
                x = x + self.out[i](functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
                x = x + self.feed[i](self.norms[2 * i + 1](x))
            return self.head(x.mean(1))

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(6, 10)
            self.cell = nn.LSTM(10, 12, batch_first=True)
            self.inner = nn.Linear(12, 16)
            self.head = nn.Linear(16, 4)

        def forward(self, x: Any) -> Any:
            _, (last, _) = self.cell(self.enter(x).relu())
            return self.head(self.inner(last[-1]).relu())

    torch.manual_seed(SEED)
    labels = torch.arange(SAMPLES) % 4
    images = torch.randn(SAMPLES, 3, 8, 8) + labels[:, None, None, None] * 0.3
    tokens = (torch.randint(0, 12, (SAMPLES, 8)) + labels[:, None] * 2) % 20
    series = torch.randn(SAMPLES, 5, 6) + labels[:, None, None] * 0.4
    made = {
        "convolutional": (Convolutional(), images),
        "transformer": (Transformer(), tokens),
        "recurrent": (Recurrent(), series),
    }
    found = {}
    for name, (model, inputs) in made.items():
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(60):
            part = slice(32 * (step % 4), 32 * (step % 4) + 32)
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs[part]), labels[part]).backward()
            optimizer.step()
        found[name] = (model.eval(), (inputs, labels))
    return found


def cases(quick: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """Searches by name: the network, and the arguments that differ from the default."""
    import autoprune
    from autoprune.evaluators import FineTune

    # The argument has two names, because checkouts of before and after it was renamed are compared.
    early = "early_stopping" if "early_stopping" in inspect.signature(autoprune.search).parameters else "racing"
    optimizers = QUICK if quick else OPTIMIZERS
    found: dict[str, tuple[str, dict[str, Any]]] = {
        f"{network} {optimizer}": (network, {"optimizer": optimizer})
        for network in ("convolutional", "transformer", "recurrent")
        for optimizer in optimizers
    }
    found["racing"] = (
        "convolutional",
        {"optimizer": "random", early: autoprune.Racing(delta=0.5), "trials": 24, "samples": 512},
    )
    if not quick:
        found["score limit"] = ("convolutional", {"optimizer": "nsga2", "budget": "loss drop <= 0.2", "metric": "loss"})
        found["two costs"] = ("convolutional", {"optimizer": "auto", "budget": "flops <= 60%, params <= 70%"})
        found["sparsity"] = ("recurrent", {"space": "sparsity", "budget": "nonzero_params <= 50%"})
        found["statistics"] = ("convolutional", {"evaluator": "adaptive_bn", "optimizer": "level_switch"})
        rungs = {"evaluator": FineTune(steps=9), early: autoprune.Rungs(count=2, reduction=3)}
        found["rungs"] = ("transformer", {"optimizer": "random", "trials": 10, **rungs})
    return found


def searched(quick: bool) -> dict[str, Any]:
    """Run the searches with the checkout on the path."""
    import torch

    import autoprune

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Checkouts of before and after the arguments were grouped are compared.
    grouped = hasattr(autoprune, "Execution")
    quiet = {"execution": autoprune.Execution(progress=False)} if grouped else {"progress": False}
    made, found = networks(), {}
    for name, (network, options) in cases(quick).items():
        model, (inputs, labels) = made[network]
        given = {"budget": "flops <= 60%", "trials": 8, "seed": SEED, **quiet, **options}
        samples = given.pop("samples", VALIDATION)
        data = autoprune.Data(
            calibration=(inputs[:64], labels[:64]),
            validation=(inputs[64 : 64 + samples], labels[64 : 64 + samples]),
            batch_size=16,
        )
        began = time.perf_counter()
        result = autoprune.search(model, given.pop("budget"), data, **given)
        count = Counter(trial.status for trial in result.trials)
        print(f"{name}: trials {dict(count)}, {time.perf_counter() - began:.1f} s", file=sys.stderr)
        found[name] = {
            "dense": trial_of(result.dense),
            "trials": [trial_of(trial) for trial in result.trials],
            "front": [trial.id for trial in result.front],
            "stopped": result.stopped,
        }
    return found


def trial_of(trial: Any) -> dict[str, Any]:
    """Everything in a trial that two equal searches agree on, floats in hexadecimal."""
    named = {name: getattr(trial, name) for name in ("id", "candidate", "status", "reason", "feasible")}
    named |= {name: getattr(trial, name) for name in ("score", "signal", "interval", "test_score", "costs")}
    rows = [asdict(one) for one in trial.evaluations]
    named["evaluations"] = [{key: row[key] for key in row if key not in _UNTIMED} for row in rows]
    return {key: exact(value) for key, value in named.items()}


def exact(value: Any) -> Any:
    """Write floats in hexadecimal, which compares NaN as well."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, list | tuple):
        return [exact(each) for each in value]
    return {str(key): exact(each) for key, each in value.items()} if hasattr(value, "items") else value


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """Places that differ, with both values; keys that only one of them has are no difference."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [each for key in old if key in new for each in differences(old[key], new[key], f"{at} {key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [each for i, pair in enumerate(zip(old, new, strict=True)) for each in differences(*pair, f"{at}[{i}]")]
    return [] if old == new else [f"{at.strip()}: {readable(old)} before, {readable(new)} now"]


def readable(value: Any) -> str:
    """Show a value, floats in decimal again."""
    if isinstance(value, str) and value.lstrip("-").startswith(("0x", "nan", "inf")):
        return repr(float.fromhex(value))
    return str(value)[:100]


def run(tree: Path, quick: bool) -> Any:
    """Run this file with a checkout on the path."""
    command = [sys.executable, str(Path(__file__).resolve()), "--here", *(["--quick"] if quick else [])]
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"}
    print(f"searching with {tree}", file=sys.stderr)
    done = subprocess.run(command, env=environment, cwd=tree, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> int:
    """Compare two checkouts, or run the searches with the one on the path (``--here``)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", type=Path, help="the two checkouts")
    parser.add_argument("--quick", action="store_true", help="two optimizers only")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(searched(options.quick)))
        return 0
    if len(options.trees) != 2:
        parser.error("give two checkouts")
    old, new = (run(tree, options.quick) for tree in options.trees)
    found = differences(old, new)
    for line in found[:_SHOWN]:
        print(line)
    if found:
        print(f"{len(found)} differences")
        return 1
    print(f"equal: {sum(len(each['trials']) for each in new.values())} trials")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
