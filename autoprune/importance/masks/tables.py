"""Database of zeros: errors of every option of every weight, and the weights themselves where these are stored, too."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from autoprune.files.access import MIB, make_folder, write_json
from autoprune.files.formats import Format
from autoprune.files.tensor_file import HASH, content_hash, read_metadata, write_tensors
from autoprune.importance.masks.solver import Solver
from autoprune.protocols import FloatArray
from autoprune.structure.slicing.zeros import Pattern

log = logging.getLogger(__name__)

FORMAT = Format("autoprune-zeros", 1, "a database of zeros")
STORE_BYTES = 2**32
"""Most bytes of weights that are stored, in files or in memory."""
INDEX = "zeros.json"
"""File that a complete folder has, with the names of the weights that have prices."""
_FORM = {"identity": str, "weights": [str]}
_WAY_OUT = "delete it, and it is made again"
_EXPECTED = "folder must hold a database of zeros"
_PRICES = ("errors", "losses")

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

Store = Literal["tables", "weights"]
STORES = get_args(Store)

Choice = tuple[str, int]
"""Pattern and number of zeros of an option."""


@dataclass(frozen=True, eq=False)
class Table:
    """Prices of the options of one weight.

    Attributes:
        choices: Pattern and number of zeros of each option but the dense one.
        errors: Error of its outputs relative to their energy, float64, shape (options,).
        losses: Rise of the loss of the model, as the curvature at the outputs tells; NaN where that is unknown.
    """

    choices: tuple[Choice, ...]
    errors: FloatArray
    losses: FloatArray


@dataclass(eq=False)
class ZeroDatabase:
    """Prices of all options, and what gives their weights.

    A choice, the pattern with the number of zeros, is the rank of the threshold of a mask: together with the moments
    of the inputs it determines mask and weight, and no mask needs to be stored.

    Attributes:
        solver: Gives what makes the weights that are not stored; observes the model if that was not needed before.
        tables: Prices by weight.
        store_bytes: Most bytes of weights that are kept in memory once they are made.
        stored: File of each weight whose options are stored; it is mapped into memory as they are needed.
        held: Weights in memory, by name and choice.
    """

    solver: Callable[[], Solver]
    tables: dict[str, Table]
    store_bytes: int = STORE_BYTES
    stored: dict[str, Path] = field(default_factory=dict)
    held: dict[tuple[str, Choice], Tensor] = field(default_factory=dict, repr=False)
    _held_bytes: int = field(default=0, repr=False)

    def weight(self, name: str, choice: Choice) -> Tensor:
        """The weight of an option: from memory, from its file, or made now."""
        if (name, choice) in self.held:
            return self.held[name, choice]
        if name in self.stored and choice in self.tables[name].choices:
            from safetensors import safe_open

            with safe_open(self.stored[name], framework="pt") as opened:
                stored: Tensor = opened.get_tensor(_key(choice))
                return stored
        made = self.solver().solve(name, Pattern.parse(choice[0]), choice[1])
        self.hold(name, choice, made)
        return made

    def hold(self, name: str, choice: Choice, weight: Tensor) -> None:
        """Keep a weight in memory if there is room."""
        if self._held_bytes + weight.nbytes <= self.store_bytes:
            self._held_bytes += weight.nbytes
            self.held[name, choice] = weight


def build_tables(
    solver: Callable[[], Solver],
    choices: Mapping[str, Sequence[Choice]],
    sizes: Mapping[str, int],
    folder: str | Path | None = None,
    identity: str = "",
    store: Store = "tables",
    store_bytes: int = STORE_BYTES,
) -> ZeroDatabase:
    """Make every option of every weight, and measure its error.

    One factorisation of a layer serves all of its options. Files are written one after the other: where a build was
    interrupted, another goes on.

    Args:
        solver: Gives what makes the weights; those that it cannot make have no prices. Not called where a folder holds
            everything already.
        choices: Options of each weight but the dense one.
        sizes: Bytes of each weight.
        folder: Folder for the prices, one file for each weight; None keeps them in memory.
        identity: Hash of what the weights are made of; files of another one are replaced.
        store: ``"weights"`` puts the weights of all options into these files, too.
        store_bytes: Most bytes of weights in files; without them, in memory.

    Raises:
        ValueError: If the weights would take more than `store_bytes` in files.
        OSError: If a file cannot be written.
    """
    kept = _Files(None if folder is None else Path(folder), identity, store == "weights", sizes)
    found = ZeroDatabase(solver, {}, store_bytes)
    if kept.complete(choices, found):
        return found
    maker = solver()
    names = [name for name in choices if name in maker]
    needed = sum(sizes[name] * len(choices[name]) for name in names)
    if kept.weights and needed > store_bytes:
        raise ValueError(
            f"store_bytes must be at least {needed}, the size of {sum(map(len, choices.values()))} options, got "
            f"{store_bytes}; give more, fewer levels, or store='tables'"
        )
    if folder is not None:
        make_folder(folder, "folder")
    for name in names:
        own = tuple(choices[name])
        if kept.read(name, own, found):
            continue
        weights = [maker.solve(name, Pattern.parse(pattern), zeros) for pattern, zeros in own]
        prices = [maker.errors(name, weight) for weight in weights]
        found.tables[name] = Table(own, *np.array(prices, dtype=np.float64).reshape(-1, 2).T.copy())
        kept.write(name, found, weights)
        if name not in found.stored:
            for choice, weight in zip(own, weights, strict=True):
                found.hold(name, choice, weight)
    kept.finish(names)
    return found


@dataclass(frozen=True)
class _Files:
    """Files of a database: one of each weight, and an index once all are there.

    Attributes:
        folder: Where they are; None for none.
        identity: Of what the weights are made of.
        weights: Whether they are stored, too.
        sizes: Bytes of each weight.
    """

    folder: Path | None
    identity: str
    weights: bool
    sizes: Mapping[str, int]

    def complete(self, choices: Mapping[str, Sequence[Choice]], found: ZeroDatabase) -> bool:
        """Read everything if the build of these options was completed."""
        index = None if self.folder is None else self.folder / INDEX
        if index is None or not index.exists():
            return False
        data = FORMAT.read_json(index, _EXPECTED, _WAY_OUT, 256 * MIB, _FORM)
        if data["identity"] != self.identity or not set(data["weights"]) <= set(choices):
            return False
        return all(self.read(name, tuple(choices[name]), found) for name in data["weights"])

    def read(self, name: str, choices: tuple[Choice, ...], found: ZeroDatabase) -> bool:
        """Read the prices of a weight, and note its file if that holds its options.

        Returns:
            False if there is no file, or one of other weights, data or settings, or without weights that are wanted.

        Raises:
            FileFormatError: If it is damaged or foreign.
        """
        path = None if self.folder is None else _file_of(self.folder, name)
        if path is None or not path.exists():
            return False
        with FORMAT.reading(path, _WAY_OUT):
            metadata = read_metadata(path, _EXPECTED)
            FORMAT.require(metadata)
            text = metadata["content"]
            if text != self._content(choices):
                log.warning("%s is of other weights, data or settings, and is replaced", path)
                return False
            prices, whole = _prices(path, choices, self.sizes[name])
            if metadata.get(HASH) != content_hash(prices, text):
                raise ValueError("its content is not that of its hash")
        if whole:
            found.stored[name] = path
        elif self.weights:
            return False
        found.tables[name] = Table(choices, prices["errors"].numpy(), prices["losses"].numpy())
        return True

    def write(self, name: str, found: ZeroDatabase, weights: Sequence[Tensor]) -> None:
        """Write the prices of a weight, and its options if they are wanted."""
        if self.folder is None:
            return
        table = found.tables[name]
        prices = {key: torch.from_numpy(getattr(table, key)) for key in _PRICES}
        text = self._content(table.choices)
        metadata = {**FORMAT.header(), "content": text, HASH: content_hash(prices, text)}
        pairs = zip(table.choices, weights, strict=True)
        options = {_key(choice): weight for choice, weight in pairs} if self.weights else {}
        path = _file_of(self.folder, name)
        write_tensors(path, {**prices, **options}, metadata, "folder")
        if options:
            found.stored[name] = path

    def finish(self, names: Sequence[str]) -> None:
        """Write the index."""
        if self.folder is not None:
            content = {**FORMAT.stamp(), "identity": self.identity, "weights": list(names)}
            write_json(self.folder / INDEX, content, "folder")

    def _content(self, choices: tuple[Choice, ...]) -> str:
        return json.dumps({"identity": self.identity, "choices": choices})


def _prices(path: Path, choices: tuple[Choice, ...], size: int) -> tuple[dict[str, Tensor], bool]:
    """The prices in a file, and whether it holds the weights of all options; sizes are checked before any is read.

    Raises:
        ValueError: If there is anything else in it.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        names = set(opened.keys())
        options = set(map(_key, choices))
        if names not in (set(_PRICES), set(_PRICES) | options):
            raise ValueError("it holds other tensors than the prices of its options, with all of their weights or none")
        for name in names:
            stored = opened.get_slice(name)
            found = math.prod(stored.get_shape()) * _ITEM_BYTES.get(stored.get_dtype(), 0)
            expected = 8 * len(choices) if name in _PRICES else size
            if found != expected:
                raise ValueError(f"{name!r} must have {expected} bytes, and has {found}")
        return {key: opened.get_tensor(key) for key in _PRICES}, bool(names & options)


def _file_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '_')}.safetensors"


def _key(choice: Choice) -> str:
    return f"{choice[0]} {choice[1]}"
