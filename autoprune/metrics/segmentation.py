"""Scores of dense prediction: overlap of predicted and labelled classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoprune.data.batch import Batch, targets
from autoprune.metrics.scorers import NO_LABEL, known_labels, main_output


def mean_iou(forward: Callable[[Batch], Any], batches: Sequence[Batch]) -> float:
    """Compute the mean over classes of intersection over union, in [0, 1], over all positions that have a label.

    A class that is neither labelled nor predicted anywhere is left out. Labels of 255 and -100 are none. Logits of
    another size than the labels are interpolated, as is usual.

    Args:
        forward: Gives logits (n, classes, ...) for a batch.
        batches: With labels (n, ...).

    Reference:
        Everingham et al., "The PASCAL Visual Object Classes Challenge", IJCV 2015, section 2.2; over the whole set.
    """
    counts: Tensor | None = None
    for batch in batches:
        logits = main_output(forward(batch))
        classes = logits.shape[1]
        labels = known_labels(targets(batch), classes).to(logits.device)
        found = _resized(logits, labels).argmax(1)
        valid = labels != NO_LABEL
        pairs = torch.bincount(labels[valid] * classes + found[valid], minlength=classes**2).cpu()
        counts = pairs if counts is None else counts + pairs
    assert counts is not None
    table = counts.double().reshape(round(len(counts) ** 0.5), -1)
    union = table.sum(0) + table.sum(1) - table.diagonal()
    return float((table.diagonal() / union)[union > 0].mean())


def _resized(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[2:] == labels.shape[1:]:
        return logits
    return F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
