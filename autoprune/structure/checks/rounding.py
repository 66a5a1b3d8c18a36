"""Tolerances of checks: errors are distinguished from rounding by the network's own rounding, not by a constant alone.

Thirty layers and massive activations make float32 differ by 1e-4 without any error; in float64 the same passes differ
by 1e-13. So the checks run the record in float64, where an error is far larger than rounding, and compare a module that
only runs in the user's type with the rounding of that type on the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 1e-9
"""Difference of two float64 passes, relative to the largest output, that is never an error."""

SHOWN_TIMES = 1000
"""Largest difference in multiples of the rounding expected in float64: the order of many sums changes."""

NATIVE_TIMES = 4
"""Largest rounding of a smaller model in multiples of that of the dense model in its own type."""

MOST = 0.5
"""Largest tolerance, relative to the largest output: a larger difference is an error in any type."""


class CheckError(Exception):
    """Failure of a check, in words."""


def gap(found: Tensor, expected: Tensor) -> float:
    """Compute the largest difference, relative to the largest expected magnitude; 1 if any whole number differs."""
    if not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float((found != expected).any())
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = found.detach().to(wide), expected.detach().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())  # infinities, which come from masks, have no difference
    differ = torch.where(same, 0, (a - b).abs())
    scale = torch.where(b.isfinite(), b.abs(), 0).max().item()
    worst = differ.max().item()
    return worst / max(scale, 1e-6) if worst == worst else float("inf")


def wide_tolerances(native: Sequence[Tensor], wide: Sequence[Tensor]) -> list[float]:
    """Compute the tolerance between two float64 passes, for each output.

    Rounding grows through a network by a factor that does not depend on the type, so the rounding in the dense model's
    own type gives that in float64.

    Args:
        native: Outputs of the dense model in its own type.
        wide: The same in float64.
    """
    found = []
    for own, exact in zip(native, wide, strict=True):
        shrunk = torch.finfo(torch.float64).eps / torch.finfo(own.dtype).eps if own.is_floating_point() else 0.0
        found.append(max(LEAST, SHOWN_TIMES * min(gap(own, exact), 1.0) * shrunk))
    return found


def native_tolerances(native: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Compute the tolerance between a smaller module in the model's own type and an exact pass, for each output.

    Args:
        native: Outputs of the dense model in its own type.
        exact: The same as exactly as possible.
    """
    found = []
    for own, best in zip(native, exact, strict=True):
        least = min(100 * torch.finfo(own.dtype).eps ** 0.875, 0.1) if own.is_floating_point() else 0.0
        shown = NATIVE_TIMES * gap(own, best) if own.is_floating_point() else 0.0
        found.append(min(max(least, shown), MOST))
    return found


def compare(check: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerances: Sequence[float]) -> None:
    """Raise unless outputs agree.

    Args:
        check: Its name, for the message.
        found: Outputs.
        expected: Expected outputs.
        tolerances: Largest difference relative to the largest magnitude, one for each output.

    Raises:
        CheckError: Gives their difference.
    """
    if len(found) != len(expected):
        raise CheckError(f"the {check} check saw {len(found)} outputs instead of {len(expected)}")
    for a, b, tolerance in zip(found, expected, tolerances, strict=True):
        if a.shape != b.shape:
            raise CheckError(f"the {check} check saw shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        if not (difference := gap(a, b)) <= tolerance:
            raise CheckError(f"the {check} check saw outputs differ by {difference:.1e} of their size")
