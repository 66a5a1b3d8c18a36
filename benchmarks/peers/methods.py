"""The methods that `benchmarks.peers.comparison` compares, each from its own source, and how their networks are judged.

Every method prunes one trained network to all `BUDGETS`, and sees the same calibration and validation samples. All
networks are then treated alike: batch-norm statistics from the calibration samples, test score, fine-tune, statistics
again, test score.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
from torch import nn
from torch.nn import functional as F

from autoprune import Channels, Data, Execution, search
from autoprune.data.subsets import Subsets, materialise
from autoprune.evaluators.adaptive_bn import recalibrate
from autoprune.optimizers import uniform_seeds
from autoprune.protocols import Failure, FloatArray, IntArray
from autoprune.study.study import Study
from autoprune.testing.contexts import study_for
from benchmarks.support.trained import Trained, score, train
from tests.counting import counted_macs

BUDGETS = (0.70, 0.50, 0.30, 0.15)  # of the dense FLOPs
TRIALS = 200  # evaluations of each search, for each budget
FINETUNE_EPOCHS, FINETUNE_LR = 3, 0.003
BAND = 0.01  # EagleEye: strategies lie so close below the budget
POOL = 50_000  # EagleEye: strategies drawn at a time, most of which the band rejects
RATIOS = tuple((20 - i) / 20 for i in range(20))  # FastNAS: widths of a layer that are tried
STEPS = 200  # torch-pruning: about one channel a step on the networks here


@dataclass(frozen=True)
class Case:
    """A trained network, the samples that methods may use, and the seed of whatever they draw."""

    trained: Trained
    seed: int

    @cached_property
    def data(self) -> Data:
        parts = self.trained.data
        return Data(calibration=parts["train"], validation=parts["validation"], test=parts["test"])

    @cached_property
    def subsets(self) -> Subsets:
        """The very samples that a search of `data` with this seed draws."""
        return materialise(self.data, self.seed)

    @cached_property
    def dense_macs(self) -> int:
        return self.macs(self.trained.model)

    def macs(self, module: nn.Module) -> int:
        """Multiply-accumulates of one image by PyTorch's counter: the same judge for all methods."""
        image = self.subsets.calibration[0][0][:1]
        return counted_macs(module, lambda m: m(image))

    def study(self, space: Channels, evaluator: str = "adaptive_bn") -> Study:
        return study_for(
            self.trained.model,
            "flops <= 100%",
            self.data,
            metric="accuracy",
            space=space,
            evaluator=evaluator,
            seed=self.seed,
        )


@dataclass(frozen=True)
class Pruned:
    """One network for each budget, and the evaluations that all of them took together."""

    networks: Mapping[float, nn.Module]
    evaluations: int


Method = Callable[[Case], Pruned]


def every_width(criterion: str) -> Channels:
    return Channels(step=1, min_fraction=1e-9, criterion=criterion)


def shares(study: Study, candidates: IntArray) -> FloatArray:
    """FLOPs as a share of the dense network's."""
    flops = study.costs["flops"]
    return flops(candidates) / flops(np.zeros_like(candidates[:1]))


def accuracies(study: Study, candidates: IntArray) -> FloatArray:
    """Accuracy on the validation samples, with batch-norm statistics of each candidate's own."""
    measured = study.evaluator.evaluate(candidates)
    failed = [m.reason for m in measured if isinstance(m, Failure)]
    if failed:
        raise RuntimeError(f"a candidate could not be scored: {failed[0]}")
    return np.array([m.metric.mean() for m in measured if not isinstance(m, Failure)])


def uniform(case: Case, criterion: str, evaluator: str = "adaptive_bn") -> Pruned:
    """The same fraction of every group: the last such network over the budget, brought within it unit by unit.

    Only equal fractions would leave several points of a budget unused, because groups of equal size lose a unit
    together.
    """
    study = case.study(every_width(criterion), evaluator)
    networks = {}
    for share in BUDGETS:
        problem = replace(study.problem, limits=share * study.problem.limits, budget_range=None, seeds=None)
        networks[share] = study.evaluator.build(uniform_seeds(problem)[-1])
    return Pruned(networks, 0)


def eagleeye(case: Case) -> Pruned:
    """Random rates by L1, the best by accuracy under adaptive batch norm.

    Reference:
        Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning", ECCV 2020,
        arXiv:2007.02491, and its published code, with three departures. The rate range, which the authors set by hand
        for each budget, is the one that the band rejects least. The band is as wide as theirs (1 point) but lies below
        the budget instead of around it. Statistics are exact, where theirs keep a trace of the dense network's.
    """
    study = case.study(every_width("l1"))
    rng = np.random.default_rng(case.seed)
    networks = {}
    for share in BUDGETS:
        candidates = random_strategies(study, share, rng)
        networks[share] = study.evaluator.build(candidates[accuracies(study, candidates).argmax()])
    return Pruned(networks, TRIALS * len(BUDGETS))


def random_strategies(study: Study, share: float, rng: np.random.Generator) -> IntArray:
    """Networks whose groups each lose a fraction drawn from U(0, most), and whose FLOPs lie in the band."""
    sizes = study.problem.sizes  # with every width an option, also the number of units

    def draw(most: float) -> IntArray:
        drawn = (most * rng.random((POOL, len(sizes))) * sizes).astype(np.int64)
        found = shares(study, drawn)
        return drawn[(found > share - BAND) & (found <= share)]

    most = max(np.arange(1, 11) / 10, key=lambda rate: len(draw(rate)))
    kept = draw(most)
    while len(kept) < TRIALS:
        kept = np.concatenate([kept, draw(most)])
    return kept[:TRIALS]


