"""Layers that a re-fit changes, with the inputs of each in the dense model and the form of its equations."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.data.batch import Batch, batch_size, divisible, slice_batch
from autoprune.evaluators.activation_cache.limits import bytes_of
from autoprune.evaluators.refit.least_squares import RIDGES, Normal
from autoprune.evaluators.scoring.out_of_memory import Halving
from autoprune.importance.calibration import Calibration, private_copy
from autoprune.importance.moments import PRECISE, Moments, Sample
from autoprune.importance.reading import Reader, matrix_of, watch
from autoprune.structure.slicing.slicing import Edit

log = logging.getLogger(__name__)


COUNTED = 16
"""Samples on which the rows that each weight reads are counted."""
LEAST_WORK = 2**28
"""Multiply-accumulates for the equations of a candidate that are always allowed: some hundredths of a second."""
_SHARE = 0.5  # of the products of one calibration pass, for the equations of a candidate
_SETUP = 8  # such passes, for the products of inputs
_FEWEST = 16  # rows for each column that are taken even beyond that
_SKETCHES = (4096, 2048, 1024, 512, 256, 128, 64)
_JUDGED, _FEWEST_JUDGED = 1024, 64  # held-out rows that a ridge is judged on
_OUTPUTS = 64  # of a layer that are enough for that, because each is fitted on its own
JUDGED_BYTES = 2**27
"""Most memory for rows that ridges are judged on; half of the model where that is more."""
_DEFAULT_RIDGE = 1e-2  # where no sample can be held out


@dataclass
class Layer:
    """Weight that reads units, with the moments of its inputs.

    Attributes:
        reader: The weight.
        moments: Of its inputs, with the padding of convolutions and without that of batches.
        bias: The parameter that is added to its output, or None.
        normalised: Whether batch norm reads its output, and so subtracts any constant.
        ridge: How strongly the fit is held to the inherited weights; infinite where no fit does better on held-out
            samples.
        rows: Number of rows that it reads of all samples, as estimated from a few.
    """

    reader: Reader
    moments: Moments
    bias: str | None = None
    normalised: bool = False
    ridge: float = _DEFAULT_RIDGE
    rows: int = 0


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
    fitted, judged = _divided(calibration.batches, total - held)
    _take(calibration.on(fitted), layers)
    if ridge is not None:
        for layer in layers.values():
            layer.ridge = ridge
    elif judged:
        _choose_ridges(calibration.on(judged), layers, typical, centred, held / total)
        _take(calibration.on(judged), layers)
    return [layer for layer in layers.values() if layer.moments.finite]


def _divided(batches: Sequence[Batch], samples: int) -> tuple[list[Batch], list[Batch]]:
    """Split batches into the first `samples` samples and the others; a batch that cannot be cut goes to one of them."""
    first: list[Batch] = []
    rest: list[Batch] = []
    for batch in batches:
        size = batch_size(batch)
        if samples >= size:
            first.append(batch)
        elif samples <= 0:
            rest.append(batch)
        elif divisible(batch):
            first.append(slice_batch(batch, 0, samples))
            rest.append(slice_batch(batch, samples, size))
        else:
            (first if not first or 2 * samples >= size else rest).append(batch)
        samples -= size
    return first, rest


def _laid_out(calibration: Calibration, memory_bytes: int) -> dict[Reader, Layer]:
    """Empty moments for each weight that a few samples show, as large as work and memory allow."""
    few, _ = _divided(calibration.batches, COUNTED)
    rows: Counter[Reader] = Counter()

    def count(reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        rows[reader] += sum(len(part) for part in parts())

    reading = watch(calibration.on(few), count)
    scale = sum(map(batch_size, calibration.batches)) / max(sum(map(batch_size, few)), 1)
    usable = [reader for reader in _separate(rows) if rows[reader] and reader.name not in reading.otherwise]
    counts = {reader: max(1, round(rows[reader] * scale)) for reader in usable}
    plan = _plan(counts, memory_bytes)
    return {
        reader: Layer(reader, plan[reader], reading.bias_of(reader), reader in reading.normalised, rows=counts[reader])
        for reader in usable
    }


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


def _take(calibration: Calibration, layers: Mapping[Reader, Layer]) -> None:
    """Add what the layers read to their moments."""

    def see(reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        if reader in layers:
            for rows in parts():
                layers[reader].moments.add(rows)

    watch(calibration, see)


def _choose_ridges(
    calibration: Calibration,
    layers: Mapping[Reader, Layer],
    typical: Edit,
    centred: Callable[[Layer], bool],
    share: float,
) -> None:
    """Choose each ridge by the error on held-out rows, spread over all of the samples."""
    fitted = {}
    for reader, layer in layers.items():
        kept = columns_kept(reader, calibration.model, typical)
        if kept is not None and layer.moments.sketch_rows is not None and layer.moments.finite:
            fitted[reader] = kept
    if not fitted:
        return
    width = 4 * sum(reader.columns for reader in fitted)
    most = max(JUDGED_BYTES, bytes_of(calibration.model) // 2) // width
    judged = max(_FEWEST_JUDGED, min(_JUDGED, most))
    samples = {reader: Sample(max(1.0, layers[reader].rows * share / judged)) for reader in fitted}

    def see(reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        if reader in samples:
            for rows in parts():
                samples[reader].add(rows)

    watch(calibration, see)
    for reader, kept in fitted.items():
        layer = layers[reader]
        rows = samples.pop(reader).rows
        if len(rows):
            layer.ridge = _best_ridge(
                layer, matrix_of(calibration.model.get_parameter(reader.name), reader), kept, rows, centred
            )


def _best_ridge(layer: Layer, weight: Tensor, kept: Tensor, rows: Tensor, centred: Callable[[Layer], bool]) -> float:
    """Ridge whose fit has the least error on rows (n, columns); infinite where none is better than no fit."""
    if centred(layer):
        rows = rows - layer.moments.mean.to(rows.dtype)
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    weight = weight.detach().to(rows.dtype)
    stay = rows[:, kept]
    lost = rows[:, gone] @ weight[:, gone].T
    fits = Normal(layer.moments, centred(layer)).changes(weight, kept, RIDGES)
    errors = torch.stack([lost - stay @ fit.to(rows.dtype).T for fit in fits] + [lost]).double().square().sum((1, 2))
    best = int(errors.argmin())
    return RIDGES[best] if errors.isfinite().all() and best < len(RIDGES) else float("inf")


def columns_kept(reader: Reader, model: nn.Module, edit: Edit) -> Tensor | None:
    """Columns that stay, int64, shape (k,); None where all do."""
    slices = edit.slices.get(reader.name, {})
    if reader.dim not in slices:
        return None
    parameter = model.get_parameter(reader.name)
    columns = np.arange(reader.columns).reshape(parameter.shape[reader.dim], -1)[slices[reader.dim]].ravel()
    return torch.from_numpy(columns).to(parameter.device)
