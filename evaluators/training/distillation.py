"""Targets of training in an evaluator: the outputs of a better network, and labels where the metric has a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autoprune.data.batch import Batch
from autoprune.metrics.judge import Judge, Scorer
from autoprune.metrics.scorers import main_output


def labels_loss_of(judge: Judge) -> Scorer | None:
    """Loss on labels of a judge: its signal, unless that compares with dense outputs or is a measure of the user's."""
    own = judge.per_sample and not judge.needs_dense and judge.proportion is not None
    return judge.labels_loss or (judge.scorer if own else None)


def lesson_loss(judge: Judge, outputs: Any, batch: Batch, better: Tensor | None, labels: bool = True) -> Tensor | None:
    """Distance to the outputs of a better network plus the loss on labels, mean over samples.

    Args:
        judge: Says how outputs are compared, and whether its signal is a loss on labels.
        outputs: Of the network that learns.
        batch: With the labels.
        better: Main output of the better network for the first samples of the batch, or None.
        labels: Whether to learn from labels, too.

    Returns:
        Their sum, a scalar, or None where there is neither.
    """
    losses = []
    if better is not None and judge.distance is not None:
        losses.append(judge.distance(main_output(outputs)[: len(better)], better).mean())
    loss = labels_loss_of(judge) if labels else None
    if loss is not None:
        losses.append(loss(outputs, batch, None)[0].mean())
    return torch.stack(losses).sum() if losses else None
