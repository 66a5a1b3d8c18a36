"""The latest matrix product of a pass, computed only if another operation follows that may read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

LEAST = 2**18
"""Elements of a product from which on it waits; fewer take no time, and may be read as lists or arrays."""

_DEFERRED = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class LatestProduct:
    """Runs operations one at a time, each matrix product as late as possible, so that an unread one is never computed.

    A pass that is run for the inputs of its layers reads everything but its outputs. These end in a product with as
    many columns as there are words or classes: a fifth of the work of a small language model. Values are those of the
    same kernels in the same order. No gradients may be recorded.
    """

    def __init__(self) -> None:
        self._waiting: tuple[Any, tuple[Any, ...], Mapping[str, Any], Tensor] | None = None

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation of ATen, after the product that waits unless this only views it; or make it wait itself."""
        if not (func.is_view or func is torch.ops.aten._unsafe_view.default):  # whose schema hides that it is one
            self._compute()
        if func not in _DEFERRED or not all(_plain(arg) for arg in args):
            return func(*args, **kwargs)
        rows, weight = args[-2:]
        if rows.shape[0] * weight.shape[1] < LEAST:
            return func(*args, **kwargs)
        out = weight.new_empty(rows.shape[0], weight.shape[1])
        self._waiting = func, args, kwargs, out
        return out

    def forget(self) -> None:
        """Leave the product that waits uncomputed."""
        self._waiting = None

    def _compute(self) -> None:
        if self._waiting is not None:
            func, args, kwargs, out = self._waiting
            self._waiting = None
            func.overloadpacket.out(*args, **kwargs, out=out)


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
