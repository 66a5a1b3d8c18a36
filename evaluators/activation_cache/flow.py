"""Flow of a model: its forward pass is traced, and refused where parts of it may not be skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from autoprune.data.batch import Batch, Forward
from autoprune.evaluators.activation_cache.finder import Finder
from autoprune.evaluators.activation_cache.resume_points import Flow, NothingToShareError
from autoprune.evaluators.activation_cache.writes import watching
from autoprune.structure.example import Example
from autoprune.structure.owners import owners
from autoprune.structure.tracing.record import Op, Record
from autoprune.structure.tracing.trace import trace

_MOST_SHAPES = 8  # forms of batches that are traced; more of them, and nothing is shared


def flow_of(model: nn.Module, batches: Sequence[Batch], forward: Forward) -> Flow:
    """Trace every form of batch, and find the cuts.

    A pass of each form must draw no random numbers, call modules in the same order as those of other forms, and write
    no attributes of modules. One that cannot run on the meta device reads values, and may go another way for others:
    what its trace does not read counts as read before everything, and in every pass the modules that candidates change
    must be called in the order of the trace.

    Args:
        model: The dense model; comes back unchanged.
        batches: All that the model will be run on.
        forward: Runs a model on a batch.

    Raises:
        NothingToShareError: If a pass is not like this; says why.
    """
    forms = {_form(batch): batch for batch in batches}
    if len(forms) > _MOST_SHAPES:
        raise NothingToShareError(f"batches have {len(forms)} different forms")
    records = []
    for batch in forms.values():
        written: list[str] = []
        record = trace(Example(model, (batch,), forward=watching(forward, written)))
        if written:
            raise NothingToShareError(f"the forward pass writes the attribute {written[0]}")
        random = [op for op in record.ops if _draws(op)]
        if random:
            raise NothingToShareError(f"{random[0].where()} draws random numbers")
        records.append(record)
    sure = all(record.device == "meta" for record in records)
    agreed = _order if sure else _calls
    if any(agreed(record) != agreed(records[0]) for record in records):
        raise NothingToShareError("batches of different shapes take different ways through the model")
    hooked = {name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks}
    holders = {owner.module for owner in owners(model)}
    flow = Finder(records[0], hooked, holders, decides=not sure).flow()
    return flow if sure else replace(flow, calls=tuple(_calls(records[0])))


def _draws(op: Op) -> bool:
    """Return whether an operation draws random numbers, as fused attention does with dropout alone."""
    return torch.Tag.nondeterministic_seeded in op.func.tags and op.args.get("dropout_p") != 0


def _form(batch: Batch) -> str:
    """Form of a batch: everything that Python code can see without reading values."""
    leaves, tree = tree_flatten(batch)
    seen = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor | np.ndarray) else type(x) for x in leaves]
    return f"{tree} {seen}"


def _calls(record: Record) -> list[str]:
    """Modules that run operations, in the order in which a pass calls them, outer ones before those inside."""
    ran = [call for call in record.calls if call.first < call.last]
    return [call.name for call in sorted(ran, key=lambda call: (call.first, -call.last, call.name.count(".")))]


def _order(record: Record) -> list[Any]:
    """Operations, their parameters and the module calls of a pass: these must agree between passes."""
    names = [[record.values[i].name for i in op.inputs()] for op in record.ops]
    ran = [(op.func, op.module, named) for op, named in zip(record.ops, names, strict=True)]
    return [ran, [(call.name, call.first, call.last) for call in record.calls]]
