"""Operations of a model, with every size in their arguments as a function of the widths of its groups.

The model is run dense, and once more for each group without a few of its units. Every integer of an operation, in a
shape or in an argument such as ``groups``, is an affine function of the widths, so these runs determine it; a run at
random widths then checks it. No run is at a single unit, such as one head: PyTorch then leaves out copies that it makes
at all other widths. A group of two is run with a third unit that repeats the second. This needs no rule for any
operation, and holds for any batch size. Operations that differ only in the names of their groups form a *family*, which
is measured once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, TypeVar

import numpy as np

from autoprune.errors import UnsupportedModelError
from autoprune.protocols import FloatArray, IntArray, Pruning
from autoprune.structure.slicing.slicing import Edit
from autoprune.structure.structure import Structure

ONNXRUNTIME = "onnxruntime"
"""Name of the runtime."""

YARDSTICK = 192
"""Rows of the square matrices of the reference product for operations."""

Size = tuple[int, tuple[tuple[int, int], ...]]
"""Size as a function of widths: its fixed part, then numbers of groups with the share of each unit, ascending."""

Row = tuple[Fraction, tuple[tuple[int, Fraction], ...]]
"""Number as a function of widths: its fixed part, then numbers of groups with the share of each unit."""


class Operation(Protocol):
    """Operation that a model executes, in any runtime.

    Attributes:
        template: Everything about it except its numbers; equal where two operations differ in their sizes only.
        numbers: All sizes and other whole numbers in its arguments.
        kind: One of those of `Family`.
        aligned: As `Family` has it.
        module: Qualified name of the module that ran it; empty where that is not known.
    """

    @property
    def template(self) -> str: ...  # noqa: D102
    @property
    def numbers(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def aligned(self) -> int: ...  # noqa: D102
    @property
    def module(self) -> str: ...  # noqa: D102

    def where(self) -> str:
        """Return its name and place in the model, for messages."""
        ...

    def describe(self, numbers: Iterator[str]) -> str:
        """Describe it in one line of text, with these words for its numbers."""
        ...

    def make(self, numbers: Iterator[int]) -> Callable[[], Any]:
        """Make a call that runs it alone with these numbers, on data of its own."""
        ...


AnyOperation = TypeVar("AnyOperation", bound=Operation)


@dataclass(frozen=True)
class Family:
    """Operations that take equal time at equal sizes.

    Attributes:
        key: Everything that they agree in, readable.
        kind: ``"convolution"``, ``"grouped convolution"``, ``"matmul"``, ``"norm"`` or ``"elementwise"``.
        dense: The variable sizes, length v, of each of them in the dense network.
        lowest: The smallest value of each that can occur, length v.
        steps: Number that the values of each variable are multiples of, length v.
        aligned: Multiples of this may run on other code than the values between them, and have a separate grid.
        make: Values, length v, to a call that runs the operation on tensors of its own; None once loaded from a file.
    """

    key: str
    kind: str
    dense: tuple[tuple[int, ...], ...]
    lowest: tuple[int, ...]
    steps: tuple[int, ...]
    aligned: int = 1
    make: Callable[[Sequence[int]], Callable[[], Any]] | None = field(default=None, repr=False, compare=False)

    @property
    def highest(self) -> tuple[int, ...]:
        """Largest value of each variable over all operations, length v."""
        return tuple(map(max, zip(*self.dense, strict=True)))


@dataclass(frozen=True)
class Part:
    """Operations of one model, alike in everything.

    Attributes:
        family: Key of their family.
        sizes: The values of its variables as functions of the widths.
        count: How many there are.
        branch: Position of the smallest branch of the structure that they vanish with; -1 if there is none.
        modules: Qualified name of the module that runs each of them, empty where that is not known; none in tables of
            earlier versions.
    """

    family: str
    sizes: tuple[Size, ...]
    count: int
    branch: int = -1
    modules: tuple[str, ...] = ()


def parts_of(
    run: Callable[[IntArray], Sequence[Operation]], structure: Structure, seed: int = 0
) -> tuple[list[Family], list[Part]]:
    """Find the families and parts of a model: `run` maps widths (groups,) to its operations in order.

    Raises:
        UnsupportedModelError: If other widths give other operations, or sizes that are not affine in them.
    """
    dense, rows = sizes_of(lambda widths: (run(widths), []), structure, seed)
    return families_of(dense, rows, structure)


def sizes_of(
    run: Callable[[IntArray], tuple[Sequence[AnyOperation], Sequence[tuple[int, ...]]]], structure: Structure, seed: int
) -> tuple[Sequence[AnyOperation], list[list[Row]]]:
    """Find all sizes as functions of the widths: `run` maps widths (groups,) to operations in order and other shapes.

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
        change = group.multiple if group.size - group.multiple == 1 else -group.multiple
        widths = structure.sizes.copy()
        widths[g] += change
        for i, other in enumerate(others(widths)):
            for j in np.flatnonzero(fixed[i] != other):
                slopes[i][j, g] = Fraction(int(other[j] - fixed[i][j]), change)
    sizes = structure.sizes
    rows = [[_row(f, s, sizes) for f, s in zip(fs, ss, strict=True)] for fs, ss in zip(fixed, slopes, strict=True)]
    drawn = np.maximum(draw_widths(structure, 1, np.random.default_rng(seed))[0], np.minimum(structure.sizes, 2))
    for i, other in enumerate(others(drawn)):
        if any(_value(row, drawn) != size for row, size in zip(rows[i], other, strict=True)):
            where = dense[i].where() if i < len(dense) else "a tensor"
            raise UnsupportedModelError(
                f"costs of parts need sizes that are affine in the widths, but a size of {where} is not; "
                "pass a function of your own in costs="
            )
    return dense, rows


