"""Call of a model that is exported: a private copy in evaluation mode with plain outputs, and calls of other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.data.sampling import seeded
from autoprune.errors import UnsupportedModelError
from autoprune.result.exporting.parity import Outputs
from autoprune.structure.containers import sizes_of, tensors_in
from autoprune.structure.example import Example
from autoprune.structure.given import ExampleInputs, example_inputs_of, unwrap
from autoprune.structure.slicing.slicing import Edit, Slicer

_TRACED = 2  # samples, because tracers take a size of 1 for a constant
_CHECKED = 3
_CONSTANTS = ("use_cache", False)


@dataclass(frozen=True, eq=False)
class Call:
    """Module to export with the inputs to trace it on.

    Attributes:
        module: Private copy in evaluation mode. Its parameters are those of the model, and what it returns is a tensor,
            or tensors in dicts, lists and tuples.
        name: Class of the model.
        args: Positional inputs.
        kwargs: Keyword inputs, tensors all of them.
        dynamic: Dimensions that may have other sizes, by the position of the tensor among the inputs: 0 is the batch, 1
            a sequence.
        constants: Keyword inputs that are no tensors, and settings that exported models need.
        reference: Runs the model as the user would.
    """

    module: nn.Module
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic: Mapping[int, tuple[int, ...]]
    constants: Mapping[str, Any]
    reference: Callable[..., Any]

    @classmethod
    def of(cls, model: nn.Module, given: ExampleInputs | None) -> Call:
        """Make the call of a model with example inputs, those it carries if `given` is None.

        Raises:
            UnsupportedModelError: If it is no module.
            ValueError: If the inputs have another form.
        """
        model = unwrap(model)
        args, kwargs = example_inputs_of(model, given)
        example = Example(model, args, _in_order(model, kwargs))
        batched = _has_batch(example)
        if batched:
            example = example.resized(max(_TRACED, example.samples))
        copied, reference = (Slicer(model).cut(Edit({}, {})).eval() for _ in range(2))
        constants = {name: value for name, value in example.kwargs.items() if not tensors_in(value)}
        if _CONSTANTS[0] in inspect.signature(model.forward).parameters:
            constants[_CONSTANTS[0]] = _CONSTANTS[1]
        changing = {name: value for name, value in example.kwargs.items() if name not in constants}
        _return_plain(copied, constants)
        leaves = [leaf for leaf in tree_leaves((example.args, changing)) if isinstance(leaf, Tensor)]
        dynamic = {i: dims for i, leaf in enumerate(leaves) if (dims := _dynamic(leaf, batched))}
        name = type(model).__name__
        run = partial(reference, **constants)
        return cls(copied, name, example.args, changing, dynamic, constants, run)

    @property
    def leaves(self) -> list[Any]:
        """Inputs outside of their containers, in order."""
        return tree_leaves((self.args, dict(self.kwargs)))

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors among the inputs."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def fixed(self, *dims: int) -> Call:
        """Make the same call with these dimensions of every input fixed."""
        left = {i: tuple(dim for dim in own if dim not in dims) for i, own in self.dynamic.items()}
        return replace(self, dynamic={i: own for i, own in left.items() if own})

    def of_other_sizes(self) -> Call | None:
        """Make a call with other sizes of all dynamic dimensions; None if there is none."""
        if not self.dynamic:
            return None
        counted = iter(range(len(self.tensors)))

        def resized(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            dims = self.dynamic.get(next(counted), ())
            if 0 in dims:
                leaf = leaf[torch.arange(_other_batch(len(leaf)), device=leaf.device) % len(leaf)]
            return leaf[:, : max(_TRACED, leaf.shape[1] // 2)] if 1 in dims else leaf

        args, kwargs = tree_map(resized, (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs)

    def run(self) -> Outputs:
        """Run the model on the inputs.

        Raises:
            UnsupportedModelError: If it returns no tensors.
        """
        expected = self.outputs_of(self.reference)
        if not expected:
            raise UnsupportedModelError(f"{self.name} returns no tensors, so there is nothing to export")
        return Outputs(sizes_of(self.tensors), expected)

    def outputs_of(self, module: Callable[..., Any]) -> list[Tensor]:
        """Run a module on copies of the inputs, and list the tensors that it returns."""
        args, kwargs = tree_map(_copied, (self.args, dict(self.kwargs)))
        with torch.no_grad(), seeded(0):
            return tensors_in(plain(module(*args, **kwargs)))


def plain(outputs: Any) -> Any:
    """Turn containers of outputs into dicts, lists and tuples, and leave out what are no tensors.

    Raises:
        UnsupportedModelError: If tensors are in an object of another kind.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        return {str(key): plain(value) for key, value in outputs.items() if tensors_in(value, objects=True)}
    if isinstance(outputs, list | tuple):
        values = [plain(value) for value in outputs if tensors_in(value, objects=True)]
        return values if isinstance(outputs, list) else tuple(values)
    if held := tensors_in(outputs):  # dataclasses and registered pytrees
        return tuple(held)
    if tensors_in(outputs, objects=True):
        raise UnsupportedModelError(
            f"the model returns tensors in an object of type {type(outputs).__name__}, which no file can hold; return "
            "tensors, or dicts, lists and tuples of them"
        )
    return ()


def names_of(outputs: Any, prefix: str = "") -> list[str]:
    """Name the tensors of plain outputs by their keys and positions: ``"logits"``, ``"boxes_1"``, ``"output"``."""
    if isinstance(outputs, Tensor):
        return [prefix or "output"]
    entries = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    before = f"{prefix}_" if prefix else ("" if isinstance(outputs, Mapping) else "output_")
    return [name for key, value in entries for name in names_of(value, f"{before}{key}")]


def _return_plain(module: nn.Module, constants: Mapping[str, Any]) -> None:
    """Give a module a subclass whose forward has the same arguments, but `constants`, and returns plain outputs."""
    kind: Any = type(module)
    signature = inspect.signature(kind.forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return plain(kind.forward(self, *args, **kwargs, **constants))

    kept = [parameter for name, parameter in signature.parameters.items() if name not in constants]
    forward.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]  # read by torch.export
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _in_order(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Sort keyword inputs in the order of the forward's parameters, which exported files have, too."""
    order = {name: i for i, name in enumerate(inspect.signature(model.forward).parameters)}
    return dict(sorted(kwargs.items(), key=lambda entry: order.get(entry[0], len(order))))


def _has_batch(example: Example) -> bool:
    """Return whether the first dimension of all inputs is the samples."""
    leaves = [leaf for leaf in tree_leaves((example.args, dict(example.kwargs))) if isinstance(leaf, Tensor)]
    sizes = {len(leaf) if leaf.ndim else 0 for leaf in leaves}
    return len(sizes) == 1 and sizes != {0} and example.divisible


def _dynamic(leaf: Tensor, batched: bool) -> tuple[int, ...]:
    """Dimensions of an input that are samples, or positions of a sequence of whole numbers or flags."""
    counts = not (leaf.is_floating_point() or leaf.is_complex())
    sequence = counts and leaf.ndim == 2 and leaf.shape[1] > _TRACED
    return (0,) * batched + (1,) * (batched and sequence)


def _other_batch(size: int) -> int:
    return _CHECKED if size == _TRACED else _TRACED


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def positions(tensors: Sequence[Tensor], leaves: Sequence[Any]) -> list[int]:
    """Positions of the tensors among all leaves of the inputs."""
    known = {id(tensor) for tensor in tensors}
    return [i for i, leaf in enumerate(leaves) if id(leaf) in known]
