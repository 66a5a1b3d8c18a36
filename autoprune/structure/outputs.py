"""Outputs of a model that matter: a choice from what its forward returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from autoprune.arguments import is_whole, shown, why_no_function
from autoprune.errors import DataError


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


def selecting(forward: Callable[..., Any], outputs: Any) -> Callable[..., Any]:
    """Reduce the return value of a model to the outputs that matter.

    Args:
        forward: Runs the model, which is its first argument.
        outputs: A key, an index, several of these, a function of the model's return value, or None for everything.

    Returns:
        A forward of the same arguments that raises DataError for a key or an index that the model does not return.
    """
    if outputs is None:
        return forward

    def select(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made = forward(model, *args, **kwargs)
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