def prefixes(structure: Structure, widths: Sequence[int] | IntArray) -> Pruning:
    """Keep the first units of every group, as many as `widths` (groups,) says: sizes do not depend on which ones."""
    return Pruning(
        {
            group.name: tuple(range(int(width)))
            for group, width in zip(structure.groups, widths, strict=True)
            if int(width) < group.size
        }
    )


def edit_to(structure: Structure, widths: IntArray) -> Edit:
    """Edit of a model to widths (groups,), which may be up to twice the dense ones: the last units are then repeated.

    It is right for shapes, not for values: repeated units stand after all others, wherever the model has them.
    """
    edit = structure.edit(prefixes(structure, np.minimum(widths, structure.sizes)))
    more = np.maximum(widths - structure.sizes, 0)
    if not more.any():
        return edit
    ends = np.cumsum(structure.sizes)
    again = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, more, strict=True)])
    slices = {name: dict(own) for name, own in edit.slices.items()}
    for name, dims in structure.units_of.items():
        for dim, units in enumerate(dims):
            if units is not None and len(repeated := np.flatnonzero(np.isin(units, again))):
                own = slices.setdefault(name, {})
                own[dim] = np.concatenate([own.get(dim, np.arange(len(units))), repeated])
    wide = {group.name: int(width) for group, width in zip(structure.groups, widths, strict=True)}
    attributes: dict[str, dict[str, int]] = {}
    for attribute in structure.attributes:
        attributes.setdefault(attribute.module, {})[attribute.path] = attribute.value(wide)
    return Edit(slices, attributes, graphs=structure.graphs)


