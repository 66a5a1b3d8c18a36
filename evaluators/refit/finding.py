"""Find the layers that a re-fit changes, and choose the form of the equations of each."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from torch import Tensor

from autoprune.data.batch import Batch, batch_size, beginning, divisible, slice_batch
from autoprune.evaluators.refit.layers import Layer, take
from autoprune.evaluators.refit.ridges import choose_ridges
from autoprune.evaluators.scoring.out_of_memory import Halving
from autoprune.importance.calibration import Calibration, private_copy
from autoprune.importance.moments import PRECISE, Moments
from autoprune.importance.reading import Reader, watch
from autoprune.structure.slicing.slicing import Edit

log = logging.getLogger(__name__)


COUNTED = 2
"""Samples on which the rows that each weight reads are counted."""
LEAST_WORK = 2**28
"""Multiply-accumulates for the equations of a candidate that are always allowed: some hundredths of a second."""
_SHARE = 0.5  # of the products of one calibration pass, for the equations of a candidate
_SETUP = 8  # such passes, for the products of inputs
_STRETCHES = 8  # parts of the samples, the last of each of which judge ridges
_FEWEST = 16  # rows for each column that are taken even beyond that
_SKETCHES = (4096, 2048, 1024, 512, 256, 128, 64)


def find_layers(
    calibration: Calibration, memory_bytes: int, ridge: float | None, typical: Edit, centred: Callable[[Layer], bool]
) -> list[Layer]:
    """Find the layers that can be re-fitted, with the moments of their inputs in the dense model.

    One pass over the calibration samples, and a few samples more. Equations whose work would be out of proportion to
    that pass, or that would not fit into memory, are solved from a sketch of their rows.

    Args:
        calibration: The dense model and the samples.
        memory_bytes: Most memory for moments; of the largest only means are kept, with a warning in the log. 0 for
            means alone.
        ridge: For all layers, or None to choose it for each by held-out samples.
        typical: The edit that it is chosen for.
        centred: Whether a bias or batch norm corrects the mean of a layer.
    """
    calibration = calibration.of(private_copy(calibration.model))

    def attempt(parts: list[Batch]) -> list[Layer]:
        return _find(calibration.on(parts), memory_bytes, ridge, typical, centred)

    # Where memory runs out, everything is repeated with smaller batches, because part of one was already averaged.
    return Halving()(attempt, calibration.batches)


def _find(
    calibration: Calibration, memory_bytes: int, ridge: float | None, typical: Edit, centred: Callable[[Layer], bool]
) -> list[Layer]:
    layers = _laid_out(calibration, memory_bytes)
    total = sum(map(batch_size, calibration.batches))
    held = total // 4 if ridge is None else 0
    fitted, judged = _divided(calibration.batches, held)
    take(calibration.on(fitted), layers)
    if ridge is not None:
        for layer in layers.values():
            layer.ridge = ridge
    elif judged:
        choose_ridges(calibration.on(judged), layers, typical, centred, held / total)
    return [layer for layer in layers.values() if layer.moments.finite]


def _divided(batches: Sequence[Batch], held: int) -> tuple[list[Batch], list[Batch]]:
    """Split batches into samples to fit and `held` to judge by, the same ones however samples are batched.

    These are the last ones of each of `_STRETCHES` parts of all samples, because samples of different kinds may come
    one kind after the other. A batch that cannot be cut goes where most of its samples belong.
    """
    total = sum(map(batch_size, batches))
    ends = [(total * i // _STRETCHES, held * i // _STRETCHES) for i in range(_STRETCHES + 1)]
    left_out = np.zeros(total, dtype=bool)
    for (_, before), (stop, after) in pairwise(ends):
        left_out[stop - (after - before) : stop] = True
    fitted: list[Batch] = []
    judged: list[Batch] = []
    first = 0
    for batch in batches:
        size = batch_size(batch)
        own = left_out[first : first + size]
        first += size
        if divisible(batch):
            for start, stop in pairwise([0, *(np.flatnonzero(np.diff(own)) + 1).tolist(), size]):
                (judged if own[start] else fitted).append(slice_batch(batch, start, stop))
        else:
            (judged if 2 * own.sum() > size else fitted).append(batch)
    return fitted, judged


def _laid_out(calibration: Calibration, memory_bytes: int) -> dict[Reader, Layer]:
    """Empty moments for each weight that a few samples show, as large as work and memory allow."""
    few = beginning(calibration.batches, COUNTED)
    rows: Counter[Reader] = Counter()

    def count(reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        rows[reader] += sum(len(part) for part in parts())

    reading = watch(calibration.on(few), count)
    scale = sum(map(batch_size, calibration.batches)) / max(sum(map(batch_size, few)), 1)
    usable = [reader for reader in _separate(rows) if rows[reader] and reader.name not in reading.otherwise]
    counts = {reader: max(1, round(rows[reader] * scale)) for reader in usable}
    shared = _shared(usable, rows, reading.firsts)
    outputs = Counter[Reader]()
    for reader in usable:
        outputs[shared[reader]] += reader.outputs
    asked = {replace(first, outputs=many): first for first, many in outputs.items()}
    plan = _plan({each: counts[first] for each, first in asked.items()}, memory_bytes)
    moments = {first: plan[each] for each, first in asked.items()}
    return {
        reader: Layer(
            reader,
            moments[shared[reader]],
            reading.bias_of(reader),
            reader in reading.normalised,
            rows=counts[reader],
        )
        for reader in usable
    }


def _shared(
    readers: Sequence[Reader], rows: Mapping[Reader, int], firsts: Mapping[Reader, set[Reader]]
) -> dict[Reader, Reader]:
    """The reader whose moments serve each one, too: both always read the same values, as q, k and v do."""
    serving: dict[tuple[frozenset[Reader], int], Reader] = {}
    found = {}
    for reader in readers:
        always = frozenset(firsts[reader])
        alone = len(always) > 1 or firsts[next(iter(always))] != always
        found[reader] = reader if alone else serving.setdefault((always, rows[reader]), reader)
    return found


def _separate(readers: Mapping[Reader, int]) -> list[Reader]:
    """Readers of the weights whose readers cover disjoint rows."""
    by_name: dict[str, list[Reader]] = defaultdict(list)
    for reader in readers:
        by_name[reader.name].append(reader)
    found = []
    for each in by_name.values():
        covered = np.concatenate([np.arange(reader.start, reader.start + reader.outputs) for reader in each])
        if len(np.unique(covered)) == len(covered):
            found += each
    return found


def _plan(rows: Mapping[Reader, int], memory_bytes: int) -> dict[Reader, Moments]:
    """Choose whole or sketched moments for each weight, given the number of rows that it reads of all samples."""
    work = {reader: n * reader.columns * reader.outputs for reader, n in rows.items()}
    left = float(max(LEAST_WORK, _SHARE * sum(work.values())))
    memory = memory_bytes
    found = {}
    waiting = sorted(rows, key=lambda reader: (_whole(reader), reader.columns))
    while waiting:
        reader = waiting.pop(0)
        n = rows[reader]
        columns = reader.columns
        width = 8 if columns <= PRECISE else 4
        share = left / (len(waiting) + 1)
        sketch = 0
        if _whole(reader) > left or width * columns**2 > memory or n < columns // 2:
            fitting = [r for r in (min(n, most) for most in _SKETCHES) if width * r * columns <= memory]
            cheap = [r for r in fitting if _sketched(reader, r) <= share]
            if not fitting:
                if memory_bytes:
                    log.warning("%s keeps its weights: what it reads takes too much memory", reader.name)
                found[reader] = Moments(columns, None)
                continue
            sketch = cheap[0] if cheap else fitting[-1]
        left -= _sketched(reader, sketch) if sketch else _whole(reader)
        memory -= width * columns * (sketch or columns)
        enough = max(_FEWEST * columns, _SETUP * work[reader] // columns**2)
        found[reader] = Moments(columns, sketch, every=1.0 if sketch else max(1.0, n / enough))
    return found


def _whole(reader: Reader) -> float:
    """Multiply-accumulates of the equations of all columns."""
    return reader.columns**3 / 3 + reader.columns**2 * reader.outputs


def _sketched(reader: Reader, rows: int) -> float:
    """Multiply-accumulates of the equations of a sketch with this number of rows."""
    return rows**3 / 3 + rows**2 * reader.columns + 2.0 * rows * reader.columns * reader.outputs
