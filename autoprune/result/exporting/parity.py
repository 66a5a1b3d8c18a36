"""Parity: differences of the outputs of an exported model from those of the module that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoprune.arguments import number
from autoprune.errors import UnsupportedModelError

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed, as a fraction of the largest value of an output, by the type of the output."""

_WAY_OUT = ". Pass tolerance= if that is rounding, or export model.double() to find out"
_SMALLEST = 1e-30  # an output of zeros alone must be matched


@dataclass(frozen=True)
class Parity:
    """Differences measured over every output of every call.

    Attributes:
        absolute: Largest difference of a value.
        relative: Largest difference as a fraction of the largest value of the same output.
        tolerance: Largest `relative` that was allowed.
        calls: Shapes of the inputs of each call that was compared.
    """

    absolute: float
    relative: float
    tolerance: float
    calls: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dictionary, as written into files."""
        return {
            "largest_difference": self.absolute,
            "largest_relative_difference": self.relative,
            "tolerance": self.tolerance,
            "calls": list(self.calls),
        }


@dataclass(frozen=True)
class Outputs:
    """Outputs of one call.

    Attributes:
        inputs: Shapes of its inputs, for people.
        expected: Tensors that the module returned.
    """

    inputs: str
    expected: Sequence[Tensor]


def compare(calls: Sequence[Outputs], found: Sequence[Sequence[Tensor]], what: str, tolerance: float | None) -> Parity:
    """Compare the outputs of an exported model with those of the module.

    Args:
        calls: The outputs of the module.
        found: Those of the exported model, for the same calls.
        what: The exported model in words, such as ``"ResNet exported to ONNX"``.
        tolerance: Largest relative difference; None for that of each output's type in `TOLERANCES`.

    Raises:
        UnsupportedModelError: If a number, type or shape of outputs differs, or a value by more than the tolerance.
    """
    absolute = relative = allowed = 0.0
    for call, outputs in zip(calls, found, strict=True):
        if len(outputs) != len(call.expected):
            raise UnsupportedModelError(
                f"{what} returns {len(outputs)} tensors for inputs {call.inputs}, and the module {len(call.expected)}"
            )
        for i, (ours, theirs) in enumerate(zip(call.expected, outputs, strict=True)):
            most = _tolerance(ours, tolerance)
            apart = _apart(ours, theirs, f"output {i} of {what}, for inputs {call.inputs},")
            share = apart / max(_largest(ours), _SMALLEST) if apart else 0.0
            if not share <= most:
                raise UnsupportedModelError(
                    f"output {i} of {what}, for inputs {call.inputs}, differs from the module's by up to {apart:.3g}, "
                    f"{share:.3g} of its largest value, and {most:.3g} is allowed; nothing was written"
                    f"{_WAY_OUT * (most > 0)}"
                )
            absolute = max(absolute, apart)
            relative = max(relative, share)
            allowed = max(allowed, most)
    return Parity(absolute, relative, allowed, tuple(call.inputs for call in calls))


def checked_tolerance(tolerance: float | None) -> float | None:
    """Check the tolerance that a user gave.

    Raises:
        ValueError: If it is none.
    """
    return None if tolerance is None else number("tolerance", tolerance, 0.0, "at least 0, or None")


def _tolerance(output: Tensor, given: float | None) -> float:
    """Largest share that an output may differ by; whole numbers must be equal."""
    if not (output.is_floating_point() or output.is_complex()):
        return 0.0
    if given is not None:
        return given
    return TOLERANCES.get(output.abs().dtype if output.is_complex() else output.dtype, TOLERANCES[torch.float16])


def _apart(ours: Tensor, theirs: Tensor, what: str) -> float:
    """Largest difference of two tensors; infinite where one is NaN or infinite and the other is not."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        raise UnsupportedModelError(
            f"{what} is {_kind(theirs)}, and the module's is {_kind(ours)}; nothing was written"
        )
    a, b = (tensor.detach().cpu().resolve_conj().resolve_neg() for tensor in (ours, theirs))
    if not a.numel():
        return 0.0
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, (a - b).abs())
    return float(gap.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def _largest(output: Tensor) -> float:
    """Largest finite value of an output, without its sign."""
    values = output.detach().abs().double()
    return float(values[values.isfinite()].max()) if values.isfinite().any() else 0.0


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
