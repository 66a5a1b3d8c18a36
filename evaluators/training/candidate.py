"""Training of one candidate in fine-tuning by a function of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from autoprune.data.sampling import seeded
from autoprune.evaluators.training.parameters import Masks, mask

TrainFn = Callable[[nn.Module, int], object]
"""``train_fn(model, steps)`` trains a model in place for `steps` optimizer steps."""


class Trainer(Protocol):
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
