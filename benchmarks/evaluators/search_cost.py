"""Processor time of a search of 100 trials, in bare forward passes of its candidates on the same samples.

Run ``python -m benchmarks.evaluators.search_cost`` from the root of the repository; names of networks repeat these
alone, ``--seeds`` gives the number of searches of each. A search with default arguments at half of the FLOPs is timed
by the processor, set-up, evaluations and all else apart. Times are those in user mode: where memory is short, a process
reads its libraries again and again, and the system's time, which has a column of its own, depends on that. Then every
eighth of its candidates is cut as it was, and run on all calibration and validation samples with nothing around it, in
batches of 128. Each search is repeated as it was before: with samples as they were drawn, statistics of all calibration
samples, and scores on all validation samples. The hypervolume is that of the front by loss on validation data, from the
uniform pruning that searches begin with. What the first search of a process imports is timed on its own. Rows are kept,
and not made again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import autoprune
from autoprune.data.batch import Batch, default_forward, pieces
from autoprune.evaluators import Context, Evaluator
from autoprune.evaluators.refit.normalisation import Correction
from autoprune.execution import Finished, LocalExecutor
from autoprune.imports import import_late_ones
from autoprune.pareto import hypervolume
from autoprune.protocols import OK
from autoprune.result import SearchResult
from autoprune.structure.slicing.slicing import Slicer
from benchmarks.evaluators.compensation import Block, plain
from benchmarks.support.common import RESULTS, environment, table, write
from benchmarks.support.trained import FOLDER, Part, train, trained

COMMAND = "python -m benchmarks.evaluators.search_cost"
STORED = RESULTS / "search_cost.json"
AIM, FRONT_AIM = 0.5, 0.99
TRIALS = 100
BARE_BATCH = 128
EVERY = 8  # candidate is run bare
SEEDED = 3  # trials that every search begins with: uniform pruning
WORDS, LENGTH, CLASSES = 64, 32, 8


@dataclass(frozen=True)
class Case:
    """A trained network with its data.

    Attributes:
        model: In evaluation mode.
        data: Inputs and labels of ``"train"``, ``"validation"`` and ``"test"``.
        space: What is pruned.
    """

    model: nn.Module
    data: dict[str, Part]
    space: autoprune.Channels


class Encoder(nn.Module):
    """Tokens (n, 32) to classes: embeddings and positions, three blocks of attention, and the first token's output."""

    def __init__(self, width: int = 64, heads: int = 4, inner: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.positions = nn.Parameter(0.1 * torch.randn(1, LENGTH, width))
        self.blocks = nn.Sequential(*(Block(width, heads, inner) for _ in range(depth)))
        self.norm, self.pool, self.head = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.embed(tokens) + self.positions))
        return self.head(torch.tanh(self.pool(x[:, 0])))


