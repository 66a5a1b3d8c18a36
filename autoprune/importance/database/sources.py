"""Sources: inputs that weights which read units multiply, each with all weights that multiply the same one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from autoprune.data.batch import batch_size, beginning
from autoprune.data.sampling import seeded
from autoprune.importance.calibration import Calibration, private_copy
from autoprune.importance.padding import positions_of
from autoprune.importance.reading import Reader, Reading
from autoprune.protocols import IntArray
from autoprune.structure.owners import owners
from autoprune.structure.structure import Structure

LAID_OUT = 2
"""Samples on which the weights that read units are found, and the rows of each counted."""


@dataclass(frozen=True, eq=False)
class Source:
    """Input of one weight, or of several that multiply the same rows.

    Attributes:
        readers: The weights.
        columns: Length of a row.
        units: Unit of each column, numbered group by group as in ``structure.units_of``; -1 stays. Shape (columns,).
        centred: Whether a bias or batch norm corrects the mean of every output.
        refitted: Whether the weights may get new values: another place does not read them.
        rows: Number of rows of all calibration samples, as estimated from a few.
    """

    readers: tuple[Reader, ...]
    columns: int
    units: IntArray
    centred: bool
    refitted: bool
    rows: int


def find_sources(calibration: Calibration) -> list[Source]:
    """Find the sources in forward order, by a forward pass of a few samples."""
    model, structure = private_copy(calibration.model), calibration.structure
    few = beginning(calibration.batches, LAID_OUT)
    numbers: dict[Reader, list[int]] = defaultdict(list)
    rows: Counter[Reader] = Counter()
    latest: list[Tensor] = []  # held, so that no other input takes its memory
    version = [0, 0]  # of the latest input, and the number of inputs so far

    def see(reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        x = reading.source
        assert x is not None
        if not (latest and _same(latest[0], x) and version[0] == x._version):
            latest[:] = [x]
            version[:] = [x._version, version[1] + 1]
        numbers[reader].append(version[1])
        rows[reader] += sum(len(part) for part in parts())

    reading = Reading(calibration.model, structure, see, tied=True)
    with seeded(0):
        for batch in few:
            with reading.batch(positions_of(batch)):
                calibration.forward(model, batch)
    scale = sum(map(batch_size, calibration.batches)) / max(sum(map(batch_size, few)), 1)
    free = _free(calibration, numbers, reading.otherwise)
    alike: dict[tuple[object, ...], list[Reader]] = defaultdict(list)
    for reader, inputs in numbers.items():
        centred = reader in reading.normalised or reading.bias_of(reader) is not None
        alike[(*inputs, reader.columns, centred, reader in free)].append(reader)
    return [
        Source(
            readers=tuple(each),
            columns=each[0].columns,
            units=columns_of(each[0], structure),
            centred=bool(key[-2]),
            refitted=bool(key[-1]),
            rows=max(1, round(rows[each[0]] * scale)),
        )
        for key, each in alike.items()
    ]


def columns_of(reader: Reader, structure: Structure) -> IntArray:
    """Unit of each column of a reader's matrix, shape (columns,); -1 stays."""
    units = structure.units_of[reader.name][reader.dim]
    assert units is not None
    return np.repeat(units, reader.columns // len(units))


def owned_columns(source: Source, start: int, size: int) -> IntArray | None:
    """Columns of a source that the units `start` to ``start + size`` own, shape (units, members); None without any."""
    mine = np.flatnonzero((source.units >= start) & (source.units < start + size))
    if not len(mine) or len(mine) % size:
        return None
    ordered = mine[np.argsort(source.units[mine], kind="stable")].reshape(size, -1)
    alike = (source.units[ordered] == np.arange(start, start + size)[:, None]).all()
    return ordered if alike else None


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two matrices are the same values in memory; inputs of convolutions are never compared."""
    return a.ndim == b.ndim == 2 and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _free(calibration: Calibration, readers: Mapping[Reader, Sequence[int]], otherwise: set[str]) -> set[Reader]:
    """Readers whose values nothing else depends on: one module holds them, and other readers have other rows."""
    held = Counter(owner.name for owner in owners(calibration.model))
    by_name: dict[str, list[Reader]] = defaultdict(list)
    for reader in readers:
        by_name[reader.name].append(reader)
    found = set()
    for name, each in by_name.items():
        covered = np.concatenate([np.arange(reader.start, reader.start + reader.outputs) for reader in each])
        if held[name] == 1 and name not in otherwise and len(np.unique(covered)) == len(covered):
            found.update(each)
    return found
