"""Rehearsal of a cache: the dense model is resumed at every cut, to find dependences that no trace shows."""

from __future__ import annotations

from typing import Any

import torch

from autoprune.arguments import said
from autoprune.data.batch import Batch, batch_size
from autoprune.evaluators.activation_cache.passes import VALIDATION, Pass, Place, Resumable
from autoprune.evaluators.activation_cache.plan import Plan
from autoprune.evaluators.activation_cache.resume_points import Cut
from autoprune.evaluators.activation_cache.store import Kept, tensors


@torch.no_grad()
def fault_of(model: Resumable, plan: Plan, batch: Batch) -> str | None:
    """Run a model on a batch as it is, with its calls intercepted, and resumed at every cut.

    Returns:
        The reason why it cannot be resumed; None if all outputs are equal to the last bit.
    """
    try:
        return _fault_of(model, plan, batch)
    except Exception as error:  # the model cannot be resumed, whatever the reason
        return said(error)


def _fault_of(model: Resumable, plan: Plan, batch: Batch) -> str | None:
    place = Place(VALIDATION, 0, batch_size(batch))
    kept: dict[str, Kept] = {}

    def keep(run: Pass, cut: Cut, outputs: Any) -> None:
        kept[cut.name] = Kept(0)
        run.fill(kept[cut.name], cut, outputs)

    def differs(run: Pass) -> bool:
        found = tensors(model.run(run, batch))
        return len(found) != len(expected) or not all(map(torch.equal, found, expected))

    expected = tensors(model.plain(batch))
    whole = Pass(plan, place, None, keep)
    if differs(whole):
        return "outputs differ when the calls of modules are intercepted"
    if whole.fault is not None:
        return whole.fault
    for cut in plan.cuts:
        resumed = Pass(plan, place, (cut, kept[cut.name]), lambda *_: None)
        if differs(resumed):
            return f"outputs differ when the model resumes behind {cut.name}"
        if resumed.fault is not None:
            return resumed.fault
    return None
