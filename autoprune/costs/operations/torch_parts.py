"""PyTorch operations of a model, as parts that can be run alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from autoprune.costs.operations.allocations import operations_of
from autoprune.costs.operations.parts import Family, Part, Row, edit_to, families_of, sizes_of
from autoprune.protocols import IntArray
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import Slicer
from autoprune.structure.structure import Structure
from autoprune.structure.tracing.record import Op, Record, Ref
from autoprune.structure.tracing.trace import trace

_NOISE = 2**16  # numbers drawn, and repeated for larger tensors: drawing takes longer than many operations
_LARGE = 1e4  # value of an argument that is written to: repeated halving must not reach denormals soon


@dataclass(frozen=True)
class _Spec:
    """Tensor among the arguments, without its sizes, which are among the numbers."""

    dims: int
    dtype: str
    order: tuple[int, ...]  # dimensions from the slowest to the fastest in memory
    broadcast: tuple[int, ...]  # dimensions of stride 0


def find_parts(example: Example, structure: Structure, seed: int = 0) -> tuple[list[Family], list[Part]]:
    """Divide a model into families of operations and the parts where they occur.

    Views are left out: they move no data.

    Args:
        example: The dense model, which comes back unchanged, with inputs of the batch size that matters.
        structure: What can be removed from it.
        seed: Draws the widths that are checked.

    Raises:
        UnsupportedModelError: If the model runs other operations once it is pruned.
    """
    _, calls, rows = sized_operations(example, structure, seed)
    return families_of(calls, rows, structure)


def sized_operations(
    example: Example, structure: Structure, seed: int, *, values: bool = False
) -> tuple[Record, Sequence[TorchOperation], list[list[Row]]]:
    """Trace the dense pass, and find its computing operations with all sizes as functions of the widths.

    Returns:
        The pass; its operations; the numbers of each operation, followed, for `values`, by the dimensions of each value
        of the pass.

    Raises:
        UnsupportedModelError: If the model runs other operations once it is pruned.
    """
    slicer = Slicer(example.model)
    device = next((p.device for p in example.model.parameters()), torch.device("cpu"))
    records: list[Record] = []
    in_place: list[bool] = []

    def run(widths: IntArray) -> tuple[list[TorchOperation], list[tuple[int, ...]]]:
        cut = example.of(slicer.cut(edit_to(structure, widths)).eval())
        one_off = len(records) and (widths != structure.sizes).sum() == 1  # the run at random widths must check all
        record = trace(cut, values=True, foreseen=records[0].foreseen if one_off else None)
        if not records:
            records.append(record)
            in_place.extend(_additions_in_place(cut, record))
        _write_in_place(record, in_place)
        return _operations(record, device), [value.shape for value in record.values] if values else []

    dense, rows = sizes_of(run, structure, seed)
    return records[0], dense, rows


def _additions_in_place(example: Example, record: Record) -> list[bool]:
    """Return whether each addition of a pass writes into its argument in inference, as that of a bias may."""
    seen = [op.name for op in record.ops if op.name in ("add", "add_")]
    names = [name.removeprefix("aten::") for name in operations_of(example.as_traced())]
    ran = [name for name in names if name in ("add", "add_")]
    return [name == "add_" for name in ran] if len(ran) == len(seen) else []


def _write_in_place(record: Record, in_place: Sequence[bool]) -> None:
    """Turn additions of a pass into the additions in place that inference runs."""
    additions = [op for op in record.ops if op.name in ("add", "add_")]
    if len(additions) != len(in_place):
        return
    for op, writes in zip(additions, in_place, strict=True):
        if writes and op.func is torch.ops.aten.add.Tensor:
            target = op.args["self"]
            (result,) = op.results()
            record.values[result].base = record.values[target.id].base
            record.ops[op.index] = replace(op, func=torch.ops.aten.add_.Tensor, outputs=target)


@dataclass(frozen=True)
class TorchOperation:
    """Operation of PyTorch; implements `Operation`."""

    op: Op
    template: str
    leaves: tuple[Any, ...]
    tree: Any
    numbers: tuple[int, ...]
    device: torch.device
    aligned: int = 1

    @property
    def kind(self) -> str:
        """One of those of `Family`."""
        name = self.op.name
        if "convolution" in name:
            return "grouped convolution" if self.op.args.get("groups", 1) > 1 else "convolution"
        if name.lstrip("_") in ("mm", "addmm", "bmm", "baddbmm", "grouped_mm") or "attention" in name:
            return "matmul"
        return "norm" if "norm" in name else "elementwise"

    @property
    def module(self) -> str:
        """Module that ran it."""
        return self.op.module

    def where(self) -> str:
        """Its name and place in the model."""
        return self.op.where()

    def describe(self, numbers: Iterator[str]) -> str:
        """Its signature, with these words for its numbers."""
        said = []
        for name, leaf in zip(_names(self), self.leaves, strict=True):
            if isinstance(leaf, _Spec):
                shape = "x".join(next(numbers) for _ in range(leaf.dims))
                order = "" if leaf.order == tuple(range(leaf.dims)) else f" order {''.join(map(str, leaf.order))}"
                stretched = f" broadcast {leaf.broadcast}" if leaf.broadcast else ""
                said.append(f"{name}={leaf.dtype}[{shape}]{order}{stretched}")
            elif leaf is int:
                said.append(f"{name}={next(numbers)}")
            elif leaf is not None:
                said.append(f"{name}={json.dumps(leaf, default=str)}")
        return f"{self.op.func}({', '.join(said)})"

    def make(self, numbers: Iterator[int]) -> Callable[[], Any]:
        """Make a call that runs it alone, on tensors of its own."""
        func = self.op.func
        names = [a for a in func._schema.arguments if a.name in self.op.args]
        leaves: list[Any] = []
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, _Spec):
                shape = [next(numbers) for _ in range(leaf.dims)]
                leaves.append(_tensor(leaf, shape, self.device, func._schema.is_mutable, i == 0))
            else:
                leaves.append(next(numbers) if leaf is int else leaf)
        bound = tree_unflatten(leaves, self.tree)
        positional = tuple(bound[a.name] for a in names if not a.kwarg_only)
        keywords = {a.name: bound[a.name] for a in names if a.kwarg_only}
        return lambda: func(*positional, **keywords)


def _operations(record: Record, device: torch.device) -> list[TorchOperation]:
    """Operations that compute, each with its numbers separated from everything else."""
    found = []
    for op in record.ops[: record.first]:
        results = op.results()
        read = set(op.inputs())
        views = all(record.values[i].base != i and i not in read for i in results)
        if not results or views or not read:
            continue
        leaves, tree = tree_flatten(dict(op.args))
        numbers: list[int] = []
        kept: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, Ref):
                value = record.values[leaf.id]
                kept.append(_spec(value.shape, value.strides, value.dtype))
                numbers += value.shape
            elif isinstance(leaf, int) and not isinstance(leaf, bool):
                kept.append(int)
                numbers.append(leaf)
            else:
                kept.append(leaf)
        template = f"{op.func} {tree} {[_stable(leaf) for leaf in kept]}"
        found.append(TorchOperation(op, template, tuple(kept), tree, tuple(numbers), device))
    return found


def _stable(leaf: Any) -> Any:
    return (leaf.dims, leaf.dtype) if isinstance(leaf, _Spec) else str(leaf)


def _spec(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> _Spec:
    steps = strides or tuple(torch.empty(shape, device="meta").stride())
    order = tuple(sorted(range(len(shape)), key=lambda dim: -steps[dim]))
    broadcast = tuple(dim for dim, step in enumerate(steps) if step == 0 and shape[dim] > 1)
    return _Spec(len(shape), str(dtype).removeprefix("torch."), order, broadcast)


def _names(operation: TorchOperation) -> list[str]:
    """The argument that each leaf belongs to."""
    return [name for name, value in operation.op.args.items() for _ in tree_flatten(value)[0]]


def _tensor(spec: _Spec, shape: list[int], device: torch.device, writes: bool, first: bool) -> torch.Tensor:
    """Make a tensor in the memory layout of the model's own: ones where an operation writes, else positive noise."""
    dtype = getattr(torch, spec.dtype)
    own = [1 if dim in spec.broadcast else size for dim, size in enumerate(shape)]
    stored = [own[dim] for dim in spec.order]
    if not dtype.is_floating_point:
        tensor = torch.zeros(stored, dtype=dtype, device=device)
    elif writes:
        tensor = torch.full(stored, _LARGE if first else 1.0, dtype=dtype, device=device)
    else:
        count = math.prod(stored)
        noise = torch.rand(min(count, _NOISE), device=device).to(dtype) + 0.1
        tensor = noise.repeat(-(-count // _NOISE))[:count].view(stored)
    back = [spec.order.index(dim) for dim in range(len(shape))]
    return tensor.permute(back).expand(shape)
