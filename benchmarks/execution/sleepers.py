"""A process that sleeps in place of evaluating; without PyTorch, which takes a core seconds to import in each."""

from __future__ import annotations

import asyncio
import time

import numpy as np
from numpy.typing import NDArray


class Sleepers:
    """One process that stands for many workers, each of which does one thing after the other."""

    def __init__(self, seed: int, median: float, sigma: float) -> None:
        self._rng, self._median, self._sigma = np.random.default_rng(seed), median, sigma
        self._turns: dict[int, asyncio.Lock] = {}
        self._spans: list[tuple[float, float]] = []

    async def where(self) -> tuple[str, str]:
        return "asleep", ""

    async def evaluate(self, worker: int, candidate: NDArray[np.int64]) -> NDArray[np.float64]:
        async with self._turns.setdefault(worker, asyncio.Lock()):
            began = time.time()
            await asyncio.sleep(self._median * self._rng.lognormal(0.0, self._sigma))
            self._spans.append((began, time.time()))
        return np.array([float((candidate**2).sum())])

    async def spans(self) -> list[tuple[float, float]]:
        """Begin and end of every evaluation, Unix time."""
        return self._spans
