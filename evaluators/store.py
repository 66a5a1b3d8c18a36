"""What candidates share, within a limit on memory: outputs of modules, and what calibration gave these modules."""

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
    """What is kept of one cut and one digest, for the batches of one part of the data.

    Attributes:
        room: Memory set aside for the outputs, in bytes.
        nbytes: Memory that they take.
        outputs: Of the module, by index of the batch.
        versions: How often each tensor of these had been written to, by index of the batch.
        shapes: What the skipped modules return, on the meta device, by index of the batch.
        state: Tensors that calibration gave to the modules that are hidden; None until it is through.
    """

    room: int
    nbytes: int = 0
    outputs: dict[int, Any] = field(default_factory=dict)
    versions: dict[int, list[int]] = field(default_factory=dict)
    shapes: dict[int, dict[str, Any]] = field(default_factory=dict)
    state: State | None = None


class Store:
    """Outputs within a limit on memory; the least recently used go first.

    As long as there is room, everything is taken. Then only what was asked for before, or by several candidates that
    were announced together: most outputs belong to one candidate and are never asked for again.

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
        """What is kept, now the most recently used."""
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def ask(self, name: str, digest: bytes) -> None:
        """Take note that a candidate could use the output of a module."""
        self._asked[name, digest] = self._asked.pop((name, digest), 0) + 1
        if len(self._asked) > _REMEMBERED:
            self._asked.popitem(last=False)

    def admit(self, key: Key, nbytes: int, guarded: Set[Key]) -> Kept | None:
        """Set memory aside, at the cost of what was used least recently and is not `guarded`; None without room."""
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
    """How often each tensor has been written to."""
    return [tensor._version for tensor in tensors(tree)]


def placeholder(leaf: Any) -> Any:
    """A tensor without values in the place of one."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


def copied(leaf: Any) -> Any:
    """A tensor of its own in the place of a tensor."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
