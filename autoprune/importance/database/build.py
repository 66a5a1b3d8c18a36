"""Build a layer database: observe the layers that read each group, and remove its units one after the other."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from autoprune.arguments import positive, whole_number
from autoprune.data.batch import batch_size
from autoprune.data.subsets import fingerprint
from autoprune.files.access import make_folder
from autoprune.importance.calibration import Calibration, affordable
from autoprune.importance.database.database import Database, Table
from autoprune.importance.database.downdates import remove_greedily
from autoprune.importance.database.influence import losses_of
from autoprune.importance.database.observation import (
    ENOUGH_ROWS,
    Observation,
    bytes_of_moments,
    observe,
    slopes_of,
)
from autoprune.importance.database.parts import RIDGE, Part
from autoprune.importance.database.sources import Source, find_sources, owned_columns
from autoprune.protocols import IntArray
from autoprune.structure.structure import Structure

log = logging.getLogger(__name__)

MEMORY_BYTES = 2**30
"""Most memory for moments; the greedy pass takes about as much again for one group at a time, in float64."""
MOST_COLUMNS = 6144
"""Most columns of a layer whose equations are solved: beyond that they take minutes."""
FEWEST_SAMPLES, MOST_SAMPLES = 8, 64
"""Samples for backward passes: fewer of a large model."""

_DOWNDATES = 8
"""Multiply-accumulates of a group's greedy pass, in cubes of its columns: a factor and its downdates in float64."""


@dataclass(frozen=True, eq=False)
class _Task:
    """Group to be priced, with the sources that read it and the columns of its units in each."""

    group: str
    reads: tuple[tuple[Source, IntArray], ...]

    @property
    def memory_bytes(self) -> int:
        return sum(bytes_of_moments(source) for source, _ in self.reads)


@dataclass(frozen=True, eq=False)
class Equations:
    """Equations of all layers that read a group.

    Attributes:
        group: Its name.
        parts: The equations.
        weighted: Whether slopes are in units of the loss, see `Database.weighted`.
    """

    group: str
    parts: tuple[Part, ...]
    weighted: bool

    @property
    def sound(self) -> bool:
        """Return whether there are any, and all of them are finite."""
        finite = (part.products.isfinite().all() and part.slopes.isfinite().all() for part in self.parts)
        return len(self.parts) > 0 and all(finite)


def build_database(
    calibration: Calibration,
    path: str | Path | None = None,
    ridge: float = RIDGE,
    memory_bytes: int = MEMORY_BYTES,
    samples: int | None = None,
    seed: int = 0,
) -> Database:
    """Price every number of units of every group.

    One forward pass over the calibration samples collects the moments of the inputs of all layers that read units, and
    a backward pass over the first of them those of the gradients; labels are not used. One pass of downdates a group
    then gives a nested order of its units and the error of each number removed, see `remove_greedily`; products of
    inputs and gradients give the loss, see `losses_of`. All layers that read a group count: linear ones, ungrouped
    convolutions, projections of attention, recurrent cells. Of the rows of a layer at most 16,384, or 32 times its
    columns, are taken.

    Args:
        calibration: The dense model and the samples.
        path: File of the database. It is written after every group, and groups that it holds already are not priced
            again, if it is of the same weights, data and settings; else it is replaced. None keeps nothing.
        ridge: Share of the mean square of the inputs by which re-fits are held to the inherited weights.
        memory_bytes: Most memory for moments. If they take more, the passes are repeated for some groups at a time; a
            group whose own moments take more has no price.
        samples: Number of samples for backward passes; None: 8 to 64, fewer of a large model.
        seed: For the labels drawn, see `sampled_loss`.

    Returns:
        The database; groups that no such layer reads are in `Database.unpriced`, with the reason.

    Raises:
        ValueError: If a setting is out of range.
        FileFormatError: If the file is no sound database.
        OSError: If it cannot be written.
    """
    ridge = positive("ridge", ridge, ", a share of the mean square of inputs")
    memory_bytes = whole_number("memory_bytes", memory_bytes, 1)
    structure = calibration.structure
    if samples is None:
        samples = affordable(structure, FEWEST_SAMPLES, MOST_SAMPLES)
    samples = whole_number("samples", samples, 1)
    state = calibration.model.state_dict()
    identity = fingerprint([state, list(calibration.batches), ridge, samples, seed])
    found = _started(path, identity)
    waiting, unpriced = _tasks(calibration, memory_bytes, set(found.tables) | set(found.unpriced))
    found = replace(found, unpriced={**found.unpriced, **unpriced})
    for each in _equations(calibration, waiting, memory_bytes, samples, seed):
        if each.sound:
            removal, errors = remove_greedily(each.parts, ridge)
            table = Table(removal, errors, losses_of(each.parts, removal, errors, ridge))
            found = replace(found, tables={**found.tables, each.group: table}, weighted=each.weighted)
        else:
            reason = "the moments of its layers are not finite, or there are none"
            found = replace(found, unpriced={**found.unpriced, each.group: reason})
        if path is not None:
            found.save(path)
    if path is not None and not waiting:
        found.save(path)
    log.info("%s", found.note)
    return found


