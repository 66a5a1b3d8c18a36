"""The training of a supernet: steps, schedule, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from autoprune.arguments import MOST_SEED, flag, positive, whole_number, why_no_function
from autoprune.data.batch import Batch, like_labelled, to_device
from autoprune.data.sampling import seeded, training_loader
from autoprune.evaluators.adaptive_bn import statistics
from autoprune.evaluators.protocol import Context
from autoprune.evaluators.training.checkpoint import WAY_OUT, read_same, write_checkpoint
from autoprune.evaluators.training.loader import Rounds, mixed, shuffled
from autoprune.evaluators.training.sandwich import Loss, Sandwich, random_candidates
from autoprune.evaluators.training.weights import load_weights, weights_of
from autoprune.files.access import MIB, shortened, sound

log = logging.getLogger(__name__)

MakeOptimizer = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer, int], LRScheduler]

MOST_TIMES_MODEL = 16
"""Largest size of a checkpoint in multiples of the model: optimizers keep several numbers of each weight."""

_FORM = {"identity": {str: object}, "step": int, "position": [int], "weights": {str: object}}

MOST_NORM = 1.0
"""Gradients are clipped to this norm in the default recipe."""


@dataclass(frozen=True)
class Recipe:
    """Recipe of training a supernet; the fields are the arguments of `Supernet`."""

    steps: int
    data: Any
    loss: Loss | None
    subnets: int
    optimizer: MakeOptimizer | None
    schedule: MakeSchedule | None
    lr: float
    batch_size: int
    checkpoint: Path | None
    checkpoint_steps: int
    mixed_precision: bool | None
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("subnets", 0), ("batch_size", 1), ("checkpoint_steps", 1)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0, MOST_SEED))
        object.__setattr__(self, "lr", positive("lr", self.lr))
        if self.mixed_precision is not None:
            flag("mixed_precision", self.mixed_precision, "or None")
        for name, arguments, form in (
            ("loss", 2, "loss(outputs, batch)"),
            ("optimizer", 1, "optimizer(parameters)"),
            ("schedule", 2, "schedule(optimizer, steps)"),
        ):
            function = getattr(self, name)
            if function is not None and (why := why_no_function(function, arguments, classes=name != "loss")):
                raise TypeError(f"{name} must be a function {form}, or None, {why}")


class Training:
    """Trains the weights of a model for all candidates of a space.

    The random draws of a step are seeded by its number, so no random state needs to be kept: after a checkpoint,
    training continues as if it had not stopped.

    Args:
        context: With the model given, which stays as it is.
        model: A private copy of it, trained in place.
        recipe: Settings of the training.
        identity: A checkpoint is resumed only if it was made with the same identity; JSON-ready.
    """

    def __init__(self, context: Context, model: nn.Module, recipe: Recipe, identity: Mapping[str, Any]) -> None:
        self._context, self._model, self._recipe, self._identity = context, model, recipe, identity
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self._parameters:
            raise ValueError("supernet needs parameters to train, but none requires gradients; set requires_grad first")
        self._device = device = self._parameters[0].device
        on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
        self._mixed = on_gpu if recipe.mixed_precision is None else recipe.mixed_precision
        make = recipe.optimizer or partial(torch.optim.AdamW, lr=recipe.lr)
        schedule = recipe.schedule or _falling
        self._optimizer = make(self._parameters)
        self._schedule = schedule(self._optimizer, recipe.steps)
        self._sandwich = Sandwich(context, model, recipe.loss, self._precision)
        self._step = 0

    def run(self) -> None:
        """Run the remaining steps.

        Raises:
            ValueError: If there is nothing to learn from, a loss is not finite, or the checkpoint is another's.
            FileFormatError: If the checkpoint is damaged.
        """
        recipe = self._recipe
        space = self._context.space
        rounds = self._resume()
        searched = self._context.subsets.calibration[0]
        smallest = space.canonical(space.sizes[None] - 1)
        modes = [(part, part.training) for part in self._model.modules()]
        log.info("training the supernet: %d of %d steps to go", recipe.steps - self._step, recipe.steps)
        while self._step < recipe.steps:
            batch = to_device(like_labelled(next(rounds), searched), self._device)
            seed = mixed(recipe.seed, self._step)
            with seeded(seed), torch.enable_grad():
                drawn = random_candidates(space, recipe.subnets, np.random.default_rng(seed))
                self._optimizer.zero_grad()
                losses = self._sandwich.step(batch, np.concatenate([smallest, drawn]))
                self._require_finite(losses)
                if recipe.optimizer is None:
                    nn.utils.clip_grad_norm_(self._parameters, MOST_NORM)
                self._optimizer.step()
                self._schedule.step()
            self._step += 1
            if self._step % recipe.checkpoint_steps == 0 or self._step == recipe.steps:
                log.info("step %d: loss %.4f of the largest, %.4f of the smallest", self._step, losses[0], losses[1])
                self._write(rounds.position)
        self._optimizer.zero_grad(set_to_none=True)
        for part, mode in modes:
            part.training = mode

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._mixed)

    def _require_finite(self, losses: Sequence[float]) -> None:
        names = ["the largest candidate", "the smallest candidate", *["a random candidate"] * self._recipe.subnets]
        for loss, name in zip(losses, names, strict=True):
            if not np.isfinite(loss):
                raise ValueError(
                    f"supernet training must have finite losses, but that of {name} is {loss} at step {self._step}; "
                    f"lower lr (now {self._optimizer.param_groups[0]['lr']:g}), leave out the smallest options of the "
                    "space, or look for NaN in the data"
                )

    def _resume(self) -> Rounds:
        """Resume from the checkpoint if there is one."""
        recipe = self._recipe
        position = (0, 0)
        if recipe.checkpoint is not None and recipe.checkpoint.exists():
            trained = sum(tensor.nbytes for tensor in (*self._model.parameters(), *self._model.buffers()))
            most = MOST_TIMES_MODEL * trained + 256 * MIB
            state = read_same(recipe.checkpoint, self._identity, _FORM, "a supernet", most)
            told = f"checkpoint {shortened(recipe.checkpoint)} is damaged, or of something else than a supernet"
            with sound(told, WAY_OUT):
                load_weights(self._model, state["weights"])
                first, second = state["position"]
                self._step = state["step"]
                position = (first, second)
                if self._step < recipe.steps:
                    self._optimizer.load_state_dict(state["optimizer"])
                    self._schedule.load_state_dict(state["schedule"])
        # A batch norm cannot take statistics of a single sample.
        return Rounds(self._source(), recipe.seed, position, least=2 if statistics(self._model) else 1)

    def _source(self) -> Iterable[Batch]:
        if self._recipe.data is not None:
            return training_loader(self._recipe.data, self._recipe.batch_size, "supernet")
        return shuffled(self._context.subsets.calibration)

    def _write(self, position: tuple[int, int]) -> None:
        if self._recipe.checkpoint is None:
            return
        state = {"identity": dict(self._identity), "step": self._step, "position": position}
        state["weights"] = weights_of(self._model)
        if self._step < self._recipe.steps:
            state |= {"optimizer": self._optimizer.state_dict(), "schedule": self._schedule.state_dict()}
        write_checkpoint(self._recipe.checkpoint, state)


def _falling(optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1 - step / steps)