def fastnas(case: Case) -> Pruned:
    """One threshold on the accuracy lost by each layer alone; a network as a whole is never scored.

    Every layer takes its narrowest width that, with all others dense, loses no more than the threshold, which is the
    lowest that meets the budget. One scan serves all budgets.

    Reference:
        The FastNAS mode of NVIDIA Model Optimizer, as its documentation describes it, with its 20 ratios of width, but
        without its rounding to 32 channels, which is the width of whole layers here.
    """
    study = case.study(Channels(options=RATIOS, min_fraction=1e-9))
    sizes = study.problem.sizes
    layer, option = np.array([(i, k) for i, size in enumerate(sizes) for k in range(1, size)]).T
    alone = np.zeros((len(layer) + 1, len(sizes)), dtype=np.int64)
    alone[np.arange(len(layer)), layer] = option
    *scores, dense = accuracies(study, alone)  # the last row is the dense network
    drops = np.full((len(sizes), sizes.max()), np.inf)
    drops[:, 0] = 0.0
    drops[layer, option] = dense - np.array(scores)
    drops = np.maximum.accumulate(drops, axis=1)
    thresholds = np.unique(drops[np.isfinite(drops)])
    candidates = (drops <= thresholds[:, None, None]).sum(axis=2) - 1
    cost = shares(study, candidates)
    return Pruned({b: study.evaluator.build(candidates[(cost <= b).argmax()]) for b in BUDGETS}, len(alone))


def require_torch_pruning() -> ModuleType:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("benchmarks.peers.comparison needs torch-pruning; install autoprune[bench]") from error
    return torch_pruning


def torch_pruning(case: Case, importance: str) -> Pruned:
    """Channels of least importance over all layers, a few at a time, until the budgets are met one after the other.

    Settings are the library's own (`max_pruning_ratio` is 1: a layer may end with a single channel); the classifier is
    ignored, as its examples do.

    Reference:
        Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, arXiv:2301.12900.
    """
    tp = require_torch_pruning()
    model = copy.deepcopy(case.trained.model)
    images = case.subsets.calibration[0][0]
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    scorer = getattr(tp.importance, importance)()
    pruner = tp.pruner.MagnitudePruner(
        model,
        images[:2],
        importance=scorer,
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=STEPS,
        ignored_layers=[head],
    )
    networks: dict[float, nn.Module] = {}
    for _ in range(STEPS):
        if isinstance(scorer, tp.importance.TaylorImportance):
            accumulate_gradients(model, case.subsets)
        pruner.step()
        share = case.macs(model) / case.dense_macs
        networks |= {b: copy.deepcopy(model) for b in BUDGETS if b not in networks and share <= b}
        if len(networks) == len(BUDGETS):
            return Pruned(networks, 0)
    raise RuntimeError(f"torch-pruning ended at {share:.0%} of the FLOPs of {case.trained.name}")


def accumulate_gradients(model: nn.Module, subsets: Subsets) -> None:
    """Leave the gradients of the loss on the calibration samples, under statistics of the batch, in the parameters."""
    model.train().zero_grad()
    for x, y in subsets.calibration:
        F.cross_entropy(model(x), y).backward()
    model.eval()


def ours(case: Case, optimizer: str) -> Pruned:
    """One search for each budget, with the defaults of the library but for the optimizer named."""
    networks, evaluations = {}, 0
    for share in BUDGETS:
        result = search(
            case.trained.model,
            f"flops <= {share:.0%}",
            case.data,
            metric="accuracy",
            optimizer=optimizer,
            trials=TRIALS,
            seed=case.seed,
            execution=Execution(progress=False),
        )
        networks[share] = result.build()
        evaluations += len(result.trials)
    return Pruned(networks, evaluations)


def judge(case: Case, method: Method) -> dict[str, Any]:
    """Prune, and score each network on the test images before and after the one fine-tune.

    Seconds are those of the processor, which other programs lengthen less than those on the wall.
    """
    began = time.process_time()
    pruned = method(case)
    seconds = time.process_time() - began
    budgets = {}
    for share, module in pruned.networks.items():
        reached = case.macs(module) / case.dense_macs
        if reached > share:
            raise RuntimeError(f"{reached:.1%} of the FLOPs of {case.trained.name} for a budget of {share:.0%}")
        before = score_recalibrated(case, module)
        train(module, case.trained.data["train"], FINETUNE_EPOCHS, FINETUNE_LR, case.seed)
        budgets[f"{share:.0%}"] = {"flops": reached, "before": before, "after": score_recalibrated(case, module)}
    return {"evaluations": pruned.evaluations, "cpu_seconds": round(seconds, 2), "budgets": budgets}


def score_recalibrated(case: Case, module: nn.Module) -> dict[str, float]:
    recalibrate(module, case.subsets.calibration, lambda batch: module(batch[0]))
    accuracy, loss = score(module, case.trained.data["test"])
    return {"accuracy": accuracy, "loss": loss}
