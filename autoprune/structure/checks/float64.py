"""Float64 run of a model's own forward, for any types that its code names, without a second copy of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from autoprune.structure.time_limit import look


def widened(leaf: Any) -> Any:
    """Convert a tensor or dtype to the widest type of its kind: float64 or complex128; anything else as it is."""
    dtype = leaf.dtype if isinstance(leaf, Tensor) else leaf
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex):
        return leaf
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return leaf.to(wide) if isinstance(leaf, Tensor) else wide


class Widening(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, without types
    """Runs every operation on widened copies of narrower tensors, and widens requested types.

    So a cast to float32 in the code loses no precision, and a weight is wide only while an operation reads it. A write
    to a tensor that is not wide yet is lost; compare a pass under this mode with another before relying on it.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        look()
        return func(*tree_map(widened, args), **tree_map(widened, kwargs or {}))
