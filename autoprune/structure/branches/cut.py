"""Cut: the operations that a record runs no more without a branch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """Operations that do not run without a branch, in one call of it.

    Attributes:
        exit: The last of them, an addition or the last one of a block.
        result: The value it would make.
        stream: The value that stands for it.
        ops: All of them.
    """

    exit: int
    result: int
    stream: int
    ops: frozenset[int]
