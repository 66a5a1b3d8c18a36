"""Reading of samples from arrays, datasets, loaders and any iterable of batches, the same for the same seed."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from autoprune.data.batch import Batch, batch_size, divisible, slice_batch
from autoprune.errors import DataError
from autoprune.protocols import IntArray

SMALLEST_PART = 4
MOST_EMPTY = 1000
"""Number of empty batches in a row after which a stream counts as endless."""

_process_state = threading.RLock()


def _renew_lock() -> None:
    """Replace the lock in a child process of a loader, where the thread that held it does not exist."""
    global _process_state
    _process_state = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)

Load = Callable[[Sequence[IntArray]], list[Batch]]


@contextlib.contextmanager
def process_state() -> Iterator[None]:
    """Reserve the state that threads share, such as random states and hooks of modules, for this thread."""
    with _process_state:
        yield


@contextlib.contextmanager
def seeded(seed: int, *generators: torch.Generator | None) -> Iterator[None]:
    """Seed the random states of Python, NumPy, torch and `generators` inside, and restore them afterwards.

    They belong to the process, so only one thread at a time is inside: two searches in two threads draw the same
    numbers as each does alone. Draws of the user's own threads may interfere, and should use separate generators.
    """
    with process_state(), _seeded(seed, generators):
        yield


@contextlib.contextmanager
def _seeded(seed: int, generators: Sequence[torch.Generator | None]) -> Iterator[None]:
    own = [generator for generator in generators if generator is not None]
    saved = [generator.get_state() for generator in own]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002  datasets draw from it
    # Touching the CUDA generators would initialise CUDA, which forked loader workers do not survive.
    devices = list(range(torch.cuda.device_count())) if cuda_is_used() else []
    try:
        with torch.random.fork_rng(devices):
            for generator in (torch.default_generator, *own):
                generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed_all(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for generator, state in zip(own, saved, strict=True):
            generator.set_state(state)


def cuda_is_used() -> bool:
    """Return whether this process has initialised CUDA."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch does not annotate it


def draw(source: Any, wanted: Mapping[str, int], size: int, seed: int, name: str) -> dict[str, list[Batch]]:
    """Draw disjoint parts from one source.

    Args:
        source: Arrays, a Dataset, a DataLoader or an iterable of batches.
        wanted: Samples wanted of each part; `allocate` divides a smaller source.
        size: Batch size for arrays and datasets.
        seed: Seed of the choice of samples and of the source's own randomness.
        name: Name of the source in messages.

    Raises:
        DataError: If the source is empty, too small to be divided, or of an unknown form.
    """
    if isinstance(source, Dataset) or hasattr(source, "__getitems__"):  # the second for Hugging Face datasets
        source = DataLoader(source, batch_size=size)
    indexed = _indexed(source, size, seed, name)
    if indexed is None:
        return _draw_first(source, wanted, seed, name)
    indices, size, load = indexed
    total = min(sum(wanted.values()), len(indices))
    counts = allocate(total, wanted, name)
    rows = np.random.default_rng(seed).choice(indices, total, replace=False)
    chunks = {
        part: even_chunks(part_rows, size)
        for part, part_rows in zip(counts, np.split(rows, np.cumsum([*counts.values()])[:-1]), strict=True)
    }
    batches = iter(load([chunk for part in chunks.values() for chunk in part]))
    return {part: list(islice(batches, len(part_chunks))) for part, part_chunks in chunks.items()}


def drawn_at_random(source: Any) -> bool:
    """Return whether `draw` takes samples of a source at random; of a stream it takes the first."""
    if isinstance(source, Dataset) or hasattr(source, "__getitems__"):
        return not isinstance(source, IterableDataset)
    return _is_table(source) or _has_random_access(source)


