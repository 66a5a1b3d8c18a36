"""Resume points of a forward pass: module calls whose output replaces everything that ran before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autoprune.protocols import FloatArray, IntArray

NEVER = np.iinfo(np.int64).max - 1
_LEAST_GAIN = 1e-3  # of all multiply-accumulates, on average over dimensions: less is not worth a place


@dataclass(frozen=True)
class Cut:
    """A module whose output stands for all that ran before it.

    Attributes:
        name: The module; its output is kept.
        end: Number of operations that have run when it returns.
        skipped: Modules that return placeholders when its output is available; none lies inside another.
        hidden: Modules that do not run then: these, this one, and all inside them.
        macs: Multiply-accumulates that do not run then, for the traced batch.
        sample_bytes: Memory that the output of the dense model takes, for one sample.
        overwritten: Whether the model writes to the output later on.
    """

    name: str
    end: int
    skipped: tuple[str, ...]
    hidden: frozenset[str]
    macs: float
    sample_bytes: int
    overwritten: bool


@dataclass(frozen=True)
class Flow:
    """Order in which a forward pass reads tensors and enters modules, with its resume points.

    Attributes:
        cuts: By rising `Cut.end`.
        reads: Operation that first reads each parameter and buffer.
        enters: Number of operations that have run when each module is first called.
        macs: Multiply-accumulates of the traced batch.
        calls: Modules in the order of their calls, where passes read values and so may go another way; else empty.
    """

    cuts: tuple[Cut, ...]
    reads: Mapping[str, int]
    enters: Mapping[str, int]
    macs: float
    calls: tuple[str, ...] = ()

    def first_read(self, name: str) -> int:
        """First operation that reads a tensor; where passes read values, others may read it before everything."""
        return self.reads.get(name, -1 if self.calls else NEVER)


class NothingToShareError(Exception):
    """Raised where no part of a forward pass may be skipped; says why."""


def choose_cuts(flow: Flow, firsts: IntArray, samples: int, memory_bytes: int) -> tuple[Cut, ...]:
    """Choose the cuts whose outputs are kept, by saved work per byte; every dimension changes with equal chance.

    Args:
        flow: With all cuts.
        firsts: First operation that each dimension changes, shape (d,).
        samples: Samples whose outputs are kept.
        memory_bytes: Most memory for the outputs of one dense model at all chosen cuts.
    """
    if not flow.cuts:
        return ()
    size = np.array([max(cut.sample_bytes, 1) * samples for cut in flow.cuts], dtype=np.float64)
    saves: FloatArray = np.array([cut.macs * (firsts >= cut.end) for cut in flow.cuts])
    best = np.zeros(len(firsts))
    left = float(memory_bytes)
    chosen = set[int]()
    while True:
        gains = np.maximum(saves - best, 0).mean(axis=1)
        gains[(size > left) | (gains < _LEAST_GAIN * flow.macs)] = 0
        pick = int((gains / size).argmax())
        if gains[pick] <= 0:
            return tuple(flow.cuts[i] for i in sorted(chosen))
        chosen.add(pick)
        left -= size[pick]
        best = np.maximum(best, saves[pick])
