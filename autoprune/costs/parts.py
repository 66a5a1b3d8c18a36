"""The operations that a model executes, with every size in their arguments as a function of the widths of its groups.

The model is run dense, and once more for each group with a few of its units gone. Every integer of an operation, in a
shape or in an argument such as ``groups``, is an affine function of the widths, so these runs determine it; a run at
random widths then checks it. This needs no rule for any operation, and holds for any batch size. Operations that differ
in nothing but the names of their groups make a *family*: whatever it costs, it is measured once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from autoprune.errors import UnsupportedModelError
from autoprune.protocols import FloatArray, IntArray, Pruning
from autoprune.structure.slicing import Slicer
from autoprune.structure.structure import Structure
from autoprune.structure.trace import Forward, Op, Record, Ref, trace

Size = tuple[int, tuple[tuple[int, int], ...]]
"""A size as a function of widths: its fixed part, then numbers of groups with what each unit adds, ascending."""

Row = tuple[Fraction, tuple[tuple[int, Fraction], ...]]
"""A number as a function of widths: its fixed part, then numbers of groups with what each unit adds."""

_LARGE = 1e4  # what an operation that writes into its argument may halve again and again without reaching denormals


@dataclass(frozen=True)
class _Spec:
    """A tensor among the arguments, without its sizes: they are among the numbers."""

    dims: int
    dtype: str
    order: tuple[int, ...]  # dimensions from the slowest to the fastest in memory
    broadcast: tuple[int, ...]  # dimensions of stride 0


class Operation(Protocol):
    """Something that a model executes, in any runtime.

    Attributes:
        template: Everything about it except its numbers; equal where two operations differ in their sizes only.
        numbers: All sizes and other whole numbers in its arguments.
        kind: One of those of `Family`.
        aligned: As `Family` has it.
    """

    @property
    def template(self) -> str: ...  # noqa: D102
    @property
    def numbers(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def aligned(self) -> int: ...  # noqa: D102

    def where(self) -> str:
        """Its name and place in the model, for messages."""
        ...

    def describe(self, numbers: Iterator[str]) -> str:
        """A line of text that says what it is, with these words for its numbers."""
        ...

    def make(self, numbers: Iterator[int]) -> Callable[[], Any]:
        """What runs it alone with these numbers, on data of its own."""
        ...


AnyOperation = TypeVar("AnyOperation", bound=Operation)


@dataclass(frozen=True)
class Family:
    """Operations that take equal time at equal sizes.

    Attributes:
        key: Everything that they agree in, readable.
        kind: ``"convolution"``, ``"grouped convolution"``, ``"matmul"``, ``"norm"`` or ``"elementwise"``.
        highest: The largest value of each variable size that occurs, length v.
        lowest: The smallest that can occur, length v.
        steps: What values of each variable are multiples of, length v.
        aligned: Multiples of this may run on other code than the values between them, and are a grid of their own.
        make: Values, length v, to a call that runs the operation on tensors of its own; None once loaded from a file.
    """

    key: str
    kind: str
    highest: tuple[int, ...]
    lowest: tuple[int, ...]
    steps: tuple[int, ...]
    aligned: int = 1
    make: Callable[[Sequence[int]], Callable[[], Any]] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Part:
    """Operations of one model, alike in everything.

    Attributes:
        family: Key of their family.
        sizes: The values of its variables as functions of the widths.
        count: How many there are.
    """

    family: str
    sizes: tuple[Size, ...]
    count: int


def find_parts(
    model: nn.Module,
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    forward: Forward,
    seed: int = 0,
) -> tuple[list[Family], list[Part]]:
    """Take a model apart into families of operations and where they occur.

    Views are left out: they move no data.

    Args:
        model: The dense model; comes back unchanged.
        structure: What can be removed from it.
        args: Positional inputs, of the batch size that matters.
        kwargs: Keyword inputs.
        forward: Runs the model on them.
        seed: Draws the widths that are checked.

    Raises:
        UnsupportedModelError: If the model runs other operations once it is pruned.
    """
    _, calls, rows = sized_calls(model, structure, args, kwargs, forward, seed)
    return families_of(calls, rows, structure)


def sized_calls(
    model: nn.Module,
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    forward: Forward,
    seed: int,
    *,
    values: bool = False,
) -> tuple[Record, Sequence[Call], list[list[Row]]]:
    """The dense pass, the operations of it that compute, and all sizes as functions of the widths.

    Returns:
        The pass; its operations; the numbers of each operation, followed, for `values`, by the dimensions of each value
        of the pass.

    Raises:
        UnsupportedModelError: If the model runs other operations once it is pruned.
    """
    slicer = Slicer(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    records: list[Record] = []

    def run(widths: IntArray) -> tuple[list[Call], list[tuple[int, ...]]]:
        cut = slicer.cut(structure.edit(prefixes(structure, widths))).eval()
        record = trace(cut, args, kwargs, forward, values=True)
        records.extend([] if records else [record])
        return _calls(record, device), [value.shape for value in record.values] if values else []

    dense, rows = sizes_of(run, structure, seed)
    return records[0], dense, rows


def parts_of(
    run: Callable[[IntArray], Sequence[Operation]], structure: Structure, seed: int = 0
) -> tuple[list[Family], list[Part]]:
    """Families and parts of what a model executes: `run` takes widths (groups,) to its operations in order.

    Raises:
        UnsupportedModelError: If other widths give other operations, or sizes that are not affine in them.
    """
    dense, rows = sizes_of(lambda widths: (run(widths), []), structure, seed)
    return families_of(dense, rows, structure)


def sizes_of(
    run: Callable[[IntArray], tuple[Sequence[AnyOperation], Sequence[tuple[int, ...]]]], structure: Structure, seed: int
) -> tuple[Sequence[AnyOperation], list[list[Row]]]:
    """All sizes as functions of the widths: `run` takes these (groups,) to operations in order, and to other shapes.

    Returns:
        The dense operations; the numbers of each, followed by the dimensions of each of the other shapes.
    """

    def numbers_of(operations: Sequence[AnyOperation], shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [*(operation.numbers for operation in operations), *shapes]

    dense, shapes = run(structure.sizes)
    numbers = numbers_of(dense, shapes)
    fixed = [np.array(own, dtype=np.int64) for own in numbers]
    slopes = [np.zeros((len(own), len(structure.groups)), dtype=object) for own in numbers]

    def others(widths: IntArray) -> list[tuple[int, ...]]:
        operations, other_shapes = run(widths)
        found = numbers_of(operations, other_shapes)
        _require_same(dense, operations, numbers, found)
        return found

    for g, group in enumerate(structure.groups):
        if group.size == group.multiple:
            continue
        widths = structure.sizes.copy()
        widths[g] -= group.multiple
        for i, other in enumerate(others(widths)):
            for j in np.flatnonzero(fixed[i] != other):
                slopes[i][j, g] = Fraction(int(fixed[i][j] - other[j]), group.multiple)
    sizes = structure.sizes
    rows = [[_row(f, s, sizes) for f, s in zip(fs, ss, strict=True)] for fs, ss in zip(fixed, slopes, strict=True)]
    drawn = draw_widths(structure, 1, np.random.default_rng(seed))[0]
    for i, other in enumerate(others(drawn)):
        if any(_value(row, drawn) != size for row, size in zip(rows[i], other, strict=True)):
            where = dense[i].where() if i < len(dense) else "a tensor"
            raise UnsupportedModelError(
                f"costs of parts need sizes that are affine in the widths, but a size of {where} is not; "
                "pass a function of your own in costs="
            )
    return dense, rows


def prefixes(structure: Structure, widths: Sequence[int] | IntArray) -> Pruning:
    """Keep the first units of every group, as many as `widths` (groups,) says: which ones matters for no size."""
    return Pruning(
        {
            group.name: tuple(range(int(width)))
            for group, width in zip(structure.groups, widths, strict=True)
            if int(width) < group.size
        }
    )


def draw_widths(structure: Structure, n: int, rng: np.random.Generator) -> IntArray:
    """Random widths, shape (n, groups): every other row around a common level, the rest each group for itself."""
    sizes = structure.sizes
    multiples = np.array([group.multiple for group in structure.groups], dtype=np.int64)
    level = rng.uniform(0.1, 1.0, (n, 1)) + rng.normal(0.0, 0.15, (n, len(sizes)))
    alone = rng.uniform(0.0625, 1.0, (n, len(sizes)))
    share = np.where(np.arange(n)[:, None] % 2 == 0, level, alone)
    drawn: IntArray = np.clip(np.rint(share * sizes / multiples).astype(np.int64), 1, sizes // multiples) * multiples
    return drawn


@dataclass(frozen=True)
class Call:
    """An operation of PyTorch, as `Operation` asks for."""

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
        """What runs it alone, on tensors of its own."""
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


def _calls(record: Record, device: torch.device) -> list[Call]:
    """The operations that compute, each with its numbers apart from everything else."""
    found = []
    for op in record.ops[: record.first]:
        results, read = op.results(), set(op.inputs())
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
        found.append(Call(op, template, tuple(kept), tree, tuple(numbers), device))
    return found


def _stable(leaf: Any) -> Any:
    return (leaf.dims, leaf.dtype) if isinstance(leaf, _Spec) else str(leaf)


def _spec(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> _Spec:
    steps = strides or tuple(torch.empty(shape, device="meta").stride())
    order = tuple(sorted(range(len(shape)), key=lambda dim: -steps[dim]))
    broadcast = tuple(dim for dim, step in enumerate(steps) if step == 0 and shape[dim] > 1)
    return _Spec(len(shape), str(dtype).removeprefix("torch."), order, broadcast)


def _require_same(dense: Sequence[Operation], other: Sequence[Operation], *numbers: Sequence[tuple[int, ...]]) -> None:
    counts = [[len(own) for own in some] for some in numbers]
    if [call.template for call in dense] != [call.template for call in other] or counts[0] != counts[1]:
        raise UnsupportedModelError(
            "costs of parts need a model that runs the same operations however narrow it is, and this one does not; "
            "pass a function of your own in costs="
        )


def _row(fixed: int, slopes: Any, sizes: IntArray) -> Row:
    """A number as an affine function, from its dense value and what each unit of each group adds."""
    shares = tuple((g, Fraction(slope)) for g, slope in enumerate(slopes) if slope)
    return Fraction(int(fixed)) - sum((slope * int(sizes[g]) for g, slope in shares), Fraction(0)), shares


def _value(row: Row, widths: IntArray) -> Fraction:
    return row[0] + sum((slope * int(widths[g]) for g, slope in row[1]), Fraction(0))


def _primitive(row: Row) -> tuple[Size, Fraction]:
    """The least whole-numbered size that a row is a multiple of, and that multiple."""
    entries = [row[0], *(slope for _, slope in row[1])]
    whole = math.lcm(*(entry.denominator for entry in entries))
    scale = Fraction(math.gcd(*(int(entry * whole) for entry in entries)), whole)
    return (int(row[0] / scale), tuple((g, int(slope / scale)) for g, slope in row[1])), scale


def families_of(
    calls: Sequence[Operation], rows: Sequence[Sequence[Row]], structure: Structure
) -> tuple[list[Family], list[Part]]:
    """Families of operations, and where they occur; `rows` holds the numbers of each call."""
    families: dict[str, Family] = {}
    counts: dict[tuple[str, tuple[Size, ...]], int] = {}
    least = np.array([group.multiple for group in structure.groups], dtype=np.int64)
    for call, own in zip(calls, rows, strict=True):
        variables: dict[Size, int] = {}
        steps: list[int] = []
        slots: list[int | tuple[int, Fraction]] = []
        for row in own:
            if not row[1]:
                slots.append(int(row[0]))
                continue
            size, scale = _primitive(row)
            if size not in variables:
                variables[size] = len(variables)
                steps.append(1)
            at = variables[size]
            steps[at] = math.lcm(steps[at], scale.denominator)
            slots.append((at, scale))
        key = call.describe(map(_letter, slots))
        highest = [_at(size, structure.sizes) for size in variables]
        lowest = [_at(size, least) for size in variables]
        if key in families:
            known = families[key]
            highest = list(map(max, known.highest, highest))
            lowest = list(map(min, known.lowest, lowest))
        make = _maker(call, tuple(slots))
        families[key] = Family(key, call.kind, tuple(highest), tuple(lowest), tuple(steps), call.aligned, make)
        place = (key, tuple(variables))
        counts[place] = counts.get(place, 0) + 1
    return list(families.values()), [Part(key, sizes, count) for (key, sizes), count in counts.items()]


def _at(size: Size, widths: IntArray) -> int:
    return size[0] + sum(each * int(widths[g]) for g, each in size[1])


def _letter(slot: int | tuple[int, Fraction]) -> str:
    """A number in a key: itself, or the letter of a variable with its multiple."""
    if isinstance(slot, int):
        return str(slot)
    at, scale = slot
    return ("" if scale == 1 else f"{scale}*") + chr(ord("a") + at)


def _names(call: Call) -> list[str]:
    """The argument that each leaf belongs to."""
    return [name for name, value in call.op.args.items() for _ in tree_flatten(value)[0]]


def _maker(
    call: Operation, slots: tuple[int | tuple[int, Fraction], ...]
) -> Callable[[Sequence[int]], Callable[[], Any]]:
    """What makes the operation at given values of its variables, on tensors of its own."""

    def make(values: Sequence[int]) -> Callable[[], Any]:
        return call.make(slot if isinstance(slot, int) else int(slot[1] * int(values[slot[0]])) for slot in slots)

    return make


def _tensor(spec: _Spec, shape: list[int], device: torch.device, writes: bool, first: bool) -> torch.Tensor:
    """A tensor laid out in memory as the model's own: ones where an operation writes, else positive noise."""
    dtype = getattr(torch, spec.dtype)
    own = [1 if dim in spec.broadcast else size for dim, size in enumerate(shape)]
    stored = [own[dim] for dim in spec.order]
    if not dtype.is_floating_point:
        tensor = torch.zeros(stored, dtype=dtype, device=device)
    elif writes:
        tensor = torch.full(stored, _LARGE if first else 1.0, dtype=dtype, device=device)
    else:
        tensor = torch.rand(stored, device=device).to(dtype) + 0.1
    back = [spec.order.index(dim) for dim in range(len(shape))]
    return tensor.permute(back).expand(shape)


def part_values(parts: Sequence[Part], widths: FloatArray) -> dict[Size, FloatArray]:
    """Every variable size that occurs, at widths (n, groups), shape (n,) each."""
    found: dict[Size, FloatArray] = {}
    for part in parts:
        for size in part.sizes:
            if size not in found:
                index = [g for g, _ in size[1]]
                found[size] = widths[:, index] @ np.array([each for _, each in size[1]], dtype=np.float64) + size[0]
    return found
