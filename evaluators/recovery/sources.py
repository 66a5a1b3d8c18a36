"""Samples of a recovery: batches to train on, and those that are held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import DataLoader

from autoprune.data.batch import Batch, labelled
from autoprune.data.sampling import draw, generators_of, seeded, training_loader
from autoprune.data.subsets import Data, is_factory
from autoprune.errors import DataError


@dataclass(frozen=True)
class Sources:
    """Samples of a recovery.

    Attributes:
        training: Batches that can be iterated again.
        held_out: Batches to score on, by part: ``"validation"``, ``"test"``; those that were given.
    """

    training: Iterable[Batch]
    held_out: dict[str, list[Batch]] = field(default_factory=dict)


def sources_of(data: Any, batch_size: int, seed: int) -> Sources:
    """Take the samples apart.

    Args:
        data: A `Data`, or a source of training samples.
        batch_size: For arrays and datasets to train on.
        seed: Of the choice of held-out samples.

    Raises:
        DataError: If there is nothing to train on, or validation samples are trained on.
    """
    if data is None:
        raise DataError("recover needs data to train on, got None; pass data=, such as a DataLoader or (X, y)")
    if not isinstance(data, Data):
        return Sources(training_loader(_made(data), batch_size, "training"))
    if data.calibration is None:
        raise DataError("data must hold calibration samples, which recover trains on; give Data(calibration=...)")
    held_out = {}
    for part in ("validation", "test"):
        source = getattr(data, part)
        if source is data.calibration:
            raise DataError(
                f"{part} data must not be what is trained on, but it is the calibration source; give a part of its own"
            )
        if source is not None:
            drawn = draw(_made(source), {part: data.samples(part)}, data.batch_size, seed, part)
            held_out[part] = [_marked(batch, data.labels) for batch in drawn[part]]
    training = training_loader(_made(data.calibration), batch_size, "calibration")
    return Sources(training if data.labels is None else _Marked(training, data.labels), held_out)


def calibration_of(data: Any, batch_size: int, seed: int) -> list[Batch]:
    """Draw the samples to re-fit networks on from those to train on, once and for all.

    Args:
        data: As for `sources_of`, which has checked it.
        batch_size: For arrays and datasets of sources other than a `Data`.
        seed: Of the choice.
    """
    given = data if isinstance(data, Data) else Data(data, batch_size=batch_size)
    name = "calibration"
    drawn = draw(_made(given.calibration), {name: given.samples(name)}, given.batch_size, seed, name)
    return [_marked(batch, given.labels) for batch in drawn[name]]


def first_batch(source: Iterable[Batch], seed: int) -> Batch:
    """Read one batch; no random state moves.

    Raises:
        DataError: If there is none.
    """
    with seeded(seed, *generators_of(source)):
        for batch in source:
            return batch
    raise DataError("training data must hold at least one batch, got none")


def _made(source: Any) -> Any:
    return source() if is_factory(source) else source


def _marked(batch: Batch, key: str | None) -> Batch:
    return batch if key is None else labelled(batch, key)


class _Marked:
    """Source whose batches know the key of their target."""

    def __init__(self, source: Iterable[Batch], key: str) -> None:
        self._source, self._key = source, key
        if isinstance(source, DataLoader):  # seeded for every batch
            self.generator, self.sampler = source.generator, source.sampler

    def __iter__(self) -> Iterator[Batch]:
        return (labelled(batch, self._key) for batch in self._source)
