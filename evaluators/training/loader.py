"""Training batches that can be resumed where an earlier process stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
from torch.utils.data import DataLoader

from autoprune.data.batch import Batch, batch_size
from autoprune.data.sampling import generators_of, seeded
from autoprune.errors import DataError


class Rounds:
    """Goes over a source of batches round after round, without end.

    The random draws of the source are seeded again for each batch, so a batch depends on the seed and its position
    alone, as long as the source keeps no state of its own between rounds.

    Args:
        source: An iterable of batches that can be iterated again, see `autoprune.data.sampling.training_loader`.
        seed: Seed of the random draws of the source.
        position: Start: a `position` of an earlier process. The batches before it in its round are read again.
        least: Smaller batches are skipped.

    Attributes:
        position: The round, and how many of its batches were read.
    """

    def __init__(self, source: Iterable[Batch], seed: int, position: tuple[int, int] = (0, 0), least: int = 1) -> None:
        self._source, self._seed, self._least = source, seed, least
        self.position = position
        self._batches = self._read()

    def __next__(self) -> Batch:
        return next(self._batches)

    def _read(self) -> Iterator[Batch]:
        turn, skipped = self.position
        while True:
            with self._seeded(turn, 0):
                iterator = iter(self._source)
            read = 0
            given = skipped > 0
            while True:
                with self._seeded(turn, read + 1):
                    batch = next(iterator, None)
                if batch is None:
                    break
                read += 1
                if read > skipped and batch_size(batch) >= self._least:
                    self.position = (turn, read)
                    given = True
                    yield batch
            if not given:
                raise DataError(
                    f"training data must give batches of at least {self._least} samples whenever it is iterated, but "
                    f"round {turn} gave {read} batches, none of them large enough; give a DataLoader, a list of "
                    "batches or arrays, and no generator, which ends after one round"
                )
            turn = turn + 1
            skipped = 0

    def _seeded(self, turn: int, read: int) -> AbstractContextManager[None]:
        return seeded(mixed(self._seed, turn, read), *generators_of(self._source))


def mixed(*numbers: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def shuffled(batches: Sequence[Batch]) -> Iterable[Batch]:
    """Go over the same batches in a new random order in each round."""
    return DataLoader(list(batches), batch_size=None, shuffle=True, collate_fn=_same)  # type: ignore[arg-type]  # a list will do


def _same(batch: Batch) -> Batch:
    return batch
