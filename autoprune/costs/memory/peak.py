"""Peak memory of pruned models: live tensors at each moment of a real pass, and the scratch memory of operations."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import final

import numpy as np
import torch

from autoprune.costs.memory.fused import Fused, find_fused
from autoprune.costs.memory.scratch import Scratch, Values, fit_scratch
from autoprune.costs.operations.allocations import Allocation, allocation_of
from autoprune.costs.operations.parts import Family, Part, Row, families_of, part_values
from autoprune.costs.operations.torch_parts import sized_operations
from autoprune.costs.structural import live_tensors, product_values
from autoprune.data.sampling import seeded
from autoprune.protocols import FloatArray, IntArray
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.structure.terms import Products, tensor_lives
from autoprune.structure.tracing.record import Value

log = logging.getLogger(__name__)

_ROWS = 4096  # candidates at once: bounds what a prediction holds
_GRANULE = {"cuda": 512}  # the allocator rounds up to multiples of these bytes; on the CPU requests count as they are


@final
@dataclass(frozen=True, eq=False)
class PeakMemory:
    """Peak memory of inference in bytes, at any widths; made by `measure_memory`.

    It counts parameters and buffers, the inputs, the live activations, and the scratch memory of the running operation.
    It leaves out Python and memory that libraries take from the system by themselves.

    Attributes:
        sizes: Affine sizes, shape (s, 1 + groups): fixed part, then the share of each unit of each group.
        state: Bytes of each parameter and buffer.
        tensors: Distinct sizes of activations, in bytes.
        alive: How many of each are alive at each moment that can be the peak, shape (tensors, moments).
        parts: Operations that take scratch, each with the moments at which it runs.
        scratch: Scratch memory of each family of them.
        fused: Calls that run fused where nothing of them is pruned, each with the moments that this replaces. The
            last columns of `alive` are for these, in this order.
        device: ``"cpu"`` or ``"cuda"``, where it was measured.
        inputs: Bytes of the inputs that the model reads.
        batch: Samples of one forward pass.
        left_out: Families that could not be run alone, and count without scratch.
    """

    sizes: FloatArray
    state: Products
    tensors: Products
    alive: FloatArray
    parts: tuple[tuple[Part, tuple[int, ...]], ...]
    scratch: Mapping[str, Scratch]
    device: str
    inputs: float
    batch: int
    left_out: tuple[str, ...] = ()
    fused: tuple[tuple[Fused, tuple[int, ...]], ...] = ()

    def predict(self, widths: FloatArray) -> FloatArray:
        """Bytes at widths (n, groups), shape (n,)."""
        blocks = [self._predict(widths[start : start + _ROWS]) for start in range(0, len(widths), _ROWS)]
        return np.concatenate(blocks) if blocks else np.empty(0)

    def measure(self, example: Example) -> float:
        """Measure the bytes of one forward pass of a built network, counted as in predictions."""
        module = example.model
        state = np.array([[tensor.nbytes for tensor in (*module.parameters(), *module.buffers())]], dtype=np.float64)
        device = next(module.parameters()).device
        top = allocation_of(example, device).peak
        return float(self._rounded(state).sum()) + self.inputs + top

    def _predict(self, widths: FloatArray) -> FloatArray:
        sizes = widths @ self.sizes[:, 1:].T + self.sizes[:, 0]
        held = self._rounded(product_values(self.tensors, sizes)) @ self.alive
        values = part_values([part for part, _ in self.parts] + [fused.part for fused, _ in self.fused], widths)

        def variables(part: Part) -> FloatArray:
            return np.array([values[size] for size in part.sizes]).reshape(len(part.sizes), len(widths)).T

        for part, moments in self.parts:
            held[:, moments] += self.scratch[part.family].predict(variables(part))[:, None]
        for column, (fused, moments) in enumerate(self.fused, held.shape[1] - len(self.fused)):
            apart = ~fused.runs(widths)
            held[:, moments] *= apart[:, None]
            held[apart, column] = 0
            held[~apart, column] += fused.taken.predict(variables(fused.part)[~apart])
        total: FloatArray = self._rounded(product_values(self.state, sizes)).sum(axis=1) + held.max(axis=1)
        return np.rint(total)

    def _rounded(self, bytes_: FloatArray) -> FloatArray:
        granule = _GRANULE.get(self.device, 1)
        rounded: FloatArray = np.ceil(bytes_ / granule) * granule
        return rounded

    def __str__(self) -> str:
        fitted = [*self.scratch.values(), *(fused.taken for fused, _ in self.fused)]
        worst = max((found.error for found in fitted), default=0.0)
        operations = sum(len(moments) for _, moments in self.parts)
        return (
            f"peak of inference at batch {self.batch} on {self.device}, with what {operations} operations allocate "
            f"while they run: formulas fitted to runs here, off by {worst:.1%} of an operation at most in others"
            + (f"; {len(self.left_out)} kinds of operations could not be run alone" if self.left_out else "")
        )


@seeded(0)  # operations run on noise, and a model may draw some itself
def measure_memory(example: Example, structure: Structure) -> PeakMemory:
    """Measure the peak memory of a model and its pruned versions on this device.

    The model runs dense, and once more for each group without a few of its units, which gives every size as a function
    of the widths; then each kind of operation runs alone at some sizes. The model comes back unchanged.

    Args:
        example: The dense model, with inputs of the batch size that matters on its device.
        structure: What can be removed from it.

    Raises:
        UnsupportedModelError: If the model runs other operations once it is pruned.
        ValueError: If the model is on a device whose memory cannot be measured, or a profiler runs.
    """
    device = next(example.model.parameters()).device
    allocation_of(lambda: None, device)  # raises here where nothing can be measured, and not once for each operation
    record, calls, rows = sized_operations(example, structure, seed=0, values=True)
    numbers = rows[: len(calls)]
    dims = rows[len(calls) :]
    families, _ = families_of(calls, numbers, structure)
    scratch, left_out = _scratch_of(families, device)
    running: dict[Part, list[int]] = {}
    for call, own in zip(calls, numbers, strict=True):
        _, (part,) = families_of([call], [own], structure)
        if part.family in scratch:
            running.setdefault(part, []).append(call.op.index)
    table = _Sizes(record.values, dims)
    lives = tensor_lives(record)
    state = [i for i, value in enumerate(record.values) if value.kind in ("parameter", "buffer")]
    born, died = (np.array([life[column] for life in lives], dtype=np.int64) for column in (1, 2))
    further = [index for own in running.values() for index in own]
    calls_apart = find_fused(example, structure, record)
    starts = [fused.first for fused in calls_apart]
    tensors, alive, moments = live_tensors(table.products([i for i, *_ in lives]), born, died, further, starts)
    given = [record.values[i] for i, *_ in lives if record.values[i].kind == "input"]
    return PeakMemory(
        state=table.products(state),
        sizes=table.affine(len(structure.groups)),
        tensors=tensors,
        alive=alive,
        parts=tuple((part, tuple(np.searchsorted(moments, own).tolist())) for part, own in running.items()),
        scratch=scratch,
        device=device.type,
        inputs=float(sum(math.prod(value.shape) * value.dtype.itemsize for value in given)),
        batch=example.samples,
        left_out=tuple(left_out),
        fused=tuple((fused, tuple(_between(moments, fused))) for fused in calls_apart),
    )


def _between(moments: IntArray, fused: Fused) -> list[int]:
    """Numbers of the moments at which the operations run that a fused call replaces."""
    inside: list[int] = np.flatnonzero((moments >= fused.first) & (moments < fused.last)).tolist()
    return inside


def _scratch_of(families: Sequence[Family], device: torch.device) -> tuple[dict[str, Scratch], list[str]]:
    """Scratch memory of the families that take any, and the families that cannot be run alone."""
    found = {}
    left_out = []
    for family in families:

        def run(values: Values, family: Family = family) -> Allocation:
            assert family.make is not None
            return allocation_of(family.make(values), device)

        try:
            scratch = fit_scratch(family, run)
        except Exception as error:  # an operation may need arguments that random tensors are not
            log.warning("counted without scratch, because it cannot be run alone (%s): %s", error, family.key)
            left_out.append(family.key)
            continue
        if scratch is not None:
            found[family.key] = scratch
    return found, left_out


class _Sizes:
    """Collects affine sizes, and bytes of values as products of them."""

    def __init__(self, values: Sequence[Value], dims: Sequence[Sequence[Row]]) -> None:
        self.values = values
        self.dims = dims
        self.index: dict[Row, int] = {(Fraction(1), ()): 0}

    def products(self, which: Sequence[int]) -> Products:
        coefficients = []
        factors = []
        for i in which:
            constant = [float(row[0]) for row in self.dims[i] if not row[1]]
            coefficients.append(float(np.prod(constant, initial=self.values[i].dtype.itemsize)))
            factors.append(sorted(self.index.setdefault(row, len(self.index)) for row in self.dims[i] if row[1]))
        width = max(map(len, factors), default=0)
        padded = [[*own, *[0] * (width - len(own))] for own in factors]
        return Products(np.array(coefficients), np.array(padded, dtype=np.int64).reshape(len(which), width))

    def affine(self, groups: int) -> FloatArray:
        """The sizes collected, shape (s, 1 + groups)."""
        table = np.zeros((len(self.index), 1 + groups))
        for i, (fixed, shares) in enumerate(self.index):
            table[i, 0] = float(fixed)
            for group, each in shares:
                table[i, 1 + group] = float(each)
        return table
