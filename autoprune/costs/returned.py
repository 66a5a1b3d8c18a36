"""Outputs of a model that matter, and the parameters that each of them keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.arguments import is_whole, shown, why_no_function
from autoprune.errors import DataError
from autoprune.sources import seeded
from autoprune.structure.containers import map_tensors, tensors_in
from autoprune.structure.propagate import propagate
from autoprune.structure.record import Forward
from autoprune.structure.trace import trace
from autoprune.structure.units import find_units

MOST_OUTPUTS = 16
"""Most outputs that are told apart; for a model with more, messages do not list them."""


def require_selecting(forward: Any, outputs: Any) -> None:
    """Check the arguments that run a model and choose its outputs.

    Raises:
        TypeError: Names the argument.
    """
    if forward is not None and (why := why_no_function(forward, 2)):
        raise TypeError(f"forward must be a function forward(model, batch), or None, {why}")
    keys = outputs if isinstance(outputs, list | tuple) else [outputs]
    plain = all(isinstance(key, str) or is_whole(key) for key in keys) and len(keys) > 0
    if outputs is not None and not plain and (why := why_no_function(outputs, 1)):
        raise TypeError(
            f"outputs must be a key, an index, a list of these, a function of what the model returns, or None, {why}"
        )


def selecting(forward: Forward | None, outputs: Any) -> Forward:
    """Reduce the return value of a model to the outputs that matter.

    Args:
        forward: Runs the model; None calls it.
        outputs: A key, an index, several of these, a function of the model's return value, or None for everything.

    Returns:
        A forward that raises DataError for a key or an index that the model does not return.
    """
    run = forward or (lambda model, *args, **kwargs: model(*args, **kwargs))
    if outputs is None:
        return run

    def select(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made = run(model, *args, **kwargs)
        if callable(outputs):
            return outputs(made)
        if isinstance(outputs, str | int):
            return _selected(made, outputs)
        return tuple(_selected(made, key) for key in outputs)

    return select


def _selected(made: Any, key: str | int) -> Any:
    try:
        if isinstance(made, Tensor):
            raise TypeError("a tensor is one output, and an index would select a sample")
        return made[key]
    except (KeyError, IndexError, TypeError) as error:
        names = list(made) if isinstance(made, Mapping) else type(made).__name__
        raise DataError(
            f"outputs must select from what the model returns ({names!s:.200}), got {shown(key)}: {error!s:.200}"
        ) from error


def frozen_by_output(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], run: Forward
) -> dict[str | int, set[tuple[str, int]]]:
    """Find the parameter dimensions (name, dimension) that stay because of each output alone.

    Returns:
        Empty where the model returns a single output, or too many to tell apart.
    """
    counts: dict[str | int, int] = {}

    def noting(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made = run(model, *args, **kwargs)
        counts.clear()
        counts.update(_tensors_by_key(made))
        return made

    device = next(model.parameters()).device
    moved = map_tensors(lambda tensor: tensor.to(device), (args, dict(kwargs)))
    with seeded(0), torch.inference_mode(False):
        record = trace(model, moved[0], moved[1], noting)
    if not 1 < len(counts) <= MOST_OUTPUTS or sum(counts.values()) != len(record.outputs):
        return {}
    found: dict[str | int, set[tuple[str, int]]] = {}
    start = 0
    for key, count in counts.items():
        own = replace(record, outputs=record.outputs[start : start + count])
        frozen = find_units(propagate(own)).frozen
        found[key] = {(part.tensor, part.dim) for part in frozen if part.reason == "returned by the model"}
        start += count
    return found


def _tensors_by_key(made: Any) -> dict[str | int, int]:
    """Number of tensors under each key or index, in the order in which they are recorded."""
    pairs = made.items() if isinstance(made, Mapping) else enumerate(made) if isinstance(made, list | tuple) else ()
    counts = {key: len(tensors_in(value)) for key, value in pairs}
    return {key: count for key, count in counts.items() if count}
