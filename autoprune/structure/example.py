"""A model with inputs to run it on: on copies, on the meta device for the shapes, or in float64."""

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
"""Bytes that a model may take in float64 to be widened as a whole; of a larger one each weight is when it is read."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make floating-point tensors in another type where code names none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Example:
    """A model with inputs to run it on.

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
        """The inputs of every call."""
        return [(self.args, self.kwargs), *self.further]

    def run(
        self,
        model: nn.Module,
        *,
        meta: bool = False,
        mode: AbstractContextManager[Any] | None = None,
        wide: bool = False,
    ) -> list[Tensor]:
        """Output tensors of `model`, put in evaluation mode, for all inputs; the same random numbers each time.

        Args:
            model: Runs with copies of the inputs and of its buffers.
            meta: Run on the meta device, for the shapes.
            mode: Watches the operations.
            wide: Run in float64, tensors made on the way included; raises where the forward insists on another type.
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
        """Output tensors of `model` in training mode for the first inputs, without what training makes random."""
        place = _on_meta if meta else _copied
        state = {f"model.{name}": place(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        return run_in_training(model, self.forward, state, map_tensors(place, (self.args, dict(self.kwargs))))


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _copied(tensor: Tensor) -> Tensor:
    """A copy, because a forward may write to it, of what is no parameter."""
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()