def allocate(samples: int, wanted: Mapping[str, int], name: str) -> dict[str, int]:
    """Divide samples among parts in proportion to the numbers wanted, each at least 4 or its smaller wanted number.

    Raises:
        DataError: If there are too few samples for that.
    """
    goal = np.array([*wanted.values()])
    least = np.minimum(goal, SMALLEST_PART if len(wanted) > 1 else 1)
    if samples < least.sum():
        what = "is empty" if samples == 0 else f"has {samples} samples"
        raise DataError(
            f"{name} data must hold at least {least.sum()} samples to serve as {', '.join(wanted)}, but it {what}; "
            "give more samples, or a source for each part with autoprune.Data(calibration=, validation=, test=)"
        )
    samples = min(samples, goal.sum())
    counts = _shares(samples, goal)
    if (counts < least).any():
        counts = least + _shares(samples - least.sum(), goal - least)
    return dict(zip(wanted, counts.tolist(), strict=True))


def even_chunks(rows: IntArray, size: int) -> list[IntArray]:
    """Split rows into as few chunks of at most `size` as possible, whose lengths differ by at most one."""
    return np.array_split(rows, -(-len(rows) // size))


def _shares(samples: int, weights: IntArray) -> IntArray:
    """Divide `samples` into whole shares in proportion to `weights`, each rounded down or up."""
    edges = samples * np.cumsum(weights) // weights.sum()
    shares: IntArray = np.diff(edges, prepend=0)
    return shares


def _indexed(source: Any, size: int, seed: int, name: str) -> tuple[IntArray, int, Load] | None:
    """Sample numbers, batch size and loading function of a source with random access; None for a stream."""
    if _is_table(source):
        return np.arange(_length(source, name)), size, lambda chunks: [_rows(source, chunk) for chunk in chunks]
    if not _has_random_access(source):
        return None
    return _sampled(source, seed), source.batch_size, lambda chunks: _load(source, chunks, seed)


def _is_array(source: Any) -> bool:
    return hasattr(source, "__array__")  # NumPy, torch, pandas


def _is_table(source: Any) -> bool:
    return _is_array(source) or (isinstance(source, tuple) and all(map(_is_array, source)))


def _length(arrays: Any, name: str) -> int:
    lengths = [len(array) if np.ndim(array) else 0 for array in (arrays if isinstance(arrays, tuple) else (arrays,))]
    if len(set(lengths)) > 1:
        raise DataError(
            f"X and y of the {name} data must have the same length, got {' and '.join(map(str, lengths))}; "
            "give one label for each sample"
        )
    return lengths[0] if lengths else 0


def _rows(arrays: Any, rows: IntArray) -> Batch:
    if isinstance(arrays, tuple):
        return tuple(_rows(array, rows) for array in arrays)
    if isinstance(arrays, Tensor):
        return arrays[torch.from_numpy(rows).to(arrays.device)]
    array = np.asarray(arrays)[rows]
    try:
        tensor = torch.from_numpy(array)
    except TypeError as error:
        raise DataError(f"arrays must be numeric, got dtype {array.dtype}; convert them to numbers first") from error
    return tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.float64 else tensor


def _has_random_access(loader: Any) -> bool:
    """Return whether samples can be taken by number without changing the loader's behaviour."""
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.sampler).__module__.startswith("torch.")  # other samplers may never end
    )


def generators_of(loader: Any) -> list[torch.Generator | None]:
    """Generators that belong to a loader and that it draws from."""
    return [getattr(owner, "generator", None) for owner in (loader, getattr(loader, "sampler", None))]


def _sampled(loader: DataLoader[Any], seed: int) -> IntArray:
    """Numbers of the samples that a loader draws from, each once."""
    if isinstance(loader.sampler, SequentialSampler | RandomSampler):
        return np.arange(len(loader.sampler.data_source))
    with seeded(seed, *generators_of(loader)):
        return np.unique(np.fromiter(loader.sampler, np.int64))


def _load(loader: DataLoader[Any], chunks: Sequence[IntArray], seed: int) -> list[Batch]:
    """Load chosen samples with the dataset, workers and collation of a loader."""
    chosen = DataLoader(
        loader.dataset,
        batch_sampler=[chunk.tolist() for chunk in chunks],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )
    with seeded(seed, *generators_of(loader)):
        batches = list(chosen)
    for batch in batches:
        batch_size(batch)  # raises for a form that is not a batch
    return batches


