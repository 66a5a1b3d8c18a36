"""Scores of a constant output, which a network must beat to be worth anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autoprune.data.batch import Batch, batch_size
from autoprune.metrics.judge import BoundForward, Judge, Scores, Weighing
from autoprune.metrics.scorers import main_output


def measure_constant(
    judge: Judge,
    run: BoundForward,
    batches: Sequence[Batch],
    known: Sequence[Tensor | None],
    weighing: Weighing | None = None,
) -> tuple[Scores, Scores]:
    """Measure the dense model, and one that returns the mean of its outputs over the samples for each of them.

    Args:
        judge: The metric; outputs must hold one tensor that it scores.
        run: Gives the outputs of the dense model for a batch.
        batches: Samples, with outputs of the same shape.
        known: The entries of `Judge.dense_outputs` for them; those that are there are not computed again.
        weighing: As in `Judge.measure`.

    Returns:
        The scores of the dense model, and those of the constant.

    Raises:
        Exception: Of a metric that needs more of the outputs than one tensor.
    """
    outputs = dict(zip(map(id, batches), known, strict=True))
    total: Tensor | None = None
    samples = 0

    def dense(batch: Batch) -> Any:
        nonlocal samples, total
        kept = outputs.get(id(batch))
        found = run(batch) if kept is None or len(kept) < batch_size(batch) else kept
        rows = main_output(found)
        added = rows.sum(0, dtype=torch.float64)
        total = added if total is None else total.add_(added)
        samples += len(rows)
        return found

    own = judge.measure(dense, batches, known, weighing)
    assert total is not None
    mean = (total / samples).float()

    def constant(batch: Batch) -> Any:
        return mean.expand(batch_size(batch), *mean.shape)

    return own, judge.measure(constant, batches, known, weighing)
