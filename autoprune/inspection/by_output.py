"""Parameters that each output of a model keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autoprune.data.sampling import seeded
from autoprune.structure.containers import tensors_in
from autoprune.structure.example import Example
from autoprune.structure.propagate import propagate
from autoprune.structure.tracing.trace import trace
from autoprune.structure.units import find_frozen, find_units

MOST_OUTPUTS = 16
"""Most outputs that are told apart; for a model with more, messages do not list them."""


def frozen_by_output(example: Example) -> dict[str | int, set[tuple[str, int]]]:
    """Find the parameter dimensions (name, dimension) that stay because of each output alone.

    Returns:
        Empty where the model returns a single output, or too many to tell apart.
    """
    counts: dict[str | int, int] = {}

    def noting(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made = example.forward(model, *args, **kwargs)
        counts.clear()
        counts.update(_tensors_by_key(made))
        return made

    device = next(example.model.parameters()).device
    with seeded(0), torch.inference_mode(False):
        record = trace(replace(example, forward=noting, further=()).on(device))
    if not 1 < len(counts) <= MOST_OUTPUTS or sum(counts.values()) != len(record.outputs):
        return {}
    found: dict[str | int, set[tuple[str, int]]] = {}
    start = 0
    for key, count in counts.items():
        own = replace(record, outputs=record.outputs[start : start + count])
        flow = propagate(own)
        frozen = find_frozen(flow, find_units(flow))
        found[key] = {(part.tensor, part.dim) for part in frozen if part.reason == "returned by the model"}
        start += count
    return found


def _tensors_by_key(made: Any) -> dict[str | int, int]:
    """Number of tensors under each key or index, in the order in which they are recorded."""
    listed = enumerate(made) if isinstance(made, list | tuple) else ()
    pairs = made.items() if isinstance(made, Mapping) else listed
    counts = {key: len(tensors_in(value)) for key, value in pairs}
    return {key: count for key, count in counts.items() if count}
