"""Data of a search: seeded subsets for calibration, validation and test, drawn once and kept in memory.

Shuffling and augmenting loaders never repeat, and two candidates must see the same samples; so the samples are drawn
once, before the search, and every evaluation uses them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from autoprune.arguments import shown, whole_number, why_no_function
from autoprune.data.arrangement import Arrangement
from autoprune.data.batch import Batch, batch_size, beginning, divisible, labelled, map_tensors, tensors, to_device
from autoprune.data.sampling import draw, drawn_at_random, even_chunks, seeded
from autoprune.errors import DataError

MOST_SAMPLES = 2**40

PARTS = ("calibration", "validation", "test")

SAMPLES = {"calibration": 512, "validation": 1024, "test": 1024}
"""Samples of each part by default."""

TOKENS = {"calibration": 16_384, "validation": 4_096, "test": 4_096}
"""Tokens of each part by default, for language models."""


@dataclass(frozen=True, eq=False)
class Data:
    """Sources of samples, and the numbers that a search uses.

    A source is a DataLoader, a Dataset, any iterable of batches, a tuple ``(X, y)`` or an array ``X`` (NumPy, pandas
    or torch; NumPy's float64 becomes torch's default dtype), None, or a function without arguments that returns one of
    these. If all given sources are such functions, Ray workers call them themselves, and no samples are sent.
    A missing part is taken from another source, without overlap: calibration and test from the validation source,
    validation from the calibration source. A source with fewer samples than its parts want is divided in proportion to
    the numbers wanted: with the defaults 1/5 calibration, 2/5 validation and 2/5 test, but at least 4 samples each.
    Batches that cannot be cut by samples, such as ``(nodes, edges, graph of each node, labels)``, are divided among the
    parts and used as they are; see `autoprune.data.batch.divisible`.

    Attributes:
        calibration: Samples that statistics and compensation are fitted on; training data as a rule.
        validation: Samples that candidates are compared on.
        test: Samples that only the finished front is scored on.
        calibration_samples: Most samples used for calibration; by default 512, or for language models, whose samples
            hold many tokens each, as many as have 16,384 tokens.
        validation_samples: The same for validation; by default 1,024, or 4,096 tokens.
        test_samples: The same for the test; by default 1,024, or 4,096 tokens.
        batch_size: Largest batch for arrays and datasets; a loader keeps its own. On a CPU, a search scores smaller
            ones where activations are large (docs/memory.md).
        labels: The key of the target in dict batches, where it is neither ``"labels"`` nor ``"label"``. All other
            entries are inputs of the model.
    """

    calibration: Any = None
    validation: Any = None
    test: Any = None
    calibration_samples: int | None = None
    validation_samples: int | None = None
    test_samples: int | None = None
    batch_size: int = 128
    labels: str | None = None

    def __post_init__(self) -> None:
        for name in (*(f"{part}_samples" for part in PARTS), "batch_size"):
            if name == "batch_size" or getattr(self, name) is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name), 1, MOST_SAMPLES))
        if not isinstance(self.labels, str | None):
            raise TypeError(f"labels must be the key of the target in dict batches, or None, got {shown(self.labels)}")

    def samples(self, part: str) -> int:
        """Most samples of a part."""
        given: int | None = getattr(self, f"{part}_samples")
        return SAMPLES[part] if given is None else given


@dataclass(frozen=True, eq=False)
class Subsets:
    """Samples that a search uses, drawn once.

    Attributes:
        calibration: Batches that statistics and compensation are fitted on.
        validation: Batches that candidates are compared on.
        test: Batches that only the finished front is scored on.
        notes: Decisions about the data, in plain words.
        fingerprint: SHA-256 of the contents, so that a resumed search can refuse other data.
        recipe: Arguments of `materialise`, if they draw the same samples on any machine; else None.
        taken: Samples of each part that `first` left of those drawn; empty if all are there.
        shuffled: Whether validation samples were drawn at random, and so come in a random order.
        synthetic: Whether random inputs replace data.
        arrangement: Arrangement that `arranged` gave them.
        looks: Numbers of validation batches after which a whole one of those drawn is complete; empty where all are.
    """

    calibration: tuple[Batch, ...]
    validation: tuple[Batch, ...]
    test: tuple[Batch, ...]
    notes: tuple[str, ...]
    fingerprint: str
    recipe: tuple[Data, int] | None = None
    taken: Mapping[str, int] = field(default_factory=dict)
    shuffled: bool = True
    synthetic: bool = False
    arrangement: Arrangement = field(default_factory=Arrangement)
    looks: tuple[int, ...] = ()

    @property
    def samples(self) -> dict[str, int]:
        """Number of samples of each part."""
        return {part: sum(map(batch_size, getattr(self, part))) for part in PARTS}

    def to(self, device: torch.device | str) -> Subsets:
        """Move the samples to `device`."""
        calibration, validation, test = (
            tuple(to_device(batch, device) for batch in getattr(self, part)) for part in PARTS
        )
        return replace(self, calibration=calibration, validation=validation, test=test)

    def first(self, samples: Mapping[str, int]) -> Subsets:
        """Keep the first samples of the parts that are named, as many as given for each."""
        if not samples:
            return self
        batches = {part: getattr(self, part) for part in PARTS}
        batches |= {part: tuple(beginning(batches[part], count)) for part, count in samples.items()}
        return replace(self, **batches, fingerprint=fingerprint(batches), taken=samples)

    def arranged(self, arrangement: Arrangement) -> Subsets:
        """Arrange the same samples in another way; calibration batches, whose statistics are taken, stay whole."""
        return replace(
            self,
            calibration=arrangement.of(self.calibration, cut=False),
            validation=arrangement.of(self.validation, cut=True),
            test=arrangement.of(self.test, cut=True),
            arrangement=arrangement,
            looks=tuple(accumulate(arrangement.counts(self.validation))),
        )

    def to_send(self) -> Subsets:
        """Reduce to the parts that another process needs for `received`: no samples, if it can draw them itself."""
        return self if self.recipe is None else replace(self, calibration=(), validation=(), test=())

    def received(self) -> Subsets:
        """Restore the samples from the result of `to_send`.

        Raises:
            DataError: If the functions that give the data gave others here.
        """
        if self.recipe is None:
            return self
        drawn = materialise(*self.recipe).first(self.taken)
        if drawn.fingerprint != self.fingerprint:
            raise DataError(
                "functions that give data must give the same in every process, but on a worker they gave others; fix "
                "what is random in them, and what files they read, or give the data itself"
            )
        return drawn if self.arrangement == Arrangement() else drawn.arranged(self.arrangement)


def materialise(data: Any, seed: int, device: torch.device | str = "cpu") -> Subsets:
    """Draw the samples that a search uses.

    The same seed gives the same samples in any process. Arrays, datasets and ordinary loaders over a dataset are
    sampled at random without replacement, so that data sorted by class does no harm; any other iterable is read once
    from its start, and no further than needed. Global random states, and those of loaders, are left as they were.

    Args:
        data: A `Data`, or a single source to be divided into calibration, validation and test.
        seed: Seed of the samples and of the randomness of the loader.
        device: Device of the batches.

    Raises:
        DataError: If a source is empty, too small to be divided, or of an unknown form.
    """
    data = data if isinstance(data, Data) else Data(validation=data)
    given = {part: source for part in PARTS if (source := getattr(data, part)) is not None}
    factories = {part: source for part, source in given.items() if is_factory(source)}
    recipe = (data, seed) if factories and factories.keys() == given.keys() else None
    for part, make in factories.items():
        if why := why_no_function(make, 0, classes=True):
            raise DataError(f"{part} data must be a source of samples, or a function without arguments, {why}")
    distinct = {id(make): make for make in factories.values()}  # one may be given for several parts
    with seeded(seed):
        made = {key: make() for key, make in distinct.items()}
    data = replace(data, **{part: made[id(make)] for part, make in factories.items()})
    homes = _homes(data)
    batches: dict[str, tuple[Batch, ...]] = {}
    notes: list[str] = []
    for home in dict.fromkeys(homes.values()):
        wanted = {part: data.samples(part) for part in PARTS if homes[part] == home}
        drawn = draw(getattr(data, home), wanted, data.batch_size, seed, home)
        # Clones, so that a model that works in place never reaches the user's tensors.
        marked = partial(labelled, key=data.labels) if data.labels is not None else _as_it_is
        batches |= {part: tuple(marked(map_tensors(_clone, batch)) for batch in drawn[part]) for part in wanted}
        notes += _notes(data, home, {part: sum(map(batch_size, drawn[part])) for part in wanted})
    return Subsets(
        batches["calibration"],
        batches["validation"],
        batches["test"],
        notes=tuple(notes),
        fingerprint=fingerprint(batches),
        recipe=recipe,
        shuffled=drawn_at_random(getattr(data, homes["validation"])),
    ).to(device)


def synthetic(example_inputs: Any, samples: int, seed: int, batch_size: int = 128) -> Subsets:
    """Make seeded random inputs that look like an example, for a search without data.

    Floats are normal with the mean and spread of the example (standard normal where it is constant), integers uniform
    from its least to its largest value, booleans fair coins. So the ids of padding and of the ends of sequences, which
    change what a language model computes, are not drawn where the example has none. Constant integers and booleans,
    such as an attention mask of ones, stay as they are. In inputs that cannot be cut by samples, such as graphs, only
    floats are random.

    Args:
        example_inputs: A tensor, a tuple of positional inputs or a mapping of keyword inputs, batch dimension first.
        samples: Number of samples in each of calibration, validation and test.
        seed: Seed of the values.
        batch_size: Largest batch.
    """
    if isinstance(example_inputs, list | tuple) and len(example_inputs) > 1:
        example_inputs = (*example_inputs, None)  # the last entry of a batch is its target: here there is none
    generator = torch.Generator().manual_seed(seed)
    cut = divisible(example_inputs)
    own = next((len(tensor) for tensor in tensors(example_inputs) if tensor.ndim), 1)
    chunks = even_chunks(np.arange(samples), batch_size if cut else own)
    sizes = [len(chunk) if cut else None for chunk in chunks]
    batches = {
        part: tuple(map_tensors(partial(_random_like, size, generator), example_inputs) for size in sizes)
        for part in PARTS
    }
    note = (
        f"no data given: {samples} random inputs with the shape and spread of the example stand in for each of "
        f"calibration, validation and test (seed {seed}); scores say how close a candidate stays to the dense model on "
        "such inputs, not how well it does its task: measure that before you use one, or give data"
    )
    return Subsets(
        batches["calibration"], batches["validation"], batches["test"], (note,), fingerprint(batches), synthetic=True
    )


def is_factory(source: Any) -> bool:
    """Return whether a source is a function that makes one, or a class; a dataset or loader may be callable too."""
    return callable(source) and (isinstance(source, type) or not isinstance(source, Iterable | Dataset))


def _homes(data: Data) -> dict[str, str]:
    """Find the part whose source each part is drawn from; the same for parts that share a source."""
    sources = {part: getattr(data, part) for part in PARTS if getattr(data, part) is not None}
    if not sources:
        raise DataError(
            "data must hold a source for at least one of calibration, validation and test, got none; "
            "to search without data, leave data out and give example="
        )
    first = {part: next(p for p in sources if sources[p] is source) for part, source in sources.items()}
    fallback = next(first[part] for part in ("validation", "calibration", "test") if part in first)
    return {part: first.get(part, fallback) for part in PARTS}


def _notes(data: Data, home: str, counts: Mapping[str, int]) -> list[str]:
    total = sum(counts.values())
    notes = []
    for part, count in counts.items():
        if part == home:
            continue
        why = f"no {part} data given" if getattr(data, part) is None else f"{part} and {home} data are one source"
        purpose = " before the search, to score only the finished front" if part == "test" else f" for {part}"
        notes.append(f"{why}: {count} of {total} {home} samples were set aside{purpose}")
    return notes


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _random_like(samples: int | None, generator: torch.Generator, example: Tensor) -> Tensor:
    """Draw values for `samples` samples; None keeps the number of rows, and whole numbers as they are."""
    if example.ndim == 0 or (samples is None and not example.is_floating_point()):
        return example
    shape = (len(example) if samples is None else samples, *example.shape[1:])
    example = example.detach().cpu()
    constant = bool((example == example.flatten()[0]).all())
    if example.is_floating_point():
        values = torch.randn(shape, generator=generator)
        return (values if constant else values * example.float().std() + example.float().mean()).to(example.dtype)
    if constant:
        return example.flatten()[0].expand(shape).clone()
    return torch.randint(int(example.min()), int(example.max()) + 1, shape, generator=generator).to(example.dtype)


def fingerprint(tree: Any) -> str:
    """Compute the SHA-256 of tensors, keys and plain values in nested containers; the same in any process."""
    digest = hashlib.sha256()

    def add(tree: Any) -> None:
        if isinstance(tree, Tensor):
            digest.update(f"{tree.dtype}{tuple(tree.shape)}".encode())
            digest.update(tree.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(tree, Mapping):
            for key, value in tree.items():
                digest.update(repr(key).encode())
                add(value)
        elif isinstance(tree, list | tuple):
            digest.update(f"[{len(tree)}]".encode())
            for value in tree:
                add(value)
        else:
            # The repr of other objects may hold an address, which differs between processes.
            plain = isinstance(tree, str | int | float | np.generic | None)
            digest.update((repr(tree) if plain else type(tree).__name__).encode())

    add(tree)
    return digest.hexdigest()
