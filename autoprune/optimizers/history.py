"""Archive of an optimizer: the candidates told and pending, in an order that does not depend on their arrival."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from autoprune.optimizers.problem import Problem
from autoprune.optimizers.repair import ENUMERABLE
from autoprune.protocols import FAILED, OK, Evaluations, FloatArray, IntArray

_PROPOSAL_TRIES = 4
_NEIGHBOUR_TRIES = 16

Propose = Callable[[int, np.random.Generator], IntArray]


class _Told(NamedTuple):
    """One evaluation; of two for one candidate the larger counts: the ``ok`` one, then that with more samples.

    Values are bytes, which compare without ambiguity, NaN as well.
    """

    ok: bool
    samples: int
    status: str
    objectives: bytes
    stderr: bytes
    distortion: bytes
    acceptable: bool


@final
class Archive:
    """Remembers candidates, and turns a proposing function into `ask` without duplicates.

    Each `ask` draws from a generator seeded by the seed and the number of candidates known, and the rows it shows are
    sorted: a history told in bulk, in any order, leads to the same next proposals.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self._problem = problem
        self._seed = seed
        self._seeds = problem.repair(problem.seeds)
        self._told: dict[bytes, _Told] = {}
        self._pending: set[bytes] = set()
        self._ok_keys: list[bytes] = []  # of the rows below, sorted
        self._ok: tuple[IntArray, FloatArray, NDArray[np.bool_]] | None = None
        self._news: set[bytes] = set()  # told since those rows were last asked for

    def __len__(self) -> int:
        return len(self._told) + len(self._pending)

    def tell(self, evaluations: Evaluations) -> None:
        """Remember evaluations; see `_Told` for two of one candidate."""
        candidates = np.asarray(self._problem.canonical(evaluations.candidates), dtype=np.int64)
        status = np.where(np.isfinite(evaluations.objectives).all(axis=1), evaluations.status, FAILED).tolist()
        values = (evaluations.objectives, evaluations.stderr, evaluations.distortion)
        columns = [[np.asarray(row, dtype=np.float64).tobytes() for row in column] for column in values]
        samples, acceptable = evaluations.samples.tolist(), evaluations.acceptable.tolist()
        for candidate, fate, count, *measured in zip(candidates, status, samples, *columns, acceptable, strict=True):
            key = candidate.tobytes()
            row = _Told(fate == OK, count, fate, *measured)
            self._pending.discard(key)
            self._told[key] = max(row, self._told.get(key, row))
            self._news.add(key)

    def pend(self, candidates: IntArray) -> None:
        """Take candidates (n, d) as proposed already: an earlier process asked for them."""
        keys = {candidate.tobytes() for candidate in np.asarray(self._problem.canonical(candidates), dtype=np.int64)}
        self._pending |= keys - self._told.keys()

    def ok(self) -> tuple[IntArray, FloatArray]:
        """The feasible candidates evaluated in full (n, d) and their objectives (n, m), sorted."""
        return self._feasible()[:2]

    def acceptable(self) -> NDArray[np.bool_]:
        """Return whether each row of `ok` meets the limits on the score, shape (n,)."""
        return self._feasible()[2]

    def _feasible(self) -> tuple[IntArray, FloatArray, NDArray[np.bool_]]:
        if self._ok is None or not self._news.isdisjoint(self._ok_keys):
            self._ok, self._ok_keys, self._news = None, [], set(self._told)
        if self._news or self._ok is None:
            keys = sorted(key for key in self._news if self._told[key].ok)
            rows = self._rows(keys)
            feasible = np.flatnonzero(self._problem.feasible(rows.candidates))
            self._insert([keys[i] for i in feasible], rows, feasible)
            self._news.clear()
        assert self._ok is not None
        return self._ok

    def _insert(self, keys: list[bytes], rows: Evaluations, feasible: IntArray) -> None:
        """Insert new rows in order: sorting all rows at every ask would take longer the more there are."""
        added = rows.candidates[feasible], rows.objectives[feasible], rows.acceptable[feasible]
        if self._ok is None or not self._ok_keys:
            self._ok, self._ok_keys = added, keys
        elif keys:
            at = [bisect_left(self._ok_keys, key) for key in keys]
            candidates, objectives, acceptable = (
                np.insert(old, at, new, axis=0) for old, new in zip(self._ok, added, strict=True)
            )
            self._ok = candidates, objectives, acceptable
            self._ok_keys = sorted(self._ok_keys + keys)

    def probes(self) -> Evaluations:
        """Evaluations of candidates that change at most one dimension, feasible or not, sorted."""
        told = self._unpack(list(self._told))
        return self._rows([key for key, probing in zip(self._told, self._problem.probes(told), strict=True) if probing])

    def nothing(self) -> Evaluations:
        """Evaluations without a row."""
        return self._rows([])

    def known(self) -> IntArray:
        """Everything told or pending, sorted, shape (n, d)."""
        return self._unpack(sorted(self._told.keys() | self._pending))

    def _unpack(self, keys: list[bytes]) -> IntArray:
        return np.frombuffer(b"".join(keys), dtype=np.int64).reshape(len(keys), len(self._problem.sizes))

    def _rows(self, keys: list[bytes]) -> Evaluations:
        """Evaluations of told candidates, sorted; reasons are not kept."""
        keys, n = sorted(keys), len(keys)
        rows = [self._told[key] for key in keys]
        objectives, stderr, distortion = (
            np.frombuffer(b"".join(column), dtype=np.float64)
            for column in (
                [row.objectives for row in rows],
                [row.stderr for row in rows],
                [row.distortion for row in rows],
            )
        )
        return Evaluations(
            candidates=self._unpack(keys),
            objectives=objectives.reshape(n, -1 if n else 0),
            stderr=stderr.reshape(n, -1 if n else 0),
            samples=np.array([row.samples for row in rows], dtype=np.int64),
            status=tuple(row.status for row in rows),
            reasons=("",) * n,
            distortion=distortion,
            acceptable=np.array([row.acceptable for row in rows], dtype=np.bool_),
        )

    def ask(self, n: int, propose: Propose) -> IntArray:
        """Return up to `n` candidates never returned or told before, shape (<= n, d).

        The problem's seeds come first, then what `propose` (how many, generator) returns. Where that is known already,
        small spaces are listed, so that none is missed; in large ones known candidates are varied a bounded number of
        times.

        Args:
            n: Most candidates.
            propose: Returns feasible candidates, int64, shape (any, d); duplicates are dropped here.
        """
        rng = np.random.default_rng([self._seed, len(self)])
        batch: dict[bytes, IntArray] = {}
        self._take(batch, n, self._seeds)
        for _ in range(_PROPOSAL_TRIES):
            if len(batch) < n:
                self._take(batch, n, propose(n - len(batch), rng))
        if len(batch) < n and self._problem.size <= ENUMERABLE:
            everything = self._problem.canonical(self._problem.enumerate())
            self._take(batch, n, rng.permutation(everything[self._problem.feasible(everything)]))
        elif len(batch) < n:
            for _ in range(_NEIGHBOUR_TRIES):
                if len(batch) < n:
                    self._take(batch, n, self._neighbours(2 * n, rng, batch))
        self._pending.update(batch)
        return np.array(list(batch.values()), dtype=np.int64).reshape(-1, len(self._problem.sizes))

    def _take(self, batch: dict[bytes, IntArray], n: int, candidates: IntArray) -> None:
        for candidate in candidates:
            key = candidate.tobytes()
            if len(batch) < n and key not in self._told and key not in self._pending:
                batch[key] = candidate

    def _neighbours(self, n: int, rng: np.random.Generator, batch: dict[bytes, IntArray]) -> IntArray:
        """Change one to four entries of known candidates at random, repaired; shape (n, d)."""
        d = len(self._problem.sizes)
        known = sorted([*self._told, *self._pending, *batch]) or [self._problem.cheapest.tobytes()]
        rows = np.array([np.frombuffer(known[i], dtype=np.int64) for i in rng.integers(len(known), size=n)])
        change = rng.random((n, d)) < rng.integers(1, 5, size=(n, 1)) / d
        return self._problem.repair(np.where(change, rng.integers(0, self._problem.sizes, size=(n, d)), rows))