def sentences(seed: int) -> dict[str, Part]:
    """Random words, in which the most frequent of eight families of words is the class; one label in ten is wrong."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, samples in (("train", 4096), ("validation", 1024), ("test", 1024)):
        labels = torch.randint(CLASSES, (samples,), generator=generator)
        own = torch.rand(samples, LENGTH, generator=generator) < 0.2
        family = torch.where(own, labels[:, None], torch.randint(CLASSES, (samples, LENGTH), generator=generator))
        tokens = family * (WORDS // CLASSES) + torch.randint(WORDS // CLASSES, (samples, LENGTH), generator=generator)
        wrong = torch.rand(samples, generator=generator) < 0.1
        parts[name] = tokens, torch.where(wrong, torch.randint(CLASSES, (samples,), generator=generator), labels)
    return parts


def encoder(seed: int) -> Case:
    data = sentences(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Encoder()
        path = FOLDER / f"encoder-{seed}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            train(model, data["train"], epochs=8, lr=0.003, seed=seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
    return Case(model.eval(), data, autoprune.Channels())


def vision_transformer(seed: int) -> Case:
    model, data = plain("vision transformer", seed)
    return Case(model, data, autoprune.Channels(ignore=["embed"]))


def convolutional(name: str, seed: int) -> Case:
    found = trained(name, seed)
    return Case(found.model, found.data, autoprune.Channels())


CASES: dict[str, Callable[[], Case]] = {
    "ResNet-20": lambda: convolutional("resnet20", 0),
    "MobileNetV2": lambda: convolutional("mobilenet_v2", 0),
    "vision transformer": lambda: vision_transformer(0),
    "encoder": lambda: encoder(0),
}


def clock() -> float:
    """Processor seconds of this process in user mode."""
    return os.times().user


class Timed:
    """A local executor that notes the processor time at its start and in its evaluations, and keeps the context."""

    name = "local"
    threads: int | None = None

    def __init__(self) -> None:
        self._own = LocalExecutor()
        self.submit, self.room, self.stop = self._own.submit, self._own.room, self._own.stop
        self.seconds, self.began = 0.0, 0.0

    def start(self, evaluator: Evaluator, context: Context, fresh: Evaluator) -> None:
        self.began, self.context = clock(), context
        self._own.start(evaluator, context, fresh)

    def gather(self) -> list[Finished]:
        began = clock()
        found = self._own.gather()
        self.seconds += clock() - began
        return found


def search(case: Case, seed: int, trials: int, executor: Any, before: bool = False) -> SearchResult:
    """A search at half of the FLOPs, with defaults."""
    parts = (case.data[part] for part in ("train", "validation", "test"))
    return autoprune.search(
        case.model,
        "flops <= 50%",
        autoprune.Data(*parts),
        space=case.space,
        trials=trials,
        seed=seed,
        early_stopping=False if before else "auto",
        execution=autoprune.Execution(executor=executor, progress=False),
    )


def volume(result: SearchResult) -> float:
    """Hypervolume of the front, by loss and FLOPs."""
    started = [trial for trial in result.trials if trial.id < SEEDED]
    front = np.array([[t.signal, t.costs["flops"]] for t in result.trials if t.status == OK and t.feasible])
    reference = np.array([max(t.signal for t in started), max(t.costs["flops"] for t in started) * (1 + 1e-9)])
    return hypervolume(front, reference)


@torch.no_grad()
def bare(context: Context, candidates: Sequence[tuple[int, ...]]) -> float:
    """Processor seconds of a forward pass of each candidate on calibration and validation samples, on average."""
    slicer, spent = Slicer(context.model), []
    samples = (*context.subsets.calibration, *context.subsets.validation)
    batches = [part for batch in joined(samples) for part in pieces(batch, BARE_BATCH)]
    for candidate in candidates:
        module = slicer.cut(context.structure.edit(context.space.pruning(list(candidate)))).eval()
        default_forward(module, batches[0])  # kernels of new shapes are made once
        began = clock()
        for batch in batches:
            default_forward(module, batch)
        spent.append(clock() - began)
    return float(np.mean(spent))


def joined(batches: Sequence[Batch]) -> list[Batch]:
    """All samples of batches (inputs, labels) as one batch."""
    inputs, labels = zip(*batches, strict=True)
    return [(torch.cat(inputs), torch.cat(labels))]


@contextmanager
def as_before() -> Iterator[None]:
    """Search with samples as they were drawn, and with statistics of all calibration samples."""
    whole = mock.patch.object(Correction, "converged", lambda self, *_: len(self.batches))
    with mock.patch("autoprune.study.setup.arranged", lambda subsets, *_: subsets), whole:
        yield


def imported() -> float:
    """Processor seconds of the imports that the first search of a process makes: of PyTorch, SciPy and scikit-learn."""
    began = clock()
    import_late_ones()
    for name in ("sklearn.ensemble", "sklearn.gaussian_process", "scipy.stats", "scipy.optimize", "scipy.interpolate"):
        import_module(name)
    return clock() - began


def measure(name: str, seed: int, trials: int, before: bool) -> dict[str, Any]:
    """One search, timed, and the bare passes of its candidates."""
    executor = Timed()
    case = CASES[name]()
    imports = imported()
    system = os.times().system
    began = clock()
    with as_before() if before else nullcontext():
        result = search(case, seed, trials, executor, before)
    spent = clock() - began
    system = os.times().system - system
    each = bare(executor.context, [trial.candidate for trial in result.trials[::EVERY]])
    return {
        "network": name,
        "seed": seed,
        "before": before,
        "trials": len(result.trials),
        "imports": imports,
        "system": system,
        "seconds": spent,
        "bare_seconds": each * trials,
        "whole": spent / each / trials,
        "evaluations": executor.seconds / each / trials,
        "set_up": (executor.began - began) / each / trials,
        "volume": volume(result),
        "loss": result.best().signal,
    }


def report(rows: list[dict[str, Any]]) -> str:
    lines = []
    for name in dict.fromkeys(row["network"] for row in rows):
        volumes = {row["seed"]: row["volume"] for row in rows if row["network"] == name and row["before"]}
        for before in (True, False):
            own = [row for row in rows if row["network"] == name and row["before"] == before]
            if own:
                means = [np.mean([row[key] for row in own]) for key in ("whole", "set_up", "evaluations")]
                front = [row["volume"] / volumes[row["seed"]] for row in own if row["seed"] in volumes]
                spent = [f"{np.mean([row[key] for row in own]):.1f} s" for key in ("seconds", "system", "bare_seconds")]
                equal = "" if before or not front else f"{np.mean(front):.2%}"
                kind = "before" if before else "now"
                lines.append([name, kind, len(own), *spent, *(f"{mean:.2f}" for mean in means), equal])
    columns = ["processor time", "of the system", "bare passes", "whole", "set-up", "evaluations", "hypervolume"]
    header = ["network", "", "seeds", *columns]
    return (
        "Processor time of searches of 100 trials at half of the FLOPs with defaults, in bare forward passes of their "
        "candidates; without imports, which take about a second once a process. Bare passes run on samples as the "
        "search arranges them: those of MobileNetV2 with channels last now, so that they take less, too. The aim is at "
        f"most {AIM} for the whole search, at {FRONT_AIM:.0%} of the hypervolume or more.\n\n"
        f"{table(header, lines)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=[*CASES])
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    where = environment(f"{COMMAND} --seeds {given.seeds}")
    rows = json.loads(STORED.read_text())["rows"] if STORED.exists() else []
    for name in given.networks:
        for seed, before in product(range(given.seeds), (True, False)):
            if not any((row["network"], row["seed"], row["before"]) == (name, seed, before) for row in rows):
                rows.append(measure(name, seed, TRIALS, before))
                write("search_cost", "Cost of a search", {"environment": where, "rows": rows}, report(rows))


if __name__ == "__main__":
    main()
