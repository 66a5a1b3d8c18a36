"""One step of training for all candidates of a space at once, on the weights that they share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.data.batch import Batch, fresh
from autoprune.evaluators.protocol import Context
from autoprune.evaluators.training.distillation import lesson_loss
from autoprune.metrics.scorers import main_output
from autoprune.protocols import IntArray, SearchSpace
from autoprune.structure.slicing.slicing import Edit, Slicer

Loss = Callable[[Any, Batch], Tensor]
"""``loss(outputs, batch)``: a scalar, lower is better."""

SPREAD = 0.25
"""Spread of a dimension around the common level of a random candidate, as a share of its options."""


class Sandwich:
    """Gathers the gradients of several candidates on the weights of one model.

    Args:
        context: The space, the judge, the forward, and the model given, from which the largest candidate learns.
        model: Whose parameters get the gradients; the largest candidate.
        loss: Of the user's, in place of the loss on labels.
        precision: Makes the context in which forward passes run.
    """

    def __init__(
        self,
        context: Context,
        model: nn.Module,
        loss: Loss | None,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._context, self._model, self._loss, self._precision = context, model, loss, precision
        self._given = Slicer(context.model).cut(Edit({}, {})).eval()
        self._slicer = Slicer(model)
        self._parameters = dict(model.named_parameters())

    def step(self, batch: Batch, candidates: IntArray) -> list[float]:
        """Add the gradients of the largest candidate and of others; the weights stay.

        The largest learns from the labels and from the model given; the others from the largest, on the same batch.

        Args:
            batch: What to learn from.
            candidates: The others, shape (n, d).

        Returns:
            Their losses, the largest's first. Gradients are usable only if all are finite.

        Raises:
            ValueError: If there is nothing to learn.
        """
        judge = self._context.judge
        with torch.no_grad(), self._precision():
            given = main_output(self._run(self._given, batch)) if judge.distance is not None else None
        outputs, losses = self._learn(self._model.train(), batch, given, labels=True)
        better = None if judge.distance is None else main_output(outputs).detach()
        self._slicer.rerank()
        for candidate in candidates:
            edit = self._context.structure.edit(self._context.space.pruning(candidate.tolist()))
            module = self._slicer.cut(edit).train()
            losses += self._learn(module, batch, better, labels=better is None)[1]
            self._collect(module, edit)
        return torch.stack(losses).tolist()

    def _run(self, module: nn.Module, batch: Batch) -> Any:
        return self._context.forward(module, batch)

    def _learn(self, module: nn.Module, batch: Batch, better: Tensor | None, labels: bool) -> tuple[Any, list[Tensor]]:
        """One forward and one backward pass; the outputs and the loss."""
        judge = self._context.judge
        with self._precision():
            outputs = self._run(module, batch)
            parts = [lesson_loss(judge, outputs, batch, better, labels=labels and self._loss is None)]
            if labels and self._loss is not None:
                parts.append(self._loss(outputs, fresh(batch)))
        found = [part for part in parts if part is not None]
        if not found:
            raise ValueError(
                "supernet finds neither labels nor outputs to compare; pass Supernet(loss=...), a function of "
                "(outputs, batch)"
            )
        loss = torch.stack(found).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        return outputs, [loss.detach()]

    @torch.no_grad()
    def _collect(self, module: nn.Module, edit: Edit) -> None:
        """Add the gradients of a pruned module to those of the shared model; shared parameters have them already."""
        for name, part in module.named_parameters():
            whole = self._parameters[name]
            if part is whole or part.grad is None:
                continue
            gradient = part.grad * (part != 0) if name in edit.zeroed else part.grad
            for dim, index in edit.slices.get(name, {}).items():
                shape = [*gradient.shape]
                shape[dim] = whole.shape[dim]
                rows = torch.from_numpy(index).to(gradient.device)
                gradient = gradient.new_zeros(shape).index_copy_(dim, rows, gradient)
            whole.grad = gradient if whole.grad is None else whole.grad.add_(gradient)


def random_candidates(space: SearchSpace, n: int, generator: np.random.Generator) -> IntArray:
    """Candidates around random levels, shape (n, d), so that costs spread over the whole range.

    Dimensions drawn on their own would average out, and nearly all candidates cost about the same.
    """
    sizes = space.sizes
    strays = generator.uniform(-SPREAD, SPREAD, (n, len(sizes)))
    levels = np.clip(generator.random((n, 1)) + strays, 0, 1)
    return space.canonical(np.minimum((levels * sizes).astype(np.int64), sizes - 1))
