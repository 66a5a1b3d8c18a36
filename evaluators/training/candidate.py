"""Training of one candidate in fine-tuning: by the default recipe, which can pause and continue, or by the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from autoprune.data.batch import Batch
from autoprune.data.sampling import Randomness, seeded
from autoprune.evaluators.protocol import Context
from autoprune.evaluators.training.distillation import lesson_loss

TrainFn = Callable[[nn.Module, int], None]
"""``train_fn(model, steps)`` trains a model in place for `steps` optimizer steps."""

Masks = Mapping[nn.Parameter, Tensor]
"""Elements of each parameter that may differ from zero."""

MOST_NORM = 1.0
"""Gradients are clipped to this norm: the first steps of a network just cut may be steep."""


class Course(Protocol):
    """The training of one module, in place.

    Attributes:
        module: The module in training.
        taken: Steps so far.
    """

    module: nn.Module
    taken: int

    def go_on(self, steps: int) -> None:
        """Train until `steps` steps are taken in total."""
        ...


class Distillation:
    """Default recipe, with the batches in a new random order in each round.

    A training in several parts gives the same weights as one without a pause.

    Args:
        context: Says how to run the module, and what its loss is.
        module: Trained in place.
        masks: Elements that stay zero.
        lessons: Batches, each with the outputs of the dense model.
        steps: Steps of the whole training; the learning rate falls linearly to 0.
        lr: Initial learning rate.
        seed: Seed of all random draws.
    """

    def __init__(
        self,
        context: Context,
        module: nn.Module,
        masks: Masks,
        lessons: Sequence[tuple[Batch, Tensor | None]],
        steps: int,
        lr: float,
        seed: int,
    ) -> None:
        self.module = module
        self.taken = 0
        self._context, self._masks, self._lessons = context, masks, lessons
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: 1 - step / steps)
        self._randomness = Randomness(seed)
        self._order: list[int] = []

    def go_on(self, steps: int) -> None:
        """Train until `steps` steps are taken in total."""
        self.module.train()
        with self._randomness.resumed(), torch.enable_grad():
            while self.taken < steps:
                self._step()
                self.taken += 1

    def _step(self) -> None:
        self._order = self._order or torch.randperm(len(self._lessons)).tolist()
        batch, dense = self._lessons[self._order.pop()]
        self._optimizer.zero_grad()
        loss = lesson_loss(self._context.judge, self._context.forward(self.module, batch), batch, dense)
        assert loss is not None
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        nn.utils.clip_grad_norm_(self._parameters, MOST_NORM)
        self._optimizer.step()
        self._schedule.step()
        mask(self._masks)


class Given:
    """Recipe of the user; it runs once."""

    def __init__(self, module: nn.Module, masks: Masks, train_fn: TrainFn, seed: int) -> None:
        self.module = module
        self.taken = 0
        self._masks, self._train_fn, self._seed = masks, train_fn, seed

    def go_on(self, steps: int) -> None:
        """Train for `steps` steps; called once."""
        with seeded(self._seed), torch.enable_grad():
            self._train_fn(self.module, steps)
        self.taken = steps
        mask(self._masks)


@torch.no_grad()
def mask(masks: Masks) -> None:
    """Set elements back to zero."""
    for parameter, kept in masks.items():
        parameter.mul_(kept)
