"""Recovery after pruning: what to learn from the dense network, what to train, and in how many networks.

Run ``python -m benchmarks.evaluators.recover`` from the root of the repository; each cell is kept in
``benchmarks/results/recover.json`` when it is done, and cells that are there are not repeated. Two networks, pruned by
a search of 30 trials to 15 % of the FLOPs, are trained with equal steps from the same start: the demo's residual
network on clean digits, and a ResNet-20 on hard ones (`benchmarks.support.trained`). Weights are chosen on validation
samples, and accuracy is that on test samples. ``--text`` adds MiniLM at 40 % of its encoder
(`benchmarks.peers.sentence_model`), which learns from the dense encoder alone, on plain text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import autoprune
from autoprune import Data, Recovery
from benchmarks.support import trained
from benchmarks.support.common import RESULTS, environment, interval, table, write
from examples import quickstart

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.evaluators.recover"
FOLDER = Path("runs") / "recover"
SHARE, TRIALS, STEPS = "15%", 30, 200
LR = 0.01  # chosen with that of low-rank changes and of norms on validation samples of two further seeds
ARMS: dict[str, dict[str, Any]] = {
    "none": {"distill": "none", "lr": LR},
    "logits": {"distill": "logits", "lr": LR},
    "inner": {"distill": "inner", "lr": LR},
    "none, half the steps": {"distill": "none", "lr": LR, "steps": STEPS // 2},
    "logits, half the steps": {"distill": "logits", "lr": LR, "steps": STEPS // 2},
    "inner, half the steps": {"distill": "inner", "lr": LR, "steps": STEPS // 2},
    "norm+bias": {"distill": "inner", "train": "norm+bias", "lr": 0.1},
    "lora": {"distill": "inner", "train": "lora", "lr": 0.03},
    "lora, rank 1": {"distill": "inner", "train": "lora", "lr": 0.03, "rank": 1},
    "inner, 4 networks": {"distill": "inner", "lr": LR, "steps_to": 4},
}
TEXT_SHARE, TEXT_STEPS = "40%", 200
TEXT: dict[str, dict[str, Any]] = {
    "logits": {"distill": "logits"},
    "inner": {"distill": "inner"},
    "norm+bias": {"distill": "inner", "train": "norm+bias"},
    "lora": {"distill": "inner", "train": "lora"},
}
Case = tuple[nn.Module, dict[str, trained.Part]]


def demo(seed: int) -> Case:
    data = quickstart.digits(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = quickstart.ResNet()
    path = FOLDER / f"demo-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        quickstart.train(model, data["train"], epochs=15, lr=0.01, seed=seed)
        torch.save(model.state_dict(), path)
    return model.eval(), data


def hard(seed: int) -> Case:
    case = trained.trained("resnet20", seed)
    return case.model, case.data


CASES: dict[str, Callable[[int], Case]] = {"demo, clean digits": demo, "ResNet-20, hard digits": hard}


def samples(data: dict[str, trained.Part]) -> Data:
    return Data(calibration=data["train"], validation=data["validation"], test=data["test"], test_samples=2000)


def pruned(name: str, seed: int, model: nn.Module, data: Data, share: str, **options: Any) -> nn.Module:
    """Load the network that a search finds, and search it if it is not there."""
    path = FOLDER / f"{name.partition(',')[0]}-{seed}-{share.rstrip('%')}.safetensors"
    if not path.exists():
        quiet = autoprune.Execution(progress=False)
        result = autoprune.search(
            model, f"flops <= {share}", data, trials=TRIALS, seed=seed, execution=quiet, **options
        )
        autoprune.save(result.build(), path)
    return autoprune.load(path, model)


def held_bytes(small: nn.Module, train: str, rank: int = 4) -> int:
    """Bytes of gradients, of AdamW's moments and of starts of low-rank changes, for float32."""
    from autoprune.evaluators.training.parameters import Trained

    found = Trained(small, train, rank, {}, 0)
    starts = sum(weight.numel() for weight in found._changes)
    largest = max((weight.numel() for weight in found._changes), default=0)
    return 4 * (3 * found.count + starts + largest)


def cell(model: nn.Module, small: nn.Module, data: Data, seed: int, arm: dict[str, Any]) -> dict[str, Any]:
    """Figures of one recovery."""
    settings = {"steps": STEPS, **arm}
    began = time.process_time()
    receipt = Recovery(data=data, teacher=model, seed=seed, **settings)(small)
    assert receipt.before is not None
    assert receipt.after is not None
    assert receipt.teacher is not None
    return {
        "before": receipt.before.mean,
        "after": receipt.after.mean,
        "dense": receipt.teacher.mean,
        "share": receipt.share,
        "best_step": receipt.best_step,
        "bytes": held_bytes(small, receipt.train, settings.get("rank", 4)),
        "cpu_seconds": time.process_time() - began,
        "stopped": receipt.stopped,
    }


