"""Runtimes whose latency can be measured: PyTorch itself, or onnxruntime."""

from __future__ import annotations

from typing import Any, Protocol, final

import torch

from autoprune.arguments import shown
from autoprune.costs.latency.timing import Call
from autoprune.costs.operations.parts import ONNXRUNTIME, YARDSTICK, Family, Part
from autoprune.costs.operations.torch_parts import find_parts
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure

TORCH = "torch"


class Runtime(Protocol):
    """Runs whole networks, and their operations alone.

    Attributes:
        name: As `runtime_of` takes it; part of a table's identity.
        versions: Of the libraries that run the model, by name; part of it too.
        elsewhere: Whether it computes outside of the thread that calls it, even with one thread.
    """

    name: str
    versions: dict[str, str]
    elsewhere: bool

    def network(self, example: Example) -> Call:
        """Make a call of one forward pass as a user would run it."""
        ...

    def parts(self, example: Example, structure: Structure, seed: int) -> tuple[list[Family], list[Part]]:
        """Find the families and parts of a model; see `autoprune.costs.operations.torch_parts.find_parts`."""
        ...

    def yardstick(self, device: torch.device) -> Call:
        """Make a reference call of constant cost for comparison with operations."""
        ...


def runtime_of(name: str) -> Runtime:
    """Make a runtime by name: ``"torch"``, ``"onnxruntime"`` or ``"onnxruntime:SomeExecutionProvider"``.

    Raises:
        ValueError: If it is another name, or a provider that is not installed.
        ImportError: If its libraries are not installed.
    """
    library, colon, provider = name.partition(":") if isinstance(name, str) else ("", "", "")
    if library == ONNXRUNTIME and bool(colon) == bool(provider):
        from autoprune.costs.operations.onnx_sessions import OnnxRuntime

        return OnnxRuntime(provider)
    if library != TORCH or colon:
        raise ValueError(
            f"runtime must be {TORCH!r}, {ONNXRUNTIME!r} or '{ONNXRUNTIME}:PROVIDER', got {shown(name)}; for others "
            "pass costs={'latency_ms': your own function}"
        )
    return Torch()


@final
class Torch:
    """PyTorch in eager mode."""

    name = TORCH
    versions: dict[str, str] = {TORCH: torch.__version__}
    elsewhere = False

    def network(self, example: Example) -> Call:
        """One forward pass."""
        return network_call(example)

    def parts(self, example: Example, structure: Structure, seed: int) -> tuple[list[Family], list[Part]]:
        """ATen operations."""
        return find_parts(example, structure, seed)

    def yardstick(self, device: torch.device) -> Call:
        """A product of matrices."""
        matrix = torch.rand(YARDSTICK, YARDSTICK, device=device)
        return lambda: torch.mm(matrix, matrix)


def network_call(example: Example) -> Call:
    """One forward pass in eager mode, of the model itself on the inputs themselves."""

    def call() -> Any:
        with torch.inference_mode():
            return example()

    return call
