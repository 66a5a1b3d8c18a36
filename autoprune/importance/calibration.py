"""Calibration: a dense model on a few samples, which show what each of its units is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from autoprune.data.batch import Batch, Forward
from autoprune.structure.structure import Structure


@dataclass(frozen=True, eq=False)
class Calibration:
    """Dense model with the calibration data that criteria, expected losses and re-fits run it on.

    Attributes:
        model: Stays unchanged: copies of it run.
        structure: What can be removed from it.
        batches: Calibration data, on any device.
        forward: Runs a model on a batch.
    """

    model: nn.Module
    structure: Structure
    batches: Sequence[Batch]
    forward: Forward

    def of(self, model: nn.Module) -> Calibration:
        """Take another model of the same structure, such as a copy."""
        return replace(self, model=model)

    def on(self, batches: Sequence[Batch]) -> Calibration:
        """Take other batches."""
        return replace(self, batches=batches)
