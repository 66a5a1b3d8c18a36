"""Example: a model with inputs to run it on, on copies, on the meta device for the shapes, or in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.sources import seeded
from autoprune.structure.containers import map_tensors, tensors_in
from autoprune.structure.record import Forward, Inputs
from autoprune.structure.replay import widened
from autoprune.structure.skeleton import Call, call_with
from autoprune.structure.time_limit import look
from autoprune.structure.training import run_in_training
from autoprune.structure.wide import Widening

WIDE = 2**28
"""Largest size in float64 of a model that is widened as a whole; weights of a larger one are widened when read."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the type of floating-point tensors that code makes without naming one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Example:
    """Model with inputs to run it on.

    Attributes:
        model: Never changed; copies of it run.
        args: Positional inputs, on the model's device.
        kwargs: Keyword inputs.
        forward: Runs a model on them.
        further: More inputs, which take other branches of the forward.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    forward: Forward
    further: Sequence[Inputs] = ()

    @property
    def inputs(self) -> list[Inputs]:
        """Inputs of every call."""
        return [(self.args, self.kwargs), *self.further]

    def run(
        self,
        model: nn.Module,
        *,
        meta: bool = False,
        mode: AbstractContextManager[Any] | None = None,
        wide: bool = False,
    ) -> list[Tensor]:
        """Run `model` in evaluation mode on all inputs, with the same random numbers each time; return output tensors.

        Args:
            model: Runs with copies of the inputs and of its buffers.
            meta: Run on the meta device, for the shapes.
            mode: Watches the operations.
            wide: Run in float64, with all intermediate tensors; raises if the forward requires another type.
        """
        look()
        model.eval()
        call = Call(model, self.forward)
        tensors = dict((*call.named_parameters(), *call.named_buffers()))
        whole = 8 * sum(tensor.numel() for tensor in tensors.values()) <= WIDE
        mode = Widening() if wide else mode  # type: ignore[no-untyped-call]  # torch's, without types

        def place(leaf: Tensor) -> Tensor:
            if isinstance(leaf, nn.Parameter) and wide:
                return nn.Parameter(widened(leaf.detach()), leaf.requires_grad) if whole else leaf
            found: Tensor = widened(leaf) if wide else leaf
            if found is not leaf:
                return found
            return _on_meta(leaf) if meta else _copied(leaf)

        state = {name: place(tensor) for name, tensor in tensors.items()}
        outputs = []
        with seeded(0), default_dtype(torch.float64 if wide else torch.get_default_dtype()):
            for inputs in self.inputs:
                args, kwargs = map_tensors(place, (inputs[0], dict(inputs[1])))
                outputs.append(call_with(call, state, args, kwargs, mode, decomposed=mode is not None))
        return tensors_in(outputs)

    def run_in_training(self, model: nn.Module, *, meta: bool) -> list[Tensor]:
        """Run `model` in training mode on the first inputs, without random layers; return output tensors."""
        place = _on_meta if meta else _copied
        state = {f"model.{name}": place(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        return run_in_training(model, self.forward, state, map_tensors(place, (self.args, dict(self.kwargs))))


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _copied(tensor: Tensor) -> Tensor:
    """Copy a tensor that is no parameter, because a forward may write to it."""
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()
