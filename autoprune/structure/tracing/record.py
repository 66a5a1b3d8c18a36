"""Record of a traced forward pass: its operations, its tensors and the calls of its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

CallForward = Callable[..., Any]
"""``forward(model, *args, **kwargs)``: runs the model on example inputs and returns the outputs that matter."""

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword inputs of one call."""

Foreseen = Mapping[torch._ops.OpOverload, tuple[bool, ...]]
"""Operations whose results are known without computing them, and the results that are empty on this device alone."""


@dataclass(frozen=True)
class Ref:
    """Placeholder of a tensor in recorded arguments: an index into ``Record.values``."""

    id: int


@dataclass
class Value:
    """Tensor of the pass.

    Attributes:
        shape: Its concrete shape.
        dtype: Its dtype.
        kind: ``"parameter"``, ``"buffer"``, ``"input"``, ``"constant"`` (made before the pass) or ``"result"``.
        name: Qualified name of a parameter or buffer, else empty.
        base: Index of the value that owns the storage; itself unless a view.
        born: Index of the operation that made it, -1 if it existed before.
        died: Number of operations that had run when Python released it.
        tensor: The tensor of a constant, which a replay needs.
        strides: Its strides, in elements; empty where it is sparse.
        stored: Entries that it stores where it is sparse, else None.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    name: str
    base: int
    born: int
    died: int
    tensor: Tensor | None = None
    strides: tuple[int, ...] = ()
    stored: int | None = None


@dataclass(frozen=True)
class Op:
    """Recorded operation; ``args`` holds every argument by schema name, tensors as `Ref`."""

    index: int
    func: torch._ops.OpOverload
    args: Mapping[str, Any]
    outputs: Any
    module: str

    @cached_property
    def name(self) -> str:
        """Name without overload, for example ``"convolution"``."""
        return str(self.func.overloadpacket.__name__)

    def inputs(self) -> list[int]:
        """Values read, in argument order."""
        return self._inputs

    def results(self) -> list[int]:
        """Values returned, in order."""
        return self._results

    @cached_property
    def writes(self) -> bool:
        """True if it changes one of its arguments."""
        return any(arg.alias_info is not None and arg.alias_info.is_write for arg in self.func._schema.arguments)

    def where(self) -> str:
        """Name the operation and its module, for messages."""
        return f"{self.name} in {self.module}" if self.module else self.name

    @cached_property  # every walk over a record asks for them, and flattening nested arguments is slow
    def _inputs(self) -> list[int]:
        return [leaf.id for leaf in tree_leaves(list(self.args.values())) if isinstance(leaf, Ref)]

    @cached_property
    def _results(self) -> list[int]:
        return [leaf.id for leaf in tree_leaves(self.outputs) if isinstance(leaf, Ref)]


@dataclass(frozen=True)
class ModuleCall:
    """Call of a module: operations `first` up to `last` ran inside it.

    Attributes:
        name: Qualified name of the module.
        first: Index of its first operation.
        last: Index after its last operation.
        inputs: Leaves of its arguments, positional and by keyword, in order; tensors as `Ref`.
        outputs: Leaves of its return value, before its own hooks; tensors as `Ref`.
        places: Position or keyword of the argument that holds each leaf of `inputs`.
        form: Containers of its return value, JSON-ready: ``{"leaf": 0}`` is the first of `outputs`; None where it has
            others than tuples, lists and dictionaries.
    """

    name: str
    first: int
    last: int
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    places: tuple[int | str, ...] = ()
    form: Any = None


@dataclass
class Record:
    """Recorded forward passes: operations, values, inputs and outputs.

    Attributes:
        ops: Operations, in the order in which they ran.
        calls: Calls of modules, in the order in which they returned.
        values: Tensors of the passes.
        inputs: Values that are inputs.
        outputs: Values that are outputs.
        batch: Samples of the first example; 1 where it cannot be cut by samples.
        first: Number of operations of the first example, which costs are stated for.
        device: ``"meta"``, or that of the real values.
        foreseen: Operations whose results need not be computed to know their form; none if the pass reads values, or
            ran on the meta device.
        training: Additional operations of a pass in training mode; their indices follow those of `ops`.
        twins: Operations of `training` by index, with the index of the one that evaluation runs in their place.
        trained: Values that the pass in training mode returned.
        training_ends: Those among them, and other results of `training`, that nothing reads or evaluation returns.
        met: Number of values of the passes in evaluation mode.
        untrained: Reason why there is no such pass, in words; empty if it was followed.
    """

    ops: list[Op] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    batch: int = 1
    first: int = 0
    device: str = "meta"
    foreseen: Foreseen = field(default_factory=dict)
    training: list[Op] = field(default_factory=list)
    twins: dict[int, int] = field(default_factory=dict)
    trained: list[int] = field(default_factory=list)
    training_ends: list[int] = field(default_factory=list)
    untrained: str = ""
    met: int = 0

    def op(self, index: int) -> Op:
        """Return an operation by its index, also one of training."""
        return self.ops[index] if index < len(self.ops) else self.training[index - len(self.ops)]

    def named(self) -> dict[str, int]:
        """Map the name of each parameter and buffer that the pass touched to its value."""
        return {value.name: i for i, value in enumerate(self.values) if value.name}