def draw_widths(structure: Structure, n: int, rng: np.random.Generator) -> IntArray:
    """Random widths, shape (n, groups): every other row around a common level, the rest independent in each group."""
    sizes = structure.sizes
    multiples = np.array([group.multiple for group in structure.groups], dtype=np.int64)
    level = rng.uniform(0.1, 1.0, (n, 1)) + rng.normal(0.0, 0.15, (n, len(sizes)))
    alone = rng.uniform(0.0625, 1.0, (n, len(sizes)))
    share = np.where(np.arange(n)[:, None] % 2 == 0, level, alone)
    drawn: IntArray = np.clip(np.rint(share * sizes / multiples).astype(np.int64), 1, sizes // multiples) * multiples
    return drawn


def _require_same(dense: Sequence[Operation], other: Sequence[Operation], *numbers: Sequence[tuple[int, ...]]) -> None:
    counts = [[len(own) for own in some] for some in numbers]
    if [call.template for call in dense] != [call.template for call in other] or counts[0] != counts[1]:
        raise UnsupportedModelError(
            "costs of parts need a model that runs the same operations however narrow it is, and this one does not; "
            "pass a function of your own in costs="
        )


def _row(fixed: int, slopes: Any, sizes: IntArray) -> Row:
    """Number as an affine function, from its dense value and the share of each unit of each group."""
    shares = tuple((g, Fraction(slope)) for g, slope in enumerate(slopes) if slope)
    return Fraction(int(fixed)) - sum((slope * int(sizes[g]) for g, slope in shares), Fraction(0)), shares


def _value(row: Row, widths: IntArray) -> Fraction:
    return row[0] + sum((slope * int(widths[g]) for g, slope in row[1]), Fraction(0))


def _primitive(row: Row) -> tuple[Size, Fraction]:
    """Smallest whole-numbered size that a row is a multiple of, and that multiple."""
    entries = [row[0], *(slope for _, slope in row[1])]
    whole = math.lcm(*(entry.denominator for entry in entries))
    scale = Fraction(math.gcd(*(int(entry * whole) for entry in entries)), whole)
    return (int(row[0] / scale), tuple((g, int(slope / scale)) for g, slope in row[1])), scale


def families_of(
    calls: Sequence[Operation], rows: Sequence[Sequence[Row]], structure: Structure
) -> tuple[list[Family], list[Part]]:
    """Families of operations, and the parts where they occur; `rows` holds the numbers of each call."""
    families: dict[str, Family] = {}
    modules: dict[tuple[str, tuple[Size, ...], int], list[str]] = {}
    branches: dict[str, int] = {}
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
        dense: tuple[tuple[int, ...], ...] = (tuple(_at(size, structure.sizes) for size in variables),)
        lowest = [_at(size, least) for size in variables]
        if key in families:
            known = families[key]
            dense = known.dense + dense
            lowest = list(map(min, known.lowest, lowest))
        make = _maker(call, tuple(slots))
        families[key] = Family(key, call.kind, dense, tuple(lowest), tuple(steps), call.aligned, make)
        if call.module not in branches:
            branches[call.module] = structure.presence.branch_of(call.module) if call.module else -1
        modules.setdefault((key, tuple(variables), branches[call.module]), []).append(call.module)
    parts = [Part(key, sizes, len(own), branch, tuple(own)) for (key, sizes, branch), own in modules.items()]
    return list(families.values()), parts


def _at(size: Size, widths: IntArray) -> int:
    return size[0] + sum(each * int(widths[g]) for g, each in size[1])


def _letter(slot: int | tuple[int, Fraction]) -> str:
    """Number in a key: itself, or the letter of a variable with its multiple."""
    if isinstance(slot, int):
        return str(slot)
    at, scale = slot
    return ("" if scale == 1 else f"{scale}*") + chr(ord("a") + at)


def _maker(
    call: Operation, slots: tuple[int | tuple[int, Fraction], ...]
) -> Callable[[Sequence[int]], Callable[[], Any]]:
    """Function that makes the operation at given values of its variables, on tensors of its own."""

    def make(values: Sequence[int]) -> Callable[[], Any]:
        return call.make(slot if isinstance(slot, int) else int(slot[1] * int(values[slot[0]])) for slot in slots)

    return make


def part_values(parts: Sequence[Part], widths: FloatArray) -> dict[Size, FloatArray]:
    """Values of every variable size that occurs, at widths (n, groups), shape (n,) each."""
    found: dict[Size, FloatArray] = {}
    for part in parts:
        for size in part.sizes:
            if size not in found:
                index = [g for g, _ in size[1]]
                found[size] = widths[:, index] @ np.array([each for _, each in size[1]], dtype=np.float64) + size[0]
    return found
