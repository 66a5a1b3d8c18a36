"""Parts of a cache that all candidates of one skeleton share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from autoprune.data.batch import Batch, batch_size, pieces
from autoprune.data.sampling import seeded
from autoprune.evaluators.activation_cache.calibrated import Calibrated
from autoprune.evaluators.activation_cache.passes import CALIBRATION, VALIDATION, Place, Resumable
from autoprune.evaluators.activation_cache.plan import Plan, plan_of
from autoprune.evaluators.activation_cache.rehearsal import fault_of
from autoprune.evaluators.activation_cache.store import Store
from autoprune.evaluators.protocol import Context

log = logging.getLogger(__name__)

_FEW = 2  # samples of a rehearsal


@dataclass
class Shared:
    """Everything that candidates cut from one skeleton have in common.

    Attributes:
        plan: The resume points.
        model: The skeleton.
        store: Outputs of its modules.
        calibrated: Results of calibrations.
        places: Places of the batches in the data, by the identities of the batches.
        samples: Number of samples of each part of the data.
        on: False if nothing can be shared, or sharing was given up.
    """

    plan: Plan
    model: Resumable
    store: Store
    calibrated: Calibrated
    places: Mapping[int, Place]
    samples: Mapping[str, int]
    on: bool

    @classmethod
    def of(cls, context: Context, module: nn.Module, memory_bytes: int) -> Shared:
        """Plan the resume points of a model, and rehearse them on a few samples.

        Args:
            context: With the dense model.
            module: The skeleton that candidates are cut from, dense now.
            memory_bytes: Most memory for outputs.
        """
        subsets = context.subsets
        plan = plan_of(context, memory_bytes)
        parts = {CALIBRATION: subsets.calibration, VALIDATION: subsets.validation}
        shared = cls(
            plan=plan,
            model=Resumable(module, context.forward, plan.watched),
            store=Store(memory_bytes),
            calibrated=Calibrated(module),
            places={
                id(batch): Place(part, i, batch_size(batch))
                for part, batches in parts.items()
                for i, batch in enumerate(batches)
            },
            samples={part: subsets.samples[part] for part in parts},
            on=bool(plan.cuts),
        )
        if shared.on:
            with seeded(0):
                fault = fault_of(shared.model, plan, pieces(subsets.validation[0], _FEW)[0])
            if fault is not None:
                shared.stop(fault)
        return shared

    def place(self, batch: Batch) -> Place | None:
        """Place of a batch in the data; None for another, such as a half of one."""
        return self.places.get(id(batch))

    def batches(self, part: str) -> int:
        """Number of batches of a part of the data."""
        return sum(place.part == part for place in self.places.values())

    def stop(self, reason: str) -> None:
        """Give sharing up; the first reason is logged."""
        if self.on:
            log.warning("candidates share no computation from here on: %s", reason)
            self.on = False
            self.store.clear()
