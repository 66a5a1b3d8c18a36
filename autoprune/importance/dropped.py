"""Loss of dropped parts: the change of the dense model's outputs without a branch or block, measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from autoprune.data.batch import Batch, beginning, pieces
from autoprune.importance.calibration import Calibration, affordable
from autoprune.metrics.scorers import distance_of, main_output
from autoprune.protocols import FloatArray, Pruning
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


@torch.no_grad()
def _outputs(calibration: Calibration, module: Any, batches: Sequence[Batch]) -> list[Any]:
    return [calibration.forward(module, batch) for batch in batches]
