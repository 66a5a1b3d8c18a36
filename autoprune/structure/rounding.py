"""Tell an error from rounding: by the rounding that the network itself shows, never by a constant alone.

Thirty layers and massive activations make float32 differ by 1e-4 without any error; in float64 the same passes differ
by 1e-13. So the checks run the record in float64, where an error stands far above what rounding can do, and compare a
module that only runs in the type that the user gave it against what that type loses on the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 1e-9
"""Difference of two float64 passes, relative to the largest output, that is never an error."""

SHOWN_TIMES = 1000
"""How many times the rounding expected in float64 a difference may be: the order of many sums changes."""

NATIVE_TIMES = 4
"""How many times the rounding of the dense model in its own type that of a smaller one may be."""

MOST = 0.5
"""A difference this large, relative to the largest output, is an error in any type."""


class CheckError(Exception):
    """What a check saw, in words."""


def gap(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude; of whole numbers, 1 if any differs."""
    if not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float((found != expected).any())
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = found.detach().to(wide), expected.detach().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())  # infinities, which masks leave, have no difference
    differ = torch.where(same, 0, (a - b).abs())
    scale = torch.where(b.isfinite(), b.abs(), 0).max().item()
    worst = differ.max().item()
    return worst / max(scale, 1e-6) if worst == worst else float("inf")


def wide_tolerances(native: Sequence[Tensor], wide: Sequence[Tensor]) -> list[float]:
    """How far two float64 passes may differ, for each output.

    Rounding grows through a network by a factor that does not depend on the type: what the dense model's own type
    loses says what float64 may.

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
    """How far a smaller module in the model's own type may be from an exact pass, for each output.

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
        found: What came out.
        expected: What should have.
        tolerances: Largest difference relative to the largest magnitude, one for each output.

    Raises:
        CheckError: Says how far apart they are.
    """
    if len(found) != len(expected):
        raise CheckError(f"the {check} check saw {len(found)} outputs instead of {len(expected)}")
    for a, b, tolerance in zip(found, expected, tolerances, strict=True):
        if a.shape != b.shape:
            raise CheckError(f"the {check} check saw shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        if not (difference := gap(a, b)) <= tolerance:
            raise CheckError(f"the {check} check saw outputs differ by {difference:.1e} of their size")
