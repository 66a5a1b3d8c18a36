"""Loss of dropped parts: the change of the dense model's outputs without a branch or block, measured."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from autoprune.data.batch import Batch, beginning, pieces
from autoprune.importance.calibration import Calibration, affordable
from autoprune.metrics.scorers import distance_of, main_output
from autoprune.protocols import FloatArray, Pruning, SearchSpace
from autoprune.structure.slicing.slicing import Edit, Slicer

MOST_SAMPLES = 32
SHARED = 16
"""Networks that together may take the work of one ranking of units: there are as many as there are branches."""

_AT_ONCE = 8  # samples in one pass, which bounds its memory


def dropped_losses(calibration: Calibration, prunings: Sequence[Pruning]) -> FloatArray | None:
    """Measure how far outputs move from those of the dense model, for networks without some of its parts.

    Each network runs on the same samples, at most 32, fewer of a large model or of many networks. Nothing is re-fitted:
    a second-order estimate, which serves for single units, is far off where a whole block goes.

    Args:
        calibration: Labels only tell what the outputs are.
        prunings: With the branches that each network lacks.

    Returns:
        The mean distance of each, shape (n,), in the unit of `autoprune.metrics.scorers.distance_of`: nats where the
        outputs are logits, else the squared difference relative to their mean square; infinite where it is not a
        number. None where outputs do not compare by samples.
    """
    samples = affordable(calibration.structure, 1, MOST_SAMPLES, passes=-(-len(prunings) // SHARED))
    batches = [part for batch in beginning(calibration.batches, samples) for part in pieces(batch, _AT_ONCE)]
    slicer = Slicer(calibration.model)
    dense = _outputs(calibration, slicer.cut(Edit({}, {})).eval(), batches)
    distances = [distance_of(outputs, batch) for outputs, batch in zip(dense, batches, strict=True)]
    found = []
    for pruning in prunings:
        total: list[float] = []
        made = _outputs(calibration, slicer.cut(calibration.structure.edit(pruning)).eval(), batches)
        for outputs, reference, distance in zip(made, dense, distances, strict=True):
            if distance is None or main_output(outputs).shape != main_output(reference).shape:
                return None
            total += distance(outputs, reference).double().tolist()
        found.append(float(np.mean(total)))
    return np.where(np.isfinite(found), found, np.inf)


def drops_of(space: SearchSpace, dimension: int) -> list[Pruning]:
    """Prunings of the options of a dimension, if all but the dense one drop a branch; else none."""
    alone = np.zeros((space.sizes[dimension] - 1, len(space.sizes)), dtype=np.int64)
    alone[:, dimension] = np.arange(1, space.sizes[dimension])
    prunings = [space.pruning(candidate) for candidate in alone.tolist()]
    return prunings if all(pruning.dropped for pruning in prunings) else []


def measure_drops(drops: Mapping[int, list[Pruning]], losses: Sequence[FloatArray], calibration: Calibration) -> None:
    """Order branches by measured losses, in the unit of the others.

    The estimates of `losses`, for the units inside the branches, are of the right unit, and far off for what is as
    large as a branch; their median ratio to the measured losses converts these.
    """
    measured = dropped_losses(calibration, [pruning for prunings in drops.values() for pruning in prunings])
    if measured is None:
        return
    estimated = np.concatenate([losses[j][1:] for j in drops])
    finite = np.isfinite(measured)
    measured = np.where(finite, measured, 10 * measured[finite].max(initial=1.0))  # worse than all that can be told
    known = (estimated > 0) & (measured > 0) & finite
    scale = float(np.median(estimated[known] / measured[known])) if known.any() else 1.0
    ends = np.cumsum([len(prunings) for prunings in drops.values()])
    for j, each in zip(drops, np.split(scale * measured, ends[:-1]), strict=True):
        losses[j][1:] = each


def dearer(losses: Sequence[FloatArray], drops: Collection[int], factor: float) -> tuple[FloatArray, ...]:
    """Multiply the losses of the dimensions that drop branches."""
    return tuple(factor * row if j in drops else row for j, row in enumerate(losses))


@torch.no_grad()
def _outputs(calibration: Calibration, module: Any, batches: Sequence[Batch]) -> list[Any]:
    return [calibration.forward(module, batch) for batch in batches]
