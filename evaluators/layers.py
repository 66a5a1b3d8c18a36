"""The layers that a re-fit changes: what each reads in the dense model, and how its equations are solved."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.batches import Batch, batch_size, slice_batch
from autoprune.criteria import private_copy
from autoprune.evaluators.least_squares import RIDGES, Normal
from autoprune.evaluators.memory import Halving
from autoprune.evaluators.moments import PRECISE, Moments
from autoprune.evaluators.reading import Reader, watch
from autoprune.evaluators.room import bytes_of
from autoprune.structure.slicing import Edit
from autoprune.structure.structure import Structure

log = logging.getLogger(__name__)

Forward = Callable[[nn.Module, Batch], Any]

COUNTED = 32
"""Samples that tell how many rows each weight reads."""
LEAST_WORK = 2**28
"""Multiply-accumulates for the equations of a candidate that nobody would notice: some hundredths of a second."""
_SHARE = 0.5  # of the products of one calibration pass, for the equations of a candidate
_SETUP = 8  # such passes, for the products of inputs
_FEWEST = 16  # rows for each column that are taken even beyond that
_SKETCHES = (4096, 2048, 1024, 512, 256, 128, 64)
_JUDGED = 2048  # held-out rows that a ridge is judged on
JUDGED_BYTES = 2**27
"""Most memory for weights that ridges are judged with at once; half of the model where that is more."""
_DEFAULT_RIDGE = 1e-2  # where no sample can be held out


@dataclass
class Layer:
    """A weight that reads units, and what it reads.

    Attributes:
        reader: The weight.
        moments: Of what it multiplies, padding of convolutions included and of batches not.
        bias: The parameter that is added to what it gives, or None.
        normalised: Whether batch norm reads what it gives, and so takes any constant off it.
        ridge: How strongly the fit is held to the inherited weights; infinite where no fit does better on held-out
            samples.
    """

    reader: Reader
    moments: Moments
    bias: str | None = None
    normalised: bool = False
    ridge: float = _DEFAULT_RIDGE


@dataclass(frozen=True)
class Reads:
    """What a model, its structure and the calibration samples give.

    Attributes:
        model: The dense model.
        structure: Its structure.
        batches: Calibration data.
        forward: Runs the model on a batch.
    """

    model: nn.Module
    structure: Structure
    batches: Sequence[Batch]
    forward: Forward


def find_layers(
    reads: Reads, memory_bytes: int, ridge: float | None, typical: Edit, centred: Callable[[Layer], bool]
) -> list[Layer]:
    """The layers that can be re-fitted, with the moments of what they read in the dense model.

    One pass over the calibration samples, and a few samples more. Equations whose work would be out of proportion to
    that pass, or that would not fit into memory, are solved from a sketch of their rows.

    Args:
        reads: Model and samples; the model comes back unchanged.
        memory_bytes: Most memory for moments; of the largest only means are kept, with a warning in the log. 0 for
            means alone.
        ridge: For all layers, or None to choose it for each by held-out samples.
        typical: The edit that it is chosen with.
        centred: Whether a bias or batch norm takes care of the mean of a layer.
    """
    copied = private_copy(reads.model)

    def attempt(parts: list[Batch]) -> list[Layer]:
        return _find(Reads(copied, reads.structure, parts, reads.forward), memory_bytes, ridge, typical, centred)

    # All of it again for smaller batches where memory runs out, because part of one was averaged.
    return Halving()(attempt, reads.batches)


def _find(
    reads: Reads, memory_bytes: int, ridge: float | None, typical: Edit, centred: Callable[[Layer], bool]
) -> list[Layer]:
    layers = _laid_out(reads, memory_bytes)
    total = sum(map(batch_size, reads.batches))
    held = total // 4 if ridge is None else 0
    fitted, judged = _divided(reads.batches, total - held)
    _take(reads, layers, fitted)
    if ridge is not None:
        for layer in layers.values():
            layer.ridge = ridge
    elif judged:
        _choose_ridges(reads, layers, judged, typical, centred)
    return [layer for layer in layers.values() if layer.moments.finite]


def _divided(batches: Sequence[Batch], samples: int) -> tuple[list[Batch], list[Batch]]:
    """The first so many samples, and the others."""
    first: list[Batch] = []
    rest: list[Batch] = []
    for batch in batches:
        size = batch_size(batch)
        if samples > 0:
            first.append(batch if size <= samples else slice_batch(batch, 0, samples))
        if size > samples:
            rest.append(batch if samples <= 0 else slice_batch(batch, samples, size))
        samples -= size
    return first, rest


def _laid_out(reads: Reads, memory_bytes: int) -> dict[Reader, Layer]:
    """Empty moments for each weight that a few samples show, as large as work and memory allow."""
    few, _ = _divided(reads.batches, COUNTED)
    rows: Counter[Reader] = Counter()

    def count(reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        rows[reader] += sum(len(part) for part in parts())

    reading = watch(reads.model, reads.structure, few, reads.forward, count)
    scale = sum(map(batch_size, reads.batches)) / max(sum(map(batch_size, few)), 1)
    usable = [reader for reader in _separate(rows) if rows[reader] and reader.name not in reading.otherwise]
    counts = {reader: max(1, round(rows[reader] * scale)) for reader in usable}
    plan = _plan(counts, memory_bytes)
    return {
        reader: Layer(reader, plan[reader], reading.bias_of(reader), reader in reading.normalised) for reader in usable
    }


def _separate(readers: Mapping[Reader, int]) -> list[Reader]:
    """Those of weights whose readers are about different rows."""
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
    """How to keep the moments of each weight, given the rows that it reads of all samples."""
    work = {reader: n * reader.columns * reader.outputs for reader, n in rows.items()}
    left, memory = float(max(LEAST_WORK, _SHARE * sum(work.values()))), memory_bytes
    found = {}
    waiting = sorted(rows, key=lambda reader: (_whole(reader), reader.columns))
    while waiting:
        reader = waiting.pop(0)
        n, columns = rows[reader], reader.columns
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
    """Multiply-accumulates of the equations of so many rows."""
    return rows**3 / 3 + rows**2 * reader.columns + 2.0 * rows * reader.columns * reader.outputs


def _take(reads: Reads, layers: Mapping[Reader, Layer], batches: Sequence[Batch]) -> None:
    """Add what the layers read on batches to their moments."""

    def see(reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        if reader in layers:
            for rows in parts():
                layers[reader].moments.add(rows)

    watch(reads.model, reads.structure, batches, reads.forward, see)


def _choose_ridges(
    reads: Reads,
    layers: Mapping[Reader, Layer],
    batches: Sequence[Batch],
    typical: Edit,
    centred: Callable[[Layer], bool],
) -> None:
    """Choose each ridge by the error on samples that were held out, and then take these samples in, too."""
    pairs, used = [list[tuple[Reader, int]]()], 0
    most = max(JUDGED_BYTES, bytes_of(reads.model) // 2)
    for reader, layer in layers.items():
        if columns_kept(reader, reads.model, typical) is None:
            continue
        if layer.moments.sketch_rows is None or not layer.moments.finite:
            continue
        own = matrix_of(reads.model.get_parameter(reader.name), reader).nbytes
        for i in range(len(RIDGES) + 1):
            if pairs[-1] and used + own > most:
                pairs.append([])
                used = 0
            pairs[-1].append((reader, i))
            used += own
    means = {reader: layers[reader].moments.mean for part in pairs for reader, _ in part if centred(layers[reader])}
    errors: dict[Reader, dict[int, Tensor]] = defaultdict(dict)
    for part in pairs:
        lost = _lost(reads, layers, part, typical, centred)
        judged: Counter[Reader] = Counter()

        def see(
            reader: Reader,
            parts: Callable[[], Iterator[Tensor]],
            lost: dict[Reader, dict[int, Tensor]] = lost,
            judged: Counter[Reader] = judged,
            last: bool = part is pairs[-1],
        ) -> None:
            if reader not in layers or not (last or reader in lost):
                return
            layer = layers[reader]
            mean = means.get(reader)
            for rows in parts():
                if reader in lost and judged[reader] < _JUDGED:
                    x = rows[: _JUDGED - judged[reader]]
                    judged[reader] += len(x)
                    x = x if mean is None else x - mean.to(x.dtype)
                    for i, weight in lost[reader].items():
                        each = (x.to(weight.dtype) @ weight.T).square().sum().double()
                        errors[reader][i] = errors[reader].get(i, torch.zeros_like(each)) + each
                if last:
                    layer.moments.add(rows)

        watch(reads.model, reads.structure, batches, reads.forward, see)
    for reader, by_ridge in errors.items():
        found = torch.stack([by_ridge[i] for i in range(len(RIDGES) + 1)])
        best = int(found.argmin()) if found.isfinite().all() else len(RIDGES)
        layers[reader].ridge = RIDGES[best] if best < len(RIDGES) else float("inf")


def _lost(
    reads: Reads,
    layers: Mapping[Reader, Layer],
    pairs: Sequence[tuple[Reader, int]],
    typical: Edit,
    centred: Callable[[Layer], bool],
) -> dict[Reader, dict[int, Tensor]]:
    """What to multiply inputs with for what a layer loses by pruning, with some ridges; the last stands for no fit."""
    lost: dict[Reader, dict[int, Tensor]] = defaultdict(dict)
    for reader, i in pairs:
        lost[reader][i] = matrix_of(reads.model.get_parameter(reader.name).detach(), reader).clone()
    for reader, by_ridge in lost.items():
        kept = columns_kept(reader, reads.model, typical)
        assert kept is not None
        weight = matrix_of(reads.model.get_parameter(reader.name).detach(), reader)
        fits = [i for i in by_ridge if i < len(RIDGES)]
        changes = Normal(layers[reader].moments, centred(layers[reader])).changes(
            weight, kept, [RIDGES[i] for i in fits]
        )
        for i, change in zip(fits, changes, strict=True):
            by_ridge[i][:, kept] = -change.to(weight.dtype)
        if len(RIDGES) in by_ridge:
            by_ridge[len(RIDGES)][:, kept] = 0
    return lost


def matrix_of(parameter: Tensor, reader: Reader) -> Tensor:
    """The matrix (outputs, columns) of a reader, from the dense parameter."""
    matrix = parameter.flatten(1) if reader.dim else parameter.T
    return matrix[reader.start : reader.start + reader.outputs]


def columns_kept(reader: Reader, model: nn.Module, edit: Edit) -> Tensor | None:
    """Columns that stay, int64, shape (k,); None where all do, or where elements are set to zero."""
    slices = edit.slices.get(reader.name, {})
    if reader.dim not in slices or reader.name in edit.zeroed:
        return None
    parameter = model.get_parameter(reader.name)
    columns = np.arange(reader.columns).reshape(parameter.shape[reader.dim], -1)[slices[reader.dim]].ravel()
    return torch.from_numpy(columns).to(parameter.device)
