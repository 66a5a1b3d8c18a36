"""Cache of outputs of modules, and of the calibrated values of these modules, within a limit on memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_REMEMBERED = 4096  # digests whose number of uses is remembered
Key = tuple[str, bytes, str]
State = dict[tuple[str, str], Tensor]


@dataclass
class Kept:
    """Cache entry of one cut and one digest, for the batches of one part of the data.

    Attributes:
        room: Memory set aside for the outputs, in bytes.
        nbytes: Memory that they take.
        outputs: Of the module, by index of the batch.
        versions: Number of writes to each of these tensors, by index of the batch.
        shapes: Outputs of the skipped modules, on the meta device, by index of the batch.
        state: Calibrated tensors of the hidden modules; None until the calibration is complete.
    """

    room: int
    nbytes: int = 0
    outputs: dict[int, Any] = field(default_factory=dict)
    versions: dict[int, list[int]] = field(default_factory=dict)
    shapes: dict[int, dict[str, Any]] = field(default_factory=dict)
    state: State | None = None


class Store:
    """Cache of outputs within a limit on memory; the least recently used are evicted first.

    As long as there is room, everything is admitted. Then only outputs that were asked for before, or by several
    candidates that were announced together: most outputs belong to one candidate and are never asked for again.

    Args:
        limit: In bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.kept: OrderedDict[Key, Kept] = OrderedDict()
        self._asked: OrderedDict[tuple[str, bytes], int] = OrderedDict()
        self.used = 0
        self.peak = 0

    def find(self, key: Key) -> Kept | None:
        """Return an entry, if there is one, and mark it as the most recently used."""
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def ask(self, name: str, digest: bytes) -> None:
        """Note that a candidate could use the output of a module."""
        self._asked[name, digest] = self._asked.pop((name, digest), 0) + 1
        if len(self._asked) > _REMEMBERED:
            self._asked.popitem(last=False)

    def admit(self, key: Key, nbytes: int, guarded: Set[Key]) -> Kept | None:
        """Reserve memory, evicting the least recently used entries that are not `guarded`; None without room."""
        wanted = self._asked.get(key[:2], 0) > 1
        while self.used + nbytes > self._limit:
            oldest = next((other for other in self.kept if other not in guarded), None)
            if not wanted or oldest is None or nbytes > self._limit:
                return None
            self.drop(oldest)
        self.kept[key] = Kept(nbytes)
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        return self.kept[key]

    def drop(self, key: Key) -> None:
        """Forget one entry, if it is there."""
        if key in self.kept:
            self.used -= self.kept.pop(key).room

    def clear(self) -> None:
        """Forget all outputs."""
        self.kept.clear()
        self.used = 0


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def nbytes(tree: Any) -> int:
    """Memory that is kept alive, once for each storage."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(tree)}.values())


def versions(tree: Any) -> list[int]:
    """Number of writes to each tensor."""
    return [tensor._version for tensor in tensors(tree)]


def placeholder(leaf: Any) -> Any:
    """Return a tensor without values in place of a tensor."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


def copied(leaf: Any) -> Any:
    """Return a copy in place of a tensor."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
