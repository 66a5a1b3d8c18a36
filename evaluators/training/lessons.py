"""Lessons: the loss of a network in training on a batch, with what a better network makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.data.batch import Batch, Forward, fresh
from autoprune.evaluators.training.distillation import lesson_loss
from autoprune.evaluators.training.features import Features, Slices
from autoprune.evaluators.training.teachers import Better
from autoprune.metrics.judge import Judge
from autoprune.metrics.scorers import main_output

Loss = Callable[[Any, Batch], Tensor]
"""``loss(outputs, batch)``: a scalar, lower is better."""

LossOf = Callable[[Batch], Tensor]
"""Loss of the module in training on a batch, a scalar with gradients."""


@dataclass(frozen=True)
class Lessons:
    """All that a network learns from.

    Attributes:
        source: Batches on its device, which can be iterated again.
        judge: Says how outputs are compared, and whether its signal is a loss on labels.
        forward: Runs a module on a batch.
        better: Gives the outputs of a better network for a batch, or None for those that it has none for.
        dense: The better network, whose inner features are compared, too; None to compare outputs alone.
        loss: Of the user's, in place of the loss on labels.
        inner: Weight of the distance of inner features.
    """

    source: Iterable[Batch]
    judge: Judge
    forward: Forward
    better: Better
    dense: nn.Module | None = None
    loss: Loss | None = None
    inner: float = 1.0

    @contextmanager
    def of(self, module: nn.Module, slices: Slices) -> Iterator[LossOf]:
        """Make the loss of a module; inside, its outputs and those of the dense one are watched.

        Args:
            module: In training.
            slices: Units of the dense model that it keeps.

        Raises:
            ValueError: When the loss is called, if there is nothing to learn.
        """
        if self.dense is None:
            yield partial(self._outer, module)
            return
        features = Features(self.dense, module, slices)
        with features.watching(self.dense) as theirs, features.watching(module) as ours:

            def loss(batch: Batch) -> Tensor:
                theirs.clear()
                ours.clear()
                assert self.dense is not None
                with torch.no_grad():
                    better = main_output(self.forward(self.dense, batch))
                return self._whole(module, batch, better, lambda: features.distance(ours, theirs))

            yield loss

    def _outer(self, module: nn.Module, batch: Batch) -> Tensor:
        return self._whole(module, batch, self.better(batch), lambda: None)

    def _whole(
        self, module: nn.Module, batch: Batch, better: Tensor | None, inner: Callable[[], Tensor | None]
    ) -> Tensor:
        outputs = self.forward(module, batch)
        outer = lesson_loss(self.judge, outputs, batch, better, labels=self.loss is None)
        own = None if self.loss is None else self.loss(outputs, fresh(batch))
        between = inner()
        found = [outer, own, None if between is None else self.inner * between]
        parts = [part for part in found if part is not None]
        if not parts:
            raise ValueError(
                "a training needs something to learn from, but there are neither labels that the metric has a loss on "
                "nor outputs to compare; pass teacher=, the dense model, or loss=, a function of (outputs, batch)"
            )
        return torch.stack(parts).sum()
