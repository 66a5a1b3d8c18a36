"""Observe everything that weights multiply: moments of their inputs, and the energy of gradients at their outputs."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoprune.data.batch import batch_size, beginning
from autoprune.data.sampling import seeded
from autoprune.importance.calibration import Calibration, private_copy
from autoprune.importance.database.observation import detached, divided
from autoprune.importance.database.sources import LAID_OUT
from autoprune.importance.moments import PRECISE, Moments
from autoprune.importance.padding import positions_of
from autoprune.importance.reading import Reader, Reading
from autoprune.metrics.scorers import sampled_loss

log = logging.getLogger(__name__)

ENOUGH_ROWS = 2**14
"""Rows that are always taken of an input; of wide ones at least `FEWEST` for each column."""
FEWEST = 16


@dataclass(eq=False)
class Observed:
    """Matrix within a weight, with what it reads.

    Attributes:
        reader: The rows of the weight.
        moments: Of its inputs; one object for those that read the same values.
        bias: The parameter that is added to its outputs, or None.
        normalised: Whether batch norm reads its outputs, and so subtracts any constant.
        squares: Sum of the squares of the gradients at each output, float64, shape (outputs,); zeros without any.
        draws: Number of labels drawn for the gradients.
    """

    reader: Reader
    moments: Moments
    bias: str | None
    normalised: bool
    squares: Tensor = field(repr=False)
    draws: int = 0

    @property
    def curvature(self) -> Tensor | None:
        """Rise of the loss of the model for a mean squared error of 1 at each output, (outputs,); None if unknown."""
        return 0.5 * self.squares / self.draws if self.draws and bool(self.squares.any()) else None


def observe_weights(
    calibration: Calibration, names: Collection[str], samples: int, memory_bytes: int, seed: int = 0
) -> dict[str, list[Observed]]:
    """Run the dense model on the calibration samples, forwards, and on the first of them backwards, too.

    Args:
        calibration: The dense model and the samples.
        names: Weights to observe.
        samples: Number of samples for backward passes, see `sampled_loss`; labels are not used.
        memory_bytes: Most memory for moments; weights whose moments do not fit are left out.
        seed: For the labels drawn.

    Returns:
        The matrices that each weight is multiplied as; weights of grouped convolutions, weights that other operations
        read, too, and weights that are computed before use are left out.
    """
    found = _laid_out(calibration, names, memory_bytes)
    if samples:
        try:
            _run(calibration, names, found, samples, seed)
        except Exception as error:  # a user's forward need not have gradients, and may raise anything under autograd
            log.info("gradients cannot be observed, and all outputs count alike: %s", error)
            found = _laid_out(calibration, names, memory_bytes)
            _run(calibration, names, found, 0, seed)
    else:
        _run(calibration, names, found, 0, seed)
    by_name: dict[str, list[Observed]] = defaultdict(list)
    for each in found.values():
        if each.moments.finite:
            by_name[each.reader.name].append(each)
    return by_name


def _laid_out(calibration: Calibration, names: Collection[str], memory_bytes: int) -> dict[Reader, Observed]:
    """Empty moments for each matrix that a few samples show."""
    model = private_copy(calibration.model)
    few = beginning(calibration.batches, LAID_OUT)
    rows: Counter[Reader] = Counter()

    def count(reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        rows[reader] += sum(len(part) for part in parts())

    reading = Reading(calibration.model, calibration.structure, count, tied=True, names=names)
    with seeded(0):
        for batch in few:
            with reading.batch(positions_of(batch)):
                calibration.forward(model, batch)
    scale = sum(map(batch_size, calibration.batches)) / max(sum(map(batch_size, few)), 1)
    found: dict[Reader, Observed] = {}
    shared: dict[tuple[frozenset[Reader], bool], Moments] = {}
    left = memory_bytes
    for reader in _separate(rows):
        if reader.name in reading.otherwise or not rows[reader]:
            continue
        firsts = frozenset(reading.firsts[reader])
        alone = len(firsts) > 1 or next(iter(firsts)) not in rows
        key = (frozenset({reader}) if alone else firsts, rows[reader] == rows[next(iter(firsts))])
        if key not in shared:
            needed = reader.columns**2 * (8 if reader.columns <= PRECISE else 4)
            if needed > left:
                log.warning("%s is pruned by magnitude: what it reads takes too much memory", reader.name)
                continue
            left -= needed
            every = max(1.0, rows[reader] * scale / max(ENOUGH_ROWS, FEWEST * reader.columns))
            shared[key] = Moments(reader.columns, 0, every)
        found[reader] = Observed(
            reader,
            shared[key],
            reading.bias_of(reader),
            reader in reading.normalised,
            torch.zeros(reader.outputs, dtype=torch.float64),
        )
    return found


def _run(
    calibration: Calibration, names: Collection[str], found: Mapping[Reader, Observed], samples: int, seed: int
) -> None:
    """Fill moments and squares in one pass."""
    serving = {id(each.moments): reader for reader, each in reversed(list(found.items()))}

    def see(reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        own = found.get(reader)
        if own is not None and serving[id(own.moments)] == reader:
            for rows in parts():
                own.moments.add(rows.detach())

    def receive(reader: Reader, parts: Callable[[], Iterator[Tensor]]) -> None:
        own = found.get(reader)
        if own is not None:
            for rows in parts():
                own.squares += rows.detach().double().square().sum(0).to(own.squares.device)

    reading = Reading(calibration.model, calibration.structure, see, tied=True, names=names)
    model = private_copy(calibration.model)
    starts = detached(model, {id(calibration.model.get_parameter(reader.name)) for reader in found}) if samples else []
    generator = torch.Generator().manual_seed(seed)
    draws = 0
    with seeded(0):
        for batch, backward in divided(calibration, samples):
            with reading.batch(positions_of(batch), gradients=backward):
                outputs = calibration.forward(model, batch)
                if backward:
                    loss, drawn = sampled_loss(outputs, batch, generator)
                    reading.backward(loss, receive, at_outputs=True)
                    draws += drawn
            for start in starts:
                start.grad = None
    for each in found.values():
        each.draws = draws


def _separate(rows: Mapping[Reader, int]) -> list[Reader]:
    """Readers of the weights whose readers cover all rows, each once."""
    by_name: dict[str, list[Reader]] = defaultdict(list)
    for reader in rows:
        by_name[reader.name].append(reader)
    found = []
    for each in by_name.values():
        covered = sorted(place for reader in each for place in range(reader.start, reader.start + reader.outputs))
        if covered == list(range(len(covered))):
            found += each
    return found
