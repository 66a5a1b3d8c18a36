"""Example: a model with one call of it, which is traced, checked, timed and measured."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.arguments import shown
from autoprune.data import batch as batches
from autoprune.data.batch import Batch, Forward
from autoprune.data.sampling import seeded
from autoprune.structure.checks.float64 import Widening, widened
from autoprune.structure.containers import map_tensors, sizes_of, tensors_in
from autoprune.structure.outputs import selecting
from autoprune.structure.owners import owners
from autoprune.structure.slicing.skeleton import ForwardModule, call_with, skeleton
from autoprune.structure.time_limit import look
from autoprune.structure.tracing.record import CallForward, Inputs
from autoprune.structure.tracing.training_branches import run_in_training

WIDE = 2**28
"""Largest size in float64 of a model that is widened as a whole; weights of a larger one are widened when read."""


def called(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the model; the forward of an `Example` that is given none."""
    return model(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Example:
    """Model with one call of it: its inputs, and the forward that runs it on them.

    Attributes:
        model: Never changed by what takes an example: copies of it run.
        args: Positional inputs; tensors may be nested in lists, tuples, dicts and other objects.
        kwargs: Keyword inputs.
        forward: ``forward(model, *args, **kwargs)`` returns the outputs that matter.
        further: Positional and keyword inputs of more calls, which take other branches of the forward.
    """

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    forward: CallForward = called
    further: Sequence[Inputs] = ()

    @classmethod
    def of_batch(
        cls,
        model: nn.Module,
        batch: Batch,
        forward: Forward,
        further: Sequence[Batch] = (),
    ) -> Example:
        """Make the example of a forward of batches, ``forward(model, batch)``.

        Its inputs are the tensors in the batch, in whatever containers: those that the model gets nest in the first.
        """
        return cls(model, _opened(batch), {}, _closing(forward), [(_opened(other), {}) for other in further])

    @property
    def inputs(self) -> list[Inputs]:
        """Inputs of every call."""
        return [(self.args, self.kwargs), *self.further]

    @property
    def batch(self) -> Batch:
        """The inputs as a batch: the one that it was made of, or see `autoprune.data.batch.of_call`."""
        if self.args and isinstance(self.args[0], _Shell):
            return self.args[0].filled(self.args[1:])
        return batches.of_call(self.args, self.kwargs)

    @property
    def divisible(self) -> bool:
        """True if the inputs can be cut by samples, as those of a model of graphs cannot."""
        leaves = self._leaves()
        return not leaves or batches.divisible((*leaves, None))

    @property
    def samples(self) -> int:
        """Number of samples in the inputs; they count as one where they cannot be cut by samples."""
        leaves = self._leaves()
        return len(leaves[0]) if leaves and self.divisible else 1

    def __call__(self) -> Any:
        """Run the model itself on the inputs themselves, and return the outputs that matter."""
        return self.forward(self.model, *self.args, **self.kwargs)

    def of(self, model: nn.Module) -> Example:
        """Make the same calls of another model."""
        return replace(self, model=model)

    def on(self, device: torch.device | str) -> Example:
        """Move the inputs to a device; the model stays where it is."""
        return self.mapped(lambda tensor: tensor.to(device))

    def selecting(self, outputs: Any) -> Example:
        """Reduce what the forward returns to the outputs that matter; see `autoprune.structure.outputs.selecting`."""
        return replace(self, forward=selecting(self.forward, outputs))

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> Example:
        """Apply `fn` to the tensors of every call."""
        (args, kwargs), *further = [map_tensors(fn, (args, dict(kwargs))) for args, kwargs in self.inputs]
        return replace(self, args=args, kwargs=kwargs, further=further)

    def resized(self, n: int, name: str = "batch") -> Example:
        """Resize the inputs to `n` samples by repeating them; values without samples stay, and further calls go.

        Inputs that cannot be cut, such as graphs, count as one sample.

        Raises:
            ValueError: If they hold no samples, cannot be cut, or `n` do not fit into memory; `name` is the argument of
                `n`.
        """
        leaves = self._leaves()
        if not leaves or not (size := len(leaves[0])):
            raise ValueError("example must hold a tensor with a dimension for samples and at least one, got none")
        if not self.divisible:
            if n == 1:
                return replace(self, further=())
            raise ValueError(
                f"{name} must be 1 for inputs that cannot be cut by samples, with tensors of {sizes_of(leaves)}, got "
                f"{n}; such inputs count as one, so give as many as shall be measured at once"
            )
        wanted = n * sum(leaf.nbytes / size for leaf in leaves if len(leaf) == size)
        require_fits(f"{name} must be a number of samples", n, wanted)

        def repeated(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != size:
                return leaf
            return leaf[torch.arange(n, device=leaf.device) % size]

        args, kwargs = tree_map(repeated, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs, further=())

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
        call = ForwardModule(model, self.forward)
        tensors = {owner.name: owner.tensor for owner in owners(call)}
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
            for args, kwargs in self.inputs:
                inputs = map_tensors(place, (args, dict(kwargs)))
                outputs.append(call_with(call, state, inputs, mode, decomposed=mode is not None))
        return tensors_in(outputs)

    def run_in_training(self, model: nn.Module, *, meta: bool) -> list[Tensor]:
        """Run `model` in training mode on the first inputs, without random layers; return output tensors."""
        place = _on_meta if meta else _copied
        call = ForwardModule(model, self.forward)
        state = {name: place(tensor) for name, tensor in (*call.named_parameters(), *call.named_buffers())}
        return run_in_training(call, state, map_tensors(place, (self.args, dict(self.kwargs))))

    def as_traced(self) -> Callable[[], Any]:
        """Make a call that runs a private copy of the model as a trace on real values does, without tracing."""
        call = ForwardModule(skeleton(self.model).eval(), self.forward)
        inputs = map_tensors(torch.clone, (self.args, dict(self.kwargs)))
        buffers = {name: buffer.clone() for name, buffer in call.named_buffers(remove_duplicate=False)}
        return lambda: call_with(call, buffers, inputs)

    def _leaves(self) -> list[Tensor]:
        """Tensors with dimensions, of which the first is the samples."""
        found = tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.ndim]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set the type of floating-point tensors that code makes without naming one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _copied(tensor: Tensor) -> Tensor:
    """Copy a tensor that is no parameter, because a forward may write to it."""
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()


def require_fits(rule: str, given: Any, wanted_bytes: float) -> None:
    """Refuse inputs that are larger than the memory of this machine, where the system tells its size.

    Args:
        rule: The rule for the argument, such as ``"batch must be a number of samples"``.
        given: The value given.
        wanted_bytes: Size of the inputs.

    Raises:
        ValueError: Says both.
    """
    try:
        most = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # not POSIX
        return
    if wanted_bytes > most:
        raise ValueError(
            f"{rule} that fit into memory, got {shown(given)}, whose inputs alone take "
            f"{min(wanted_bytes, 1e300) / 2**30:.3g} GiB "
            f"of {most / 2**30:.3g} GiB; give fewer"
        )


class _Shell:
    """Containers of a batch, apart from the tensors in them, for code that knows fewer kinds of containers.

    Tracers and exporters look into dicts, lists and tuples, and would take the tensors in other mappings, such as those
    of Hugging Face tokenizers, for constants. Slots hide the shell from code that looks into objects.
    """

    __slots__ = ("batch",)

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def filled(self, given: Sequence[Tensor]) -> Batch:
        """Rebuild the batch with other tensors, as many as it holds."""
        left = iter(given)
        return batches.map_tensors(lambda _: next(left), self.batch)


def _opened(batch: Batch) -> tuple[Any, ...]:
    """Positional inputs for a forward that `_closing` made: a shell and the tensors in it."""
    return (_Shell(batch), *batches.tensors(batch))


def _closing(forward: Forward) -> CallForward:
    """Wrap a forward of batches to take the result of `_opened` in place of the batch."""
    return lambda model, shell, *given: forward(model, shell.filled(given))
