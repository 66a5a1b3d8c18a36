"""Calibration: a dense model on a few samples, which show what each of its units is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.data.batch import Batch, Forward, beginning
from autoprune.structure.slicing.skeleton import skeleton
from autoprune.structure.structure import Structure

WORK = 2**37
"""Multiply-accumulates of the dense model that are enough to rank units or options: some seconds of a core."""

RANKED = 128
"""Most samples for rankings by gradients; at most `FEWEST_RANKED` of a large model."""
FEWEST_RANKED = 8


@dataclass(frozen=True, eq=False)
class Calibration:
    """Dense model with the calibration data that criteria, expected losses and re-fits run it on.

    Attributes:
        model: Stays unchanged: copies of it run.
        structure: What can be removed from it.
        batches: Calibration data, on any device.
        forward: Runs a model on a batch.
        database_file: Where a layer database of it is kept, if one is asked for.
        seed: For labels drawn from its outputs.
        derived: Cached values computed from the others alone, by name.
    """

    model: nn.Module
    structure: Structure
    batches: Sequence[Batch]
    forward: Forward
    database_file: Path | None = None
    seed: int = 0
    derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def of(self, model: nn.Module) -> Calibration:
        """Take another model of the same structure, such as a copy."""
        return replace(self, model=model, database_file=None)

    def on(self, batches: Sequence[Batch]) -> Calibration:
        """Take other batches."""
        return replace(self, batches=batches, database_file=None)


def affordable(structure: Structure, least: int, most: int, passes: int = 1) -> int:
    """Number of samples for a ranking: fewer for a large model, whose samples are long or hold much information.

    Args:
        structure: Of the model.
        least: Samples that are taken in any case.
        most: Samples that are enough.
        passes: Forward passes whose work each sample takes; a backward pass takes that of two.
    """
    return int(min(most, max(least, WORK // max(passes * structure.macs, 1.0))))


def ranked_on(calibration: Calibration) -> list[Batch]:
    """Return the samples for rankings by gradients: the first ones, fewer of a large model."""
    return beginning(calibration.batches, affordable(calibration.structure, FEWEST_RANKED, RANKED, passes=2))


def private_copy(model: nn.Module) -> nn.Module:
    """Copy a model in evaluation mode, so that its forward may write to its buffers; parameters are shared."""
    copied = skeleton(model).eval()
    for module in copied.modules():
        module._buffers.update({key: None if x is None else x.clone() for key, x in module._buffers.items()})
    return copied