def equations_of(
    calibration: Calibration,
    groups: Collection[str],
    memory_bytes: int = MEMORY_BYTES,
    samples: int | None = None,
    seed: int = 0,
) -> Iterator[Equations]:
    """Collect the equations of some groups, to solve weights from them; arguments are those of `build_database`.

    Those that `build_database` could not price are left out.
    """
    if samples is None:
        samples = affordable(calibration.structure, FEWEST_SAMPLES, MOST_SAMPLES)
    others = {group.name for group in calibration.structure.groups if group.name not in groups}
    tasks, _ = _tasks(calibration, memory_bytes, others)
    yield from _equations(calibration, tasks, memory_bytes, samples, seed)


def work_of_database(calibration: Calibration) -> float:
    """Multiply-accumulates in float32 that building a database takes about: passes, moments, and the greedy pass."""
    structure = calibration.structure
    samples = sum(map(batch_size, calibration.batches))
    passes = (samples + 2 * affordable(structure, FEWEST_SAMPLES, MOST_SAMPLES)) * structure.macs
    tasks, _ = _tasks(calibration, MEMORY_BYTES, set())
    solved = sum(
        min(source.rows, ENOUGH_ROWS) * source.columns**2 + _DOWNDATES * source.columns**3
        for task in tasks
        for source, _ in task.reads
    )
    return float(passes + solved)


def layer_database(calibration: Calibration) -> Database:
    """The database of a calibration with default settings, built once and kept in its file, if it has one."""
    path = calibration.database_file
    if "database" not in calibration.derived:
        if path is not None:
            make_folder(path.parent, "run_dir")
        calibration.derived["database"] = build_database(calibration, path)
    found: Database = calibration.derived["database"]
    return found


def _started(path: str | Path | None, identity: str) -> Database:
    """The database so far, or an empty one."""
    if path is not None and Path(path).exists():
        found = Database.load(path)
        if found.identity == identity:
            return found
        log.warning("%s is of other weights, data or settings, and is replaced", path)
    return Database({}, identity=identity)


def _tasks(calibration: Calibration, memory_bytes: int, known: set[str]) -> tuple[list[_Task], dict[str, str]]:
    """Groups to price, and those that have no price, with reasons; without the known ones."""
    structure = calibration.structure
    if all(group.name in known for group in structure.groups):
        return [], {}
    sources = find_sources(calibration)
    tasks, unpriced = [], {}
    for group, start in zip(structure.groups, _starts(structure), strict=True):
        owned = [(source, owned_columns(source, start, group.size)) for source in sources]
        task = _Task(group.name, tuple((source, columns) for source, columns in owned if columns is not None))
        if group.name in known:
            continue
        if not task.reads:
            unpriced[group.name] = "no linear layer or ungrouped convolution reads its units"
        elif any(source.columns > MOST_COLUMNS for source, _ in task.reads):
            unpriced[group.name] = f"a layer with more than {MOST_COLUMNS} columns reads it"
        elif task.memory_bytes > memory_bytes:
            unpriced[group.name] = f"its moments take {task.memory_bytes} bytes, more than memory_bytes"
        else:
            tasks.append(task)
    return tasks, unpriced


def _starts(structure: Structure) -> list[int]:
    """Number of the first unit of each group."""
    starts: list[int] = np.cumsum([0, *structure.sizes])[:-1].tolist()
    return starts


def _chunks(tasks: Sequence[_Task], memory_bytes: int) -> Iterator[list[_Task]]:
    """Tasks whose moments fit into memory together."""
    chunk: list[_Task] = []
    held: dict[int, int] = {}
    for task in tasks:
        own = {id(source): bytes_of_moments(source) for source, _ in task.reads}
        if chunk and sum({**held, **own}.values()) > memory_bytes:
            yield chunk
            chunk, held = [], {}
        chunk.append(task)
        held.update(own)
    if chunk:
        yield chunk


def _equations(
    calibration: Calibration, tasks: Sequence[_Task], memory_bytes: int, samples: int, seed: int
) -> Iterator[Equations]:
    for chunk in _chunks(tasks, memory_bytes):
        sources = list({id(source): source for task in chunk for source, _ in task.reads}.values())
        observations, draws = observe(calibration, sources, samples, seed)
        seen = {id(each.source): each for each in observations}
        for task in chunk:
            yield Equations(task.group, tuple(_parts(calibration, task, seen, draws)), draws > 0)


def _parts(calibration: Calibration, task: _Task, seen: Mapping[int, Observation], draws: int) -> Iterator[Part]:
    for source, owned in task.reads:
        observation = seen[id(source)]
        if observation.inputs.rows:
            products = observation.inputs.products(source.centred).double()
            slopes = slopes_of(observation, calibration.model, draws).to(products.device)
            columns = torch.from_numpy(owned).to(products.device)
            sums = observation.influence.sums(observation.inputs.mean if source.centred else None)
            influence = None if sums is None or not draws else sums * (0.5 / draws) ** 0.5
            rows = observation.inputs.rows
            yield Part(products, slopes, columns, source.refitted, source.readers, influence, rows)
