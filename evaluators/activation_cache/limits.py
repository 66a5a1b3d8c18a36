"""Limits on the memory of caches in evaluators: the larger the model, the smaller the limit."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from torch import nn

ROOM_BYTES = 2**30
"""Memory for a model and all of its caches."""

LARGE_BYTES = 2**26
"""Bytes of parameters from which on a model counts as large."""


def is_large(model: nn.Module) -> bool:
    """Return whether saving memory is worth its time for this model."""
    return bytes_of(model) >= LARGE_BYTES


def bytes_of(model: nn.Module) -> int:
    """Memory of the parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def room_beside(model: nn.Module) -> int:
    """Limit on one cache, in bytes: the part of `ROOM_BYTES` that four copies of the model leave.

    An eighth of the model at least, so that the memory of a search stays in proportion to it.
    """
    own = bytes_of(model)
    return max(ROOM_BYTES - 4 * own, own // 8)


def give_back(model: nn.Module) -> None:
    """Return free memory to the system if the model is large: the C library keeps tensors of up to 32 MiB.

    The freed candidates of a search would else add up to several times the model, in pieces that fit no later tensor.
    """
    if is_large(model) and (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Any:
    """``malloc_trim`` of the GNU C library; None where there is another."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # no such function, or no way to ask for it, as on Windows
        return None
