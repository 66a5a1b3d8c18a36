"""Run evaluations in this process or in several, whichever is found to be faster here."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import final

import numpy as np
import torch

from autoprune.early_stopping.racing import Contest
from autoprune.evaluators import Context, Evaluator, Orders
from autoprune.execution.local import GENERATION, Executor, Finished, LocalExecutor
from autoprune.execution.pool import PoolExecutor, cores, why_impossible
from autoprune.protocols import IntArray

log = logging.getLogger(__name__)

WORTH_SECONDS = 0.2
"""Seconds of a candidate below which processes are not worth their start, some seconds each."""

_GAIN = 1.1  # times as many candidates a second as in this process, for which processes are taken
_TIMED = 2  # candidates timed each way


@final
class FastestExecutor:
    """Evaluates in this process at first, then in processes if these evaluate more candidates a second.

    The first generation runs here. If its candidates take long enough, processes are started, one for each core; of
    the next generation some candidates are evaluated both ways, and timed. Results come in the same order either way.

    Attributes:
        notes: Decision, in plain words, once it was taken.
        until: Time at which `gather` stops waiting for processes, as in `PoolExecutor`, and evaluates nothing more.
    """

    name = "local"
    threads: int | None = None

    def __init__(self, workers: int | None = None, generation: int = GENERATION) -> None:
        self._workers = workers or cores()
        self._generation = generation
        self._local = LocalExecutor(generation)
        self._pool: PoolExecutor | None = None
        self._now: Executor = self._local
        self._seconds: list[float] = []
        self._early: list[Finished] = []
        self._given: tuple[Evaluator, Context, Evaluator] | None = None
        self.notes: tuple[str, ...] = ()
        self.until = math.inf

    def start(self, evaluator: Evaluator, context: Context, fresh: Evaluator) -> None:
        """Begin in this process."""
        self._given = evaluator, context, fresh
        self._local.start(evaluator, context, fresh)

    def room(self) -> int:
        """Return a whole generation once the last one is done."""
        return 0 if self._early else self._now.room()

    def submit(self, trials: list[int], candidates: IntArray, races: Sequence[Contest | None]) -> None:
        """Queue candidates; those of the second generation decide where all further ones run."""
        if self._seconds and not self.notes and len(trials) >= _TIMED:
            candidates, trials, races = self._decided(trials, candidates, races)
        if trials:
            self._now.submit(list(trials), candidates, races)

    def gather(self) -> list[Finished]:
        """Return the next outcomes."""
        if self._early:
            early, self._early = self._early, []
            return early
        if self._now is self._local and time.monotonic() >= self.until:
            return []
        began = time.perf_counter()
        found = self._now.gather()
        if not self.notes and found:
            self._seconds.append(time.perf_counter() - began)
        return found

    def stop(self) -> None:
        """Stop both."""
        if self._pool is not None:
            self._pool.stop()
        self._local.stop()
        self._now, self._pool = self._local, None
        self._early, self._given = [], None

    def _decided(
        self, trials: list[int], candidates: IntArray, races: Sequence[Contest | None]
    ) -> tuple[IntArray, list[int], Sequence[Contest | None]]:
        """Decide; return what is left to submit, in the order of the evaluator."""
        assert self._given is not None
        evaluator, context, _ = self._given
        each = float(np.mean(self._seconds))
        if why := self._why_alone(context, each):
            self._decide(f"candidates are evaluated in this process: {why}")
            return candidates, trials, races
        order = evaluator.order(candidates.copy()) if isinstance(evaluator, Orders) else np.arange(len(trials))
        pool = self._pool = PoolExecutor(self._workers, 1, self._generation)
        try:
            pool.start(*self._given)
            pool.ready()
        except (TypeError, ValueError, RuntimeError) as error:  # those of a pool: trials so far must not be lost
            pool.stop()
            self._pool = None
            self._decide(f"candidates are evaluated in this process: processes cannot be started, because {error}")
            self._local.start(*self._given)  # the end of the pool released what the evaluator keeps
            return candidates, trials, races
        both = order[: min(max(_TIMED, self._workers), len(order))]
        alone = self._timed(self._local, both[:_TIMED], trials, candidates, races)
        apart = self._timed(pool, both, trials, candidates, races)
        rates = [len(found) / seconds for found, seconds in (alone, apart)]
        threads = torch.get_num_threads()
        told = f"{rates[1]:.2f} a second in {self._workers} processes of one thread, {rates[0]:.2f} in this one"
        if rates[1] > _GAIN * rates[0]:
            sums = "" if threads == 1 else f"; sums may differ in the last digits from those of {threads} threads"
            self._decide(f"candidates are evaluated in processes: {told}{sums}")
            self._now, self._early = pool, apart[0]
            pool.until = self.until
        else:
            self._decide(f"candidates are evaluated in this process: {told} of {threads} threads")
            pool.stop()
            self._pool, self._early = None, alone[0]
            self._local.start(*self._given)
        left = order[len(self._early) :].tolist()
        return candidates[left], [trials[i] for i in left], [races[i] for i in left]

    def _why_alone(self, context: Context, seconds: float) -> str:
        """Reason to try no processes, in plain words; empty if they are tried."""
        if self._workers < 2:
            return "there is one core"
        if why := why_impossible(context):
            return why
        if seconds < WORTH_SECONDS:
            return f"one takes {seconds:.2g} s, which processes are not worth their start for"
        return ""

    def _timed(
        self,
        executor: Executor,
        rows: IntArray,
        trials: list[int],
        candidates: IntArray,
        races: Sequence[Contest | None],
    ) -> tuple[list[Finished], float]:
        """Evaluate some candidates; outcomes in the order given, and seconds."""
        began = time.perf_counter()
        executor.submit([trials[i] for i in rows.tolist()], candidates[rows], [races[i] for i in rows.tolist()])
        found: list[Finished] = []
        while len(found) < len(rows):
            found += executor.gather()
        return found, time.perf_counter() - began

    def _decide(self, note: str) -> None:
        self.notes = (note,)
        log.info("%s", note)