def _draw_first(source: Any, wanted: Mapping[str, int], seed: int, name: str) -> dict[str, list[Batch]]:
    """Divide the first samples of a stream, reading no further than needed."""
    if isinstance(source, str | bytes | Mapping) or not isinstance(source, Iterable):
        raise DataError(
            f"{name} data must be a DataLoader, a Dataset, an iterable of batches, or arrays (X, y), "
            f"got {type(source).__name__}"
        )
    batches = []
    read = 0
    total = sum(wanted.values())
    empty = 0
    with seeded(seed, *generators_of(source)):
        for batch in source:
            batches.append(batch)
            read += batch_size(batch)
            empty = 0 if batch_size(batch) else empty + 1
            if empty > MOST_EMPTY:
                raise DataError(
                    f"{name} data must hold samples, but gave {empty} batches without any in a row, after {read} "
                    f"samples of {total} wanted; let it end, or leave empty batches out"
                )
            if read >= total:
                break
    if not all(map(divisible, batches)):
        return _dealt(batches, wanted, name)
    parts = {}
    start = 0
    for part, count in allocate(read, wanted, name).items():
        parts[part] = _cut(batches, start, start + count)
        start += count
    return parts


def _dealt(batches: Sequence[Batch], wanted: Mapping[str, int], name: str) -> dict[str, list[Batch]]:
    """Divide consecutive batches that cannot be cut, with at least one for each part."""
    if len(batches) < len(wanted):
        raise DataError(
            f"{name} data must hold at least {len(wanted)} batches to serve as {', '.join(wanted)}, because such "
            f"batches cannot be cut, but it has {len(batches)}; give more, or a source for each part with "
            "autoprune.Data(calibration=, validation=, test=)"
        )
    goal = np.array([*wanted.values()])
    counts = _shares(len(batches), goal)
    if not counts.all():
        counts = 1 + _shares(len(batches) - len(wanted), goal)
    left = iter(batches)
    return {part: list(islice(left, count)) for part, count in zip(wanted, counts.tolist(), strict=True)}


def _cut(batches: Sequence[Batch], start: int, stop: int) -> list[Batch]:
    """Take samples `start` to `stop` of consecutive batches."""
    cut = []
    offset = 0
    for batch in batches:
        size = batch_size(batch)
        first = max(start - offset, 0)
        last = min(stop - offset, size)
        if first < last:
            cut.append(slice_batch(batch, first, last))
        offset += size
    return cut


def training_loader(source: Any, size: int, name: str) -> Iterable[Batch]:
    """Make an iterable of batches to train on; each iteration may have another order or augmentation.

    Args:
        source: Arrays or a Dataset, which are shuffled; a loader or any other iterable of batches is taken as it is.
        size: Batch size for arrays and datasets; the samples that do not fill a last batch are left out of a round.
        name: Name of the source in messages.

    Raises:
        DataError: If it is none of these.
    """
    if _is_array(source) or (isinstance(source, tuple) and source and all(map(_is_array, source))):
        rows = range(_length(source, name))
        return DataLoader(
            rows,  # type: ignore[arg-type]  # all that a loader asks of a dataset is length and indices
            batch_size=size,
            shuffle=True,
            drop_last=len(rows) > size,
            collate_fn=lambda chunk: _rows(source, np.array(chunk)),
        )
    if isinstance(source, IterableDataset):
        return DataLoader(source, batch_size=size)
    if isinstance(source, Dataset) or hasattr(source, "__getitems__"):
        return DataLoader(source, batch_size=size, shuffle=True, drop_last=len(source) > size)
    if isinstance(source, str | bytes | Mapping) or not isinstance(source, Iterable):
        raise DataError(
            f"{name} data must be a DataLoader, a Dataset, an iterable of batches, or arrays (X, y), "
            f"got {type(source).__name__}"
        )
    return source
