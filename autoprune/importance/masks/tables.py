"""Database of zeros: errors of every option of every weight, and the weights themselves where they are stored."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
_PRICES = ("errors", "losses")

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
    """Prices and weights of all options.

    Attributes:
        solver: Gives what makes the weights that are not stored; observes the model if that was not needed before.
        tables: Prices by weight.
        folder: Where weights are stored; None keeps them in memory.
        held: Weights in memory, by name and choice.
    """

    solver: Callable[[], Solver]
    tables: dict[str, Table]
    folder: Path | None = None
    held: dict[tuple[str, Choice], Tensor] = field(default_factory=dict, repr=False)

    def weight(self, name: str, choice: Choice) -> Tensor:
        """The weight of an option: from memory, from its file, which is mapped into memory, or made again."""
        if (name, choice) in self.held:
            return self.held[name, choice]
        if self.folder is not None and name in self.tables and choice in self.tables[name].choices:
            from safetensors import safe_open

            with safe_open(_file_of(self.folder, name), framework="pt") as opened:
                stored: Tensor = opened.get_tensor(_key(choice))
                return stored
        return self.solver().solve(name, Pattern.parse(choice[0]), choice[1])


def build_tables(
    solver: Callable[[], Solver],
    choices: Mapping[str, Sequence[Choice]],
    sizes: Mapping[str, int],
    folder: str | Path | None = None,
    identity: str = "",
    store_bytes: int = STORE_BYTES,
) -> ZeroDatabase:
    """Make every option of every weight, and measure its error.

    One factorisation of a layer serves all of its options. Weights are written one after the other: where a build was
    interrupted, another goes on.

    Args:
        solver: Gives what makes the weights; those that it cannot make have no prices. Not called where a folder holds
            everything already.
        choices: Options of each weight but the dense one.
        sizes: Bytes of each weight.
        folder: Folder for the weights, one file each; None keeps them in memory as far as `store_bytes` allows, and
            others are made again when they are needed.
        identity: Hash of what the weights are made of; files of another one are replaced.
        store_bytes: Most bytes of stored weights.

    Raises:
        ValueError: If a folder would take more than `store_bytes`.
        OSError: If a file cannot be written.
    """
    if folder is not None and (tables := _complete(folder, choices, identity)) is not None:
        return ZeroDatabase(solver, tables, Path(folder))
    maker = solver()
    names = [name for name in choices if name in maker]
    needed = sum(sizes[name] * len(choices[name]) for name in names)
    if folder is not None and needed > store_bytes:
        raise ValueError(
            f"store_bytes must be at least {needed}, the size of {sum(map(len, choices.values()))} options, got "
            f"{store_bytes}; give more, fewer levels, or no folder"
        )
    found = ZeroDatabase(solver, {}, None if folder is None else make_folder(folder, "folder"))
    left = store_bytes
    for name in names:
        own = tuple(choices[name])
        if found.folder is not None and (known := _read(found.folder, name, own, identity)) is not None:
            found.tables[name] = known
            continue
        weights, prices = [], []
        for pattern, zeros in own:
            weights.append(maker.solve(name, Pattern.parse(pattern), zeros))
            prices.append(maker.errors(name, weights[-1]))
        table = Table(own, *np.array(prices, dtype=np.float64).reshape(-1, 2).T.copy())
        found.tables[name] = table
        if found.folder is not None:
            _write(found.folder, name, table, weights, identity)
        elif sum(each.nbytes for each in weights) <= left:
            left -= sum(each.nbytes for each in weights)
            found.held |= {(name, choice): weight for choice, weight in zip(own, weights, strict=True)}
    if found.folder is not None:
        write_json(found.folder / INDEX, {**FORMAT.stamp(), "identity": identity, "weights": names}, "folder")
    return found


def _complete(folder: str | Path, choices: Mapping[str, Sequence[Choice]], identity: str) -> dict[str, Table] | None:
    """The prices of a folder whose build was completed; None if there is none of these options."""
    index = Path(folder) / INDEX
    if not index.exists():
        return None
    data = FORMAT.read_json(index, "folder must hold a database of zeros", _WAY_OUT, 256 * MIB, _FORM)
    if data["identity"] != identity or not set(data["weights"]) <= set(choices):
        return None
    tables = {name: _read(Path(folder), name, tuple(choices[name]), identity) for name in data["weights"]}
    found = {name: table for name, table in tables.items() if table is not None}
    return found if len(found) == len(tables) else None


def _write(folder: Path, name: str, table: Table, weights: Sequence[Tensor], identity: str) -> None:
    prices = {key: torch.from_numpy(getattr(table, key)) for key in _PRICES}
    text = json.dumps({"identity": identity, "choices": table.choices})
    metadata = {**FORMAT.header(), "content": text, HASH: content_hash(prices, text)}
    stored = {_key(choice): weight for choice, weight in zip(table.choices, weights, strict=True)}
    write_tensors(_file_of(folder, name), {**prices, **stored}, metadata, "folder")


def _read(folder: Path, name: str, choices: tuple[Choice, ...], identity: str) -> Table | None:
    """The prices in a file; None if it is not there, or of other weights, data or settings.

    Raises:
        FileFormatError: If it is damaged or foreign.
    """
    path = _file_of(folder, name)
    if not path.exists():
        return None
    expected = "folder must hold a database of zeros"
    with FORMAT.reading(path, _WAY_OUT):
        metadata = read_metadata(path, expected)
        FORMAT.require(metadata)
        text = metadata["content"]
        if text != json.dumps({"identity": identity, "choices": choices}):
            log.warning("%s is of other weights, data or settings, and is replaced", path)
            return None
        prices = _prices(path)
        if metadata.get(HASH) != content_hash(prices, text):
            raise ValueError("its content is not that of its hash")
    return Table(choices, prices["errors"].numpy(), prices["losses"].numpy())


def _prices(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in _PRICES}


def _file_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '_')}.safetensors"


def _key(choice: Choice) -> str:
    return f"{choice[0]} {choice[1]}"