def images(seeds: int, cases: list[str]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Cells of networks on images, by key."""
    for seed in range(seeds):
        for name in cases:
            made: list[tuple[nn.Module, Data]] = []

            def prepared(name: str = name, seed: int = seed, made: list[Any] = made) -> tuple[nn.Module, Data]:
                if not made:
                    model, data = CASES[name](seed)
                    made.append((model, samples(data)))
                return made[0]

            for arm, settings in ARMS.items():

                def run(
                    name: str = name, seed: int = seed, settings: dict[str, Any] = settings, prepared: Any = prepared
                ) -> dict[str, Any]:
                    model, data = prepared()
                    return cell(model, pruned(name, seed, model, data, SHARE), data, seed, settings)

                yield f"{name}; {arm}; {seed}", run


def texts(seeds: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Cells of the sentence encoder, by key."""
    from benchmarks.peers.sentence_model import BATCH, documents, embedded, judged
    from benchmarks.support.pretrained import Sentences, sentences, tokens

    model = Sentences()
    words, similarity = documents()
    dense = embedded(model, words)
    for seed in range(seeds):
        found = sentences(3000)
        order = np.random.default_rng(seed).permutation(len(found))
        parts = [tokens([found[i] for i in part], BATCH) for part in np.split(order, [len(order) - 128])]
        data = Data(calibration=parts[0], validation=parts[1], calibration_samples=256)

        def prune(seed: int = seed, data: Data = data) -> nn.Module:
            return pruned("minilm", seed, model, data, TEXT_SHARE, metric="cosine")

        for arm, settings in TEXT.items():

            def run(
                seed: int = seed, data: Data = data, settings: dict[str, Any] = settings, prune: Any = prune
            ) -> dict[str, Any]:
                small = prune()
                before = judged(embedded(small, words), dense, similarity)
                recipe = {"steps": TEXT_STEPS, "metric": "cosine", "lr": None, **settings}
                if settings.get("train", "all") == "all":
                    recipe["lr"] = 2e-4
                began = time.process_time()
                receipt = Recovery(data=data, teacher=model, seed=seed, **recipe)(small)
                after = judged(embedded(small, words), dense, similarity)
                return {
                    "before": before["correlation"],
                    "after": after["correlation"],
                    "agreement": [before["agreement"], after["agreement"]],
                    "dense": judged(dense, dense, similarity)["correlation"],
                    "share": receipt.share,
                    "best_step": receipt.best_step,
                    "bytes": held_bytes(small, receipt.train),
                    "cpu_seconds": time.process_time() - began,
                    "stopped": receipt.stopped,
                }

            yield f"MiniLM, plain text; {arm}; {seed}", run


def section(name: str, cells: dict[str, dict[str, Any]]) -> str:
    """Table of one network."""
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for key, found in cells.items():
        case, arm, seed = key.split("; ")
        if case == name:
            arms.setdefault(arm, {})[int(seed)] = found
    text = name.startswith("MiniLM")
    base = arms.get("logits" if text else "none", {})
    rows = []
    for arm, own in arms.items():
        after = np.array([own[seed]["after"] for seed in sorted(own)])
        shared = sorted(own.keys() & base.keys())
        change = np.array([own[seed]["after"] - base[seed]["after"] for seed in shared])
        value = f"{after.mean():.3f}" if text else f"{100 * after.mean():.1f}"
        rows.append(
            [
                arm,
                value,
                interval(change) if len(change) > 1 and change.any() else "",
                f"{100 * np.mean([each['share'] for each in own.values()]):.1f} %",
                f"{np.mean([each['bytes'] for each in own.values()]) / 1e6:.2f}",
                f"{np.mean([each['cpu_seconds'] for each in own.values()]):.1f}",
                len(own),
            ]
        )
    every = [each for own in arms.values() for each in own.values()]
    before, dense = (np.mean([each[which] for each in every]) for which in ("before", "dense"))
    unit = "correlation with people" if text else "test accuracy in %"
    first = f"{before:.3f}; dense {dense:.3f}" if text else f"{100 * before:.1f}; dense {100 * dense:.1f}"
    steps = TEXT_STEPS if text else STEPS
    header = ["", unit, f"points over {'logits' if text else 'none'}", "trained", "MB held", "CPU s", "seeds"]
    return f"## {name}\n\n{steps} steps; {unit} before training {first}.\n\n{table(header, rows)}"


def report(found: dict[str, Any]) -> str:
    names = list(dict.fromkeys(key.split("; ")[0] for key in found["cells"]))
    intro = (
        "Means over seeds (each with its own data split, dense network and search), with 95 % t-intervals of the "
        "difference on the same seed. *none*, *logits* and *inner* train all parameters; the last rows use inner "
        "distillation. MB held are counted: gradients, both moments of AdamW, and starts of low-rank changes."
    )
    return "\n\n".join([intro, *(section(name, found["cells"]) for name in names)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--text", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    kept = RESULTS / "recover.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"cells": {}}
    found["environment"] = environment(COMMAND)
    todo = [*images(options.seeds, options.cases), *(texts(options.seeds) if options.text else ())]
    for key, run in todo:
        if key not in found["cells"]:
            found["cells"][key] = run()
            print(key, found["cells"][key], flush=True)
            kept.write_text(json.dumps(found, indent=1) + "\n")
    write("recover", "Recovery after pruning", found, report(found))


if __name__ == "__main__":
    main()
