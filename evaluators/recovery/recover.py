"""Recovery of a pruned model: the function that users call."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.arguments import pointing, shown
from autoprune.evaluators.recovery.receipt import Recovered
from autoprune.evaluators.recovery.recovery import Recovery
from autoprune.evaluators.recovery.run import recovered
from autoprune.evaluators.training.parameters import Train


@pointing({part.name: f"recipe=autoprune.Recovery({part.name}=...)" for part in fields(Recovery)})
def recover(
    small: nn.Module,
    data: Any = None,
    teacher: nn.Module | None = None,
    *,
    train: Train | None = None,
    steps: int | None = None,
    steps_to: int | None = None,
    checkpoint: str | Path | None = None,
    recipe: Recovery | None = None,
) -> Recovered:
    """Train a pruned model in place, to bring back what pruning took, and return the receipt.

    AdamW with a warm-up and a cosine learns from labels, where the metric has a loss on them, and from the teacher.
    With validation samples the best weights are kept. A loss that is NaN ends the training, with its step in the
    receipt; the last good weights are kept, as at Ctrl-C.

    Args:
        small: Module from ``result.build()``, or any other. Training modes, gradients and flags come back as they were.
        data: ``autoprune.Data(calibration=train, validation=..., test=...)``, or any source of training samples.
        teacher: The dense model, to learn its outputs and inner features from.
        train: ``"all"`` parameters, ``"norm+bias"`` or ``"lora"``.
        steps: Optimizer steps.
        steps_to: Number of nested networks from the dense one to `small` that share the steps.
        checkpoint: File to continue from after an interruption; at most one interval is lost.
        recipe: All other settings, and defaults of those above.

    Returns:
        What was trained, losses, and the score before and after with its interval.

    Raises:
        UnsupportedModelError: If `small` is scripted, quantised or on several devices, or the teacher is on another.
        DataError: If there is nothing to learn from, or the metric does not fit.
        ValueError: If a setting is out of range, or the checkpoint is of another training.
        FileFormatError: If the checkpoint is damaged.

    Reference:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, at temperature 1;
        Aflalo et al., arXiv:2002.08258, for inner features; Zimmer et al., arXiv:2312.15230, for few parameters.

    Example:
        >>> receipt = autoprune.recover(small, data, teacher=model, steps=500)  # doctest: +SKIP
        >>> print(receipt)  # doctest: +SKIP
    """
    if not isinstance(small, nn.Module):
        raise TypeError(f"small must be an nn.Module, such as result.build() gives, got {shown(small)}")
    if recipe is not None and not isinstance(recipe, Recovery):
        raise TypeError(f"recipe must be an autoprune.Recovery, or None, got {shown(recipe)}")
    given = {"data": data, "teacher": teacher, "train": train, "steps": steps, "steps_to": steps_to}
    given["checkpoint"] = checkpoint
    settings = {name: value for name, value in given.items() if value is not None}
    return recovered(replace(recipe or Recovery(), **settings), small, keep_going=True)
