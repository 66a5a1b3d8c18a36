"""Peak memory of pruned models: what is alive at each moment of a real pass, and what operations take besides."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, final

import numpy as np
import torch
from torch import nn

from autoprune.costs.allocations import Allocation, allocation_of
from autoprune.costs.parts import (
    Family,
    Part,
    _calls,
    _families,
    _same_calls,
    _value,
    draw_widths,
    part_values,
    prefixes,
)
from autoprune.costs.scratch import Scratch, Values, fit_scratch
from autoprune.costs.structural import live_tensors, product_values
from autoprune.errors import UnsupportedModelError
from autoprune.protocols import FloatArray, IntArray
from autoprune.structure.slicing import Slicer
from autoprune.structure.structure import Structure
from autoprune.structure.terms import Products, tensor_lives
from autoprune.structure.trace import Forward, Record, trace

log = logging.getLogger(__name__)

_ROWS = 4096  # candidates at once: bounds what a prediction holds


@final
@dataclass(frozen=True, eq=False)
class PeakMemory:
    """Bytes that inference takes at its peak, at any widths; made by `measure_memory`.

    Parameters and buffers, the inputs, the activations alive at the moment, and what the running operation allocates
    for itself. What libraries take from the system by themselves, and the interpreter, are not in it.

    Attributes:
        sizes: Affine sizes, shape (s, 1 + groups): fixed part, then what each unit of each group adds.
        state: Bytes of each parameter and buffer.
        tensors: Distinct sizes of activations, in bytes.
        alive: How many of each are alive at each moment that can be the peak, shape (tensors, moments).
        parts: Operations that take scratch, with the moment of each.
        scratch: What each family of them takes.
        device: ``"cpu"`` or ``"cuda"``, where it was measured.
        batch: Samples of one forward pass.
        left_out: Operations that could not be run alone, and count without scratch.
    """

    sizes: FloatArray
    state: Products
    tensors: Products
    alive: FloatArray
    parts: tuple[tuple[Part, int], ...]
    scratch: Mapping[str, Scratch]
    device: str
    batch: int
    left_out: tuple[str, ...] = ()

    def predict(self, widths: FloatArray) -> FloatArray:
        """Bytes at widths (n, groups), shape (n,)."""
        blocks = [self._predict(widths[start : start + _ROWS]) for start in range(0, len(widths), _ROWS)]
        return np.concatenate(blocks) if blocks else np.empty(0)

    def _predict(self, widths: FloatArray) -> FloatArray:
        sizes = widths @ self.sizes[:, 1:].T + self.sizes[:, 0]
        held = product_values(self.tensors, sizes) @ self.alive
        values = part_values([part for part, _ in self.parts], widths)
        for part, moments in self.merged.items():
            own = np.column_stack([values[size] for size in part[1]]) if part[1] else np.empty((len(widths), 0))
            held[:, moments] += self.scratch[part[0]].predict(own)[:, None]
        total: FloatArray = product_values(self.state, sizes).sum(axis=1) + held.max(axis=1)
        return total

    @property
    def merged(self):
        found: dict[Any, list[int]] = {}
        for part, moment in self.parts:
            found.setdefault((part.family, part.sizes), []).append(moment)
        return found

    def __str__(self) -> str:
        worst = max((found.error for found in self.scratch.values()), default=0.0)
        return (
            f"peak of inference at batch {self.batch} on {self.device}, with the scratch of {len(self.parts)} operations "
            f"measured there; formulas for it are off by {worst:.1%} at most where they were checked"
        )


def measure_memory(
    model: nn.Module,
    structure: Structure,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    run: Forward,
    *,
    batch: int,
    seed: int = 0,
) -> PeakMemory:
    """Learn what a model and its pruned versions take at the peak of a forward pass here.

    The model runs dense, and once more for each group with a few of its units gone, which gives every size as a
    function of the widths; then each kind of operation runs alone at some sizes. The model comes back unchanged.

    Args:
        model: The dense model.
        structure: What can be removed from it.
        args: Positional inputs, of `batch` samples, on the model's device.
        kwargs: Keyword inputs.
        run: Runs the model on them.
        batch: Samples of one forward pass.
        seed: Draws the sizes.

    Raises:
        UnsupportedModelError: If the model runs other operations once it is pruned.
        ValueError: If the model is on a device whose memory cannot be measured.
    """
    device = next(model.parameters()).device
    slicer = Slicer(model)

    def traced(widths: IntArray) -> Record:
        return trace(slicer.cut(structure.edit(prefixes(structure, widths))).eval(), args, kwargs, run, values=True)

    record = traced(structure.sizes)
    calls = _calls(record)
    rows = _affine(traced, structure, seed)
    dims = _Dims(rows, record, len(structure.groups))
    lives = tensor_lives(record)
    state = [i for i, value in enumerate(record.values) if value.kind in ("parameter", "buffer")]
    ends = np.cumsum([dims.count, *(len(call.numbers) for call in calls)])
    own = [rows[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    families, _ = _families(calls, own, structure, device)
    scratch, left_out = _scratch(families, device, seed)
    parts = []
    for call, numbers in zip(calls, own, strict=True):
        (part,) = _families([call], [numbers], structure, device)[1]
        if part.family in scratch:
            parts.append((part, call.op.index))
    born, died = (np.array([life[k] for life in lives], dtype=np.int64) for k in (1, 2))
    tensors, alive, moments = live_tensors(
        dims.products([i for i, _, _ in lives]), born, died, [moment for _, moment in parts]
    )
    return PeakMemory(
        sizes=dims.table(),
        state=dims.products(state),
        tensors=tensors,
        alive=alive,
        parts=tuple((part, int(np.searchsorted(moments, moment))) for part, moment in parts),
        scratch=scratch,
        device=device.type,
        batch=batch,
        left_out=tuple(left_out),
    )


Row = tuple[Fraction, tuple[tuple[int, Fraction], ...]]


def _affine(traced: Callable[[IntArray], Record], structure: Structure, seed: int) -> list[Row]:
    """Every size of every value, then every number of every call, as affine functions of the widths."""

    def numbers(widths: IntArray) -> tuple[IntArray, list[Any], Record]:
        record = traced(widths)
        calls = _calls(record)
        flat = [size for value in record.values for size in value.shape]
        flat += [number for call in calls for number in call.numbers]
        return np.array(flat, dtype=np.int64), calls

    dense, calls = numbers(structure.sizes)
    shares: list[dict[int, Fraction]] = [{} for _ in dense]
    for g, group in enumerate(structure.groups):
        if group.size == group.multiple:
            continue
        widths = structure.sizes.copy()
        widths[g] -= group.multiple
        flat, other = numbers(widths)
        _same_calls(calls, other)
        for j in np.flatnonzero(dense != flat):
            shares[j][g] = Fraction(int(dense[j] - flat[j]), group.multiple)
    sizes = structure.sizes
    rows: list[Row] = []
    for size, own in zip(dense, shares, strict=True):
        fixed = Fraction(int(size)) - sum((each * int(sizes[g]) for g, each in own.items()), Fraction(0))
        rows.append((fixed, tuple(own.items())))
    drawn = draw_widths(structure, 1, np.random.default_rng(seed))[0]
    flat, other = numbers(drawn)
    _same_calls(calls, other)
    if any(_value(row, drawn) != size for row, size in zip(rows, flat, strict=True)):
        raise UnsupportedModelError("x")
    return rows


class _Dims:
    def __init__(self, rows, record, groups):
        self.record = record
        self.groups = groups
        self.starts = np.cumsum([0, *(len(v.shape) for v in record.values)]).tolist()
        self.count = self.starts[-1]
        self.rows = rows
        self.index = {(Fraction(1), ()): 0}

    def products(self, values: Sequence[int]) -> Products:
        coefficients, factors = [], []
        for i in values:
            coefficient, own = float(self.record.values[i].dtype.itemsize), []
            for row in self.rows[self.starts[i] : self.starts[i + 1]]:
                if row[1]:
                    own.append(self.index.setdefault(row, len(self.index)))
                else:
                    coefficient *= int(row[0])
            coefficients.append(coefficient)
            factors.append(sorted(own))
        width = max(map(len, factors), default=0)
        padded = [[*own, *[0] * (width - len(own))] for own in factors]
        return Products(np.array(coefficients), np.array(padded, dtype=np.int64).reshape(len(values), width))

    def table(self) -> FloatArray:
        table = np.zeros((len(self.index), 1 + self.groups))
        for (fixed, shares), i in self.index.items():
            table[i, 0] = float(fixed)
            for g, each in shares:
                table[i, 1 + g] = float(each)
        return table


def _scratch(families: Sequence[Family], device: torch.device, seed: int) -> tuple[dict[str, Scratch], list[str]]:
    found, left_out = {}, []
    for family in families:

        def run(values: Values, family: Family = family) -> Allocation:
            assert family.make is not None
            return allocation_of(family.make(values), device)

        try:
            scratch = fit_scratch(family, run, seed)
        except (RuntimeError, IndexError, ValueError) as error:
            left_out.append(family.key)
            print("LEFT", family.key, repr(error)[:200])
            continue
        if scratch is not None:
            found[family.key] = scratch
    return found, left_out
