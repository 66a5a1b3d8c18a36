"""Recipe of a training that brings back what pruning took: for `recover`, fine-tuning, rungs and audits alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from autoprune.arguments import MOST_SEED, flag, is_number, one_of, positive, shown, whole_number, why_no_function
from autoprune.data.batch import Forward
from autoprune.evaluators.training.lessons import Loss
from autoprune.evaluators.training.parameters import Train
from autoprune.metrics.losses import name_of

if TYPE_CHECKING:
    from autoprune.evaluators.recovery.receipt import Recovered

Distill = Literal["auto", "inner", "logits", "none"]
Schedule = Literal["cosine", "linear", "constant"]
MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]

LR = {"all": 1e-3, "norm+bias": 1e-2, "lora": 3e-3}
"""Largest learning rate by what is trained: fewer parameters must change more."""


@dataclass(frozen=True, eq=False)
class Recovery:
    """Recipe of a training after pruning.

    ``Recovery(...)(small)`` trains in place and returns the receipt, so that a recipe with its `data` is also the
    ``train_fn`` of `autoprune.audit` and of `autoprune.evaluators.FineTune`, which may use it with rungs.

    Attributes:
        data: Samples to learn from: a `Data`, whose calibration source is trained on and whose validation source
            chooses the best weights, or any source of batches, such as a DataLoader or arrays ``(X, y)``, without
            validation.
        teacher: The dense model; it stays as it is.
        train: ``"all"`` parameters, ``"norm+bias"`` (those of at most one dimension), or ``"lora"``: these and low-rank
            changes of the weights, which are merged after every step.
        steps: Optimizer steps.
        steps_to: Number of nested networks from the dense one to `small`, each trained for an equal share of the steps,
            from the weights of the one before, which are re-fitted on calibration samples; 1 trains `small` alone. More
            need a `teacher`, whose weights the first network takes.
        distill: ``"inner"``: learn the teacher's outputs and its inner features, where widths differ on the units kept;
            ``"logits"``: its outputs alone; ``"none"``. ``"auto"`` is ``"inner"`` where there is a teacher.
        loss: ``loss(outputs, batch)`` in place of the loss on labels, which is that of the metric.
        metric: Scores validation samples; as for `autoprune.search`.
        forward: ``forward(model, batch)`` runs a model and returns the outputs that matter.
        lr: Largest learning rate; by default `LR` of `train`, which suits pretrained networks. Small networks with
            batch norm recover more at ten times that (Le and Hua, ICLR 2021, arXiv:2105.03193).
        optimizer: ``optimizer(parameters)`` makes another one than AdamW.
        schedule: Of the learning rate after the warm-up: ``"cosine"`` or ``"linear"``, which end at 0, or
            ``"constant"``.
        warmup: Share of the steps in which the learning rate rises.
        batch_size: For arrays and datasets.
        accumulate: Batches of each step.
        most_norm: Gradients are clipped to this norm; None for none.
        ema: Decay of an exponential moving average of the weights, which is what is scored and kept; None for none.
        mixed_precision: Forward passes in bfloat16; by default on GPUs that have it.
        rank: Of low-rank changes.
        every: Steps between validations, checkpoints and log records; by default a twentieth of the steps.
        patience: Stop after this number of validations without a better one; None never stops.
        keep_zeros: Let zeros of weights stay zero, as those of the sparsity space must.
        checkpoint: File for the state of the training, from which the same call continues to the same bits.
        seed: Of all random draws.
    """

    data: Any = None
    teacher: nn.Module | None = None
    train: Train = "all"
    steps: int = 1000
    steps_to: int = 1
    distill: Distill = "auto"
    loss: Loss | None = None
    metric: Any = "auto"
    forward: Forward | None = None
    lr: float | None = None
    optimizer: MakeOptimizer | None = None
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    batch_size: int = 64
    accumulate: int = 1
    most_norm: float | None = 1.0
    ema: float | None = None
    mixed_precision: bool | None = None
    rank: int = 4
    every: int | None = None
    patience: int | None = None
    keep_zeros: bool = True
    checkpoint: str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "steps_to", "batch_size", "accumulate", "rank"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        for name in ("every", "patience"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name), 1, why=", or None"))
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0, MOST_SEED))
        for name in ("lr", "most_norm"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, positive(name, getattr(self, name), " or None"))
        for name, words in (("train", Train), ("distill", Distill), ("schedule", Schedule)):
            one_of(name, getattr(self, name), get_args(words))
        _require_share("warmup", self.warmup)
        if self.ema is not None:
            _require_share("ema", self.ema)
        flag("keep_zeros", self.keep_zeros)
        if self.mixed_precision is not None:
            flag("mixed_precision", self.mixed_precision, "or None")
        for name, form in (
            ("loss", "loss(outputs, batch)"),
            ("forward", "forward(model, batch)"),
            ("optimizer", "optimizer(parameters)"),
        ):
            function, count = getattr(self, name), 1 + (name != "optimizer")
            if function is not None and (why := why_no_function(function, count, classes=name == "optimizer")):
                raise TypeError(f"{name} must be a function {form}, or None, {why}")
        if self.teacher is not None and not isinstance(self.teacher, nn.Module):
            raise TypeError(f"teacher must be the dense model, or None, got {shown(self.teacher)}")
        if self.steps_to > self.steps:
            raise ValueError(f"steps_to must be at most steps, {self.steps}, got {self.steps_to}")

    def __call__(self, small: nn.Module, steps: int | None = None) -> Recovered:
        """Train a model in place, for `steps` steps if they are given, and return the receipt; see `recover`."""
        from autoprune.evaluators.recovery.run import recovered

        return recovered(self if steps is None else replace(self, steps=steps), small)

    def require_teacher(self) -> None:
        """Check that there is a teacher if the recipe needs one.

        Raises:
            ValueError: Names the setting that needs it.
        """
        if self.teacher is None and (self.distill in ("inner", "logits") or self.steps_to > 1):
            needs = f"steps_to={self.steps_to}" if self.steps_to > 1 else f"distill={self.distill!r}"
            raise ValueError(f"{needs} needs teacher=, the dense model, got None")

    @property
    def settings(self) -> dict[str, Any]:
        """Plain settings that the weights depend on, JSON-ready."""
        left_out = ("data", "teacher", "loss", "metric", "forward", "optimizer", "checkpoint")
        named = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in left_out}
        return {**named, "optimizer": None if self.optimizer is None else name_of(self.optimizer)}

    @property
    def interval(self) -> int:
        """Steps between validations."""
        return self.every or max(1, self.steps // 20)

    @property
    def inner(self) -> bool:
        """True if inner features are compared."""
        return self.distill == "inner" or (self.distill == "auto" and self.teacher is not None)

    def make_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimizer of some parameters."""
        if self.optimizer is not None:
            return self.optimizer(parameters)
        return torch.optim.AdamW(parameters, self.lr or LR[self.train])


def _require_share(name: str, value: Any) -> None:
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number of at least 0 and below 1, got {shown(value)}")
