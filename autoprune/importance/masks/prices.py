"""Prior of a search over zeros: the loss that a database expects of every option."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autoprune.importance.masks.tables import Table
from autoprune.protocols import FloatArray, SearchSpace
from autoprune.structure.slicing.zeros import UNSTRUCTURED


def losses_of_options(space: SearchSpace, tables: Mapping[str, Table]) -> tuple[FloatArray, ...] | None:
    """Expected loss of every option of every dimension alone: d arrays of shape (sizes[j],), 0 for dense.

    Where the loss of a weight is unknown, as that of the first layer, its error is converted by the median ratio of
    those that are known.

    Returns:
        None if an option removes units, or has no price.
    """
    losses = tuple(np.zeros(size) for size in space.sizes)
    places = prices_of(tables)
    for j, row in enumerate(losses):
        for option in range(1, len(row)):
            alone = [option if i == j else 0 for i in range(len(losses))]
            pruning = space.pruning(alone)
            if pruning.kept or pruning.dropped or len(pruning.zeroed) != 1:
                return None
            ((name, zeros),) = pruning.zeroed.items()
            price = places.get((name, pruning.patterns.get(name, UNSTRUCTURED), zeros))
            if price is None:
                return None
            row[option] = price
    return losses


def prices_of(tables: Mapping[str, Table]) -> dict[tuple[str, str, int], float]:
    """Loss of each weight, pattern and number of zeros, in one unit."""
    ratios = [table.losses[ok] / table.errors[ok] for table in tables.values() if (ok := _known(table)).any()]
    scale = float(np.median(np.concatenate(ratios))) if ratios else 1.0
    found = {}
    for name, table in tables.items():
        known = bool(ratios) and np.isfinite(table.losses).all()
        prices = table.losses if known else scale * table.errors
        for (pattern, zeros), price in zip(table.choices, prices.tolist(), strict=True):
            found[name, pattern, zeros] = price
    return found


def _known(table: Table) -> np.ndarray:
    known: np.ndarray = np.isfinite(table.losses) & (table.losses > 0) & (table.errors > 0)
    return known
