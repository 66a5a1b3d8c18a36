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
    apart = None if better is None else _distance(judge, outputs, batch, better)
    if apart is not None:
        losses.append(apart.mean())
    loss = labels_loss_of(judge) if labels else None
    if loss is not None:
        losses.append(loss(outputs, batch, None)[0].mean())
    return torch.stack(losses).sum() if losses else None


def _distance(judge: Judge, outputs: Any, batch: Batch, better: Tensor) -> Tensor | None:
    """Distance to the better network, one value a sample: the one that steers the search, where there is one."""
    output = main_output(outputs)
    if judge.signal_is_distortion and judge.scorer is not None and len(better) == len(output):
        return judge.scorer(outputs, batch, better)[0]
    return None if judge.distance is None else judge.distance(output[: len(better)], better)
