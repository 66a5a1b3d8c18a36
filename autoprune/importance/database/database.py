"""Database of layers: orders of units and tables of losses, in a file of some kilobytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import FileFormatError
from autoprune.files.access import MIB, parse_json
from autoprune.files.formats import Format
from autoprune.files.schema import require_form
from autoprune.files.tensor_file import HASH, content_hash, read_tensors, require_whole, write_tensors
from autoprune.protocols import FloatArray, IntArray

FORMAT = Format("autoprune-database", 1, "a layer database")
MOST_BYTES = 256 * MIB
"""Largest size of a file: 20 million units."""
_WAY_OUT = "delete it, and it is built again"
_FORM = {"identity": str, "weighted": bool, "unpriced": {str: str}}


@dataclass(frozen=True, eq=False)
class Table:
    """Prices of one group.

    Attributes:
        removal: Units in the order of removal; the last one stays longest. Int64, shape (units,).
        errors: Error of the layers that read them with the first 0, 1, ... and all of them removed, tr(G E H E^T) from
            moments of inputs and of gradients, float64, shape (units + 1,); the first is 0.
        losses: Estimate of the loss of the whole model for the same, see `losses_of`.
    """

    removal: IntArray
    errors: FloatArray
    losses: FloatArray

    @property
    def order(self) -> tuple[int, ...]:
        """Units by falling importance."""
        return tuple(self.removal[::-1].tolist())

    @property
    def ranks(self) -> Tensor:
        """Place of each unit in the order of removal, float, shape (units,); higher is kept longer."""
        return torch.from_numpy(np.argsort(self.removal)).float()

    def loss(self, kept: int) -> float:
        """Loss with this number of units kept; with none, that of a branch that the group is all of."""
        return float(self.losses[len(self.removal) - kept])


@dataclass(frozen=True, eq=False)
class Database:
    """Orders and losses of all groups.

    Losses of different groups are in one unit, and an estimate of the loss of a network is their sum.

    Attributes:
        tables: Prices by group.
        unpriced: Groups without a price, each with the reason.
        weighted: Whether losses are changes of the outputs of the whole model, in nats where these are logits, else
            squared differences relative to their mean square. False for a model without gradients, whose losses are
            errors of layers relative to their energy.
        identity: Hash of the weights, the data and the settings that it is made of.
    """

    tables: Mapping[str, Table]
    unpriced: Mapping[str, str] = field(default_factory=dict)
    weighted: bool = True
    identity: str = ""

    @property
    def order(self) -> dict[str, tuple[int, ...]]:
        """Units of every priced group by falling importance."""
        return {name: table.order for name, table in self.tables.items()}

    @property
    def note(self) -> str:
        """One line for people: what it covers, and what not."""
        units = sum(len(table.removal) for table in self.tables.values())
        text = f"layer database of {len(self.tables)} groups with {units} units"
        if not self.weighted:
            text += ", in errors of layers: the model has no gradients"
        if self.unpriced:
            few = ", ".join(f"{name} ({why})" for name, why in [*self.unpriced.items()][:3])
            text += f"; without a price: {few}{', ...' if len(self.unpriced) > 3 else ''}"
        return text

    def save(self, path: str | Path) -> None:
        """Write the file, in place of one that is there.

        Raises:
            OSError: If it cannot be written.
        """
        tensors = {}
        for name, table in self.tables.items():
            tensors[f"{name}/removal"] = torch.from_numpy(table.removal.astype(np.int32))
            tensors[f"{name}/errors"] = torch.from_numpy(table.errors)
            tensors[f"{name}/losses"] = torch.from_numpy(table.losses)
        content = {"identity": self.identity, "weighted": self.weighted, "unpriced": dict(self.unpriced)}
        text = json.dumps(content)
        metadata = {**FORMAT.header(), "content": text, HASH: content_hash(tensors, text)}
        write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Database:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: If there is none.
            FileFormatError: If it is damaged, foreign, or of another version.
        """
        metadata, tensors = read_tensors(path, "path must be a layer database", MOST_BYTES)
        with FORMAT.reading(path, _WAY_OUT):
            FORMAT.require(metadata)
            text = metadata["content"]
            content = parse_json(text)
            require_form(content, _FORM)
            require_whole(metadata, text, tensors)
            names = [key.removesuffix("/removal") for key in tensors if key.endswith("/removal")]
            tables = {name: _table(tensors, name) for name in names}
        return cls(tables, content["unpriced"], content["weighted"], content["identity"])


def _table(tensors: Mapping[str, Tensor], name: str) -> Table:
    removal, errors, losses = (tensors[f"{name}/{key}"].numpy() for key in ("removal", "errors", "losses"))
    table = Table(removal.astype(np.int64), errors, losses)
    for values in (errors, losses):
        if values.dtype != np.float64 or values.shape != (len(removal) + 1,) or not np.isfinite(values).all():
            raise FileFormatError(f"{name!r} has errors or losses of another form than its order")
    if sorted(table.removal.tolist()) != list(range(len(table.removal))):
        raise FileFormatError(f"the order of {name!r} does not have every unit once")
    return table
