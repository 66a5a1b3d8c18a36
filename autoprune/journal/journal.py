"""Journal: every ask, evaluation and tell of a search, on disk as soon as it happens.

``run_dir/journal.sqlite`` is an ordinary SQLite file that any SQLite tool can read while the search writes it (on the
same machine: write-ahead logging shares memory)::

    pandas.read_sql("SELECT * FROM trials JOIN evaluations ON trial = trials.id", sqlite3.connect(path))

`autoprune.journal.sqlite_file.SCHEMA` documents it and goes into the file, comments included; ``PRAGMA user_version``
holds its version.

- Candidates and costs are JSON text, so that people and ``json_extract`` read them; 10,000 trials of 100 dimensions
  take about 4 MB. Only values per sample are blobs.
- Each event is one transaction. With ``synchronous=NORMAL`` it survives ``kill -9`` as soon as the method returns; a
  power cut may undo the last few, which are evaluated again, but never corrupt the file. FULL would wait for the disk
  three times a trial to save those.
- One search writes at a time: it holds a lock on ``journal.lock``, which the system releases when the process ends,
  however that happens.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from autoprune.files.access import brief, parse_json, shortened, sound
from autoprune.journal.reader import open_to_read
from autoprune.journal.rows import EVALUATION_COLUMNS, TrialRow, evaluation_row, trial_row, values_of
from autoprune.journal.sqlite_file import (
    FILE_NAME,
    acquire,
    connect,
    explaining_failures,
    lay_out,
    patiently,
    reserve,
    writable,
)
from autoprune.journal.watch import Watch, rescued
from autoprune.metrics.statistics import Evaluation
from autoprune.protocols import Failure, FloatArray, IntArray, Measurement

log = logging.getLogger(__name__)


class Journal:
    """Trials on disk. `create` or `resume` one to write, `open` one to read; close it, or use it in a `with`."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: Path | None = None,
        lock: IO[bytes] | None = None,
        closing: ExitStack | None = None,
    ) -> None:
        self._connection = connection
        self._path = path
        self._lock = lock
        self._closing = closing or ExitStack()
        self._watch = None if lock is None or path is None else Watch(path, connection)
        self._last: dict[str, int] = {}  # rows may be lost with the file, and numbers must not come twice
        self.notes: tuple[str, ...] = ()
        """Damage to the file while it was written, in plain words."""

    @classmethod
    def create(cls, run_dir: str | Path | None, meta: Mapping[str, Any]) -> Self:
        """Start a journal in `run_dir`, made if missing; ``None`` keeps it in memory, with the same methods.

        Args:
            run_dir: The folder of this run and of no other.
            meta: Identity of the run, such as space, limits, seed and versions; JSON-ready values.

        Raises:
            FileExistsError: If `run_dir` already holds a journal.
            OSError: If `run_dir` is a file or cannot be written.
        """
        entries = [(key, json.dumps(value, allow_nan=False)) for key, value in meta.items()]
        if run_dir is None:
            connection = sqlite3.connect(":memory:")
            lay_out(connection, entries)
            return cls(connection)
        path = Path(run_dir) / FILE_NAME
        lock = reserve(path)
        unfinished = path.with_suffix(".new")  # renamed when complete, so that a kill leaves no partial journal
        try:
            unfinished.unlink(missing_ok=True)
            connection = sqlite3.connect(unfinished)
            with explaining_failures(path):
                lay_out(connection, entries)
            connection.close()
            unfinished.rename(path)
        except BaseException:  # raised again: nothing is left open
            lock.close()
            raise
        return cls._to_write(path, lock)

    @classmethod
    def _to_write(cls, path: Path, lock: IO[bytes]) -> Self:
        try:
            return cls(connect(path), path, lock)
        except BaseException:  # raised again: nothing is left open
            lock.close()
            raise

    @classmethod
    def resume(cls, run_dir: str | Path) -> Self:
        """Open the journal in `run_dir` to continue it.

        Raises:
            FileNotFoundError: If `run_dir` holds no journal.
            BlockingIOError: If another search is writing it.
            OSError: If it cannot be written.
            FileFormatError: If the file is corrupted, not a journal, or written by a newer version.
        """
        path = Path(run_dir) / FILE_NAME
        cls.open(run_dir).close()  # whether it is a journal of ours shows without changing it
        with writable(path.parent):
            lock = acquire(path)
        return cls._to_write(path, lock)

    @classmethod
    def open(cls, run_dir: str | Path) -> Self:
        """Open the journal in `run_dir` for reading, also while a search writes it; leaves nothing behind.

        Raises:
            FileNotFoundError: If `run_dir` holds no journal.
            FileFormatError: If the file is corrupted, not a journal, or written by a newer version.
            OSError: If another program keeps it locked.
        """
        connection, closing = open_to_read(run_dir)
        return cls(connection, Path(run_dir) / FILE_NAME, closing=closing)

    def record_ask(self, candidates: IntArray, costs: Mapping[str, FloatArray]) -> list[int]:
        """Add a pending trial for each of the candidates (n, d), with its named costs (n,); return the ids."""
        ask = self._next("trials", "ask")
        first = self._next("trials", "id")
        asked = time.time()
        rows = [
            (first + i, ask, asked, _json(candidate), _json({name: float(values[i]) for name, values in costs.items()}))
            for i, candidate in enumerate(candidates.tolist())
        ]
        self._write("INSERT INTO trials (id, ask, asked, candidate, costs) VALUES (?, ?, ?, ?, ?)", rows)
        self._last |= {"trials.ask": ask, "trials.id": first + len(rows) - 1}
        return [row[0] for row in rows]

    def record_evaluation(
        self,
        trial: int,
        outcome: Measurement | Failure,
        evaluations: Sequence[Evaluation],
        *,
        worker: str = "local",
        started: float | None = None,
    ) -> None:
        """Add the measurements of `trial`, and set the trial's status: ok, or raced or failed with the reason.

        Args:
            trial: An id that `record_ask` returned.
            outcome: Values per sample, or the reason of a failure.
            evaluations: Its statistics: a row for each rung that it passed, and the last.
            worker: The worker that ran it.
            started: Unix time; None if it ended just now.
        """
        first = self._next("evaluations", "id")
        began = time.time() - sum(one.seconds for one in evaluations) if started is None else started
        stages: Sequence[Measurement | Failure] = outcome.stages
        rows = []
        for i, (stage, one) in enumerate(zip(stages, evaluations, strict=True)):
            row = {"id": first + i, "trial": trial, "worker": worker, "started": began, "reason": stage.reason}
            rows.append(row | one.to_json() | _values(stage))
            began += one.seconds
        self._write(
            f"INSERT INTO evaluations ({', '.join(rows[0])}) VALUES ({', '.join('?' * len(rows[0]))})",
            [tuple(row.values()) for row in rows],
            ("UPDATE trials SET status = ?, reason = ? WHERE id = ?", (outcome.status, outcome.reason, trial)),
        )
        self._last["evaluations.id"] = first + len(rows) - 1

    def record_tell(self, trials: Sequence[int]) -> None:
        """Add that these trials were told to the optimizer together, in this order. A trial is told once."""
        tell, first = self._next("tells", "tell"), self._next("tells", "id")
        rows = [(first + i, tell, trial) for i, trial in enumerate(trials)]
        self._write("INSERT INTO tells (id, tell, trial) VALUES (?, ?, ?)", rows)
        self._last |= {"tells.tell": tell, "tells.id": first + len(rows) - 1}

    def record_meta(self, key: str, value: Any) -> None:
        """Replace an entry of the run's identity, such as the number of trials wanted by now."""
        self._write("REPLACE INTO meta VALUES (?, ?)", [(key, json.dumps(value, allow_nan=False))])

    def meta(self) -> dict[str, Any]:
        """Identity of the run, from `create` and `record_meta`.

        Raises:
            FileFormatError: If it is damaged.
        """
        with self._sound():
            rows = self._connection.execute("SELECT key, value FROM meta").fetchall()
            return {key: parse_json(value) for key, value in rows}

    def trials(self) -> list[TrialRow]:
        """All trials in the order proposed, pending ones included.

        Raises:
            FileFormatError: If they are damaged.
        """
        with self._sound():
            with self._connection:
                self._connection.execute("BEGIN")  # both queries see the same state while a search writes
                rows = self._connection.execute(
                    "SELECT id, ask, candidate, costs, status, reason FROM trials ORDER BY id"
                ).fetchall()
                evaluations = defaultdict(list)
                for row in self._connection.execute(f"SELECT {EVALUATION_COLUMNS} FROM evaluations ORDER BY id"):
                    evaluations[row[1]].append(evaluation_row(row))
            return [trial_row(row, tuple(evaluations[row[0]])) for row in rows]

    def metrics(self, evaluation: int) -> FloatArray:
        """Metric of each sample in an evaluation, rounded to float32, shape (n,); empty if it failed."""
        query = "SELECT metrics FROM evaluations WHERE id = ?"
        with self._sound():
            (blob,) = self._connection.execute(query, (evaluation,)).fetchone()
            return values_of(blob).astype(np.float64)

    def values(self, trial: int) -> tuple[FloatArray, FloatArray]:
        """Signal and metric of each sample in the last evaluation of `trial`, float32; empty without."""
        query = "SELECT signals, metrics FROM evaluations WHERE trial = ? ORDER BY id DESC LIMIT 1"
        with self._sound():
            found = self._connection.execute(query, (trial,)).fetchone() or (None, None)  # lost with the file
            signals, metrics = map(values_of, found)
            return signals, metrics

    def first_of_ask(self, trial: int) -> int:
        """Find the first trial of those proposed together with `trial`."""
        query = "SELECT min(id) FROM trials WHERE ask = (SELECT ask FROM trials WHERE id = ?)"
        (first,) = self._connection.execute(query, (trial,)).fetchone()
        return trial if first is None else int(first)

    def told(self) -> set[int]:
        """Return the trials that were told to the optimizer."""
        return {trial for (trial,) in self._connection.execute("SELECT trial FROM tells")}

    def close(self) -> None:
        """Close the file. Everything recorded is already in it."""
        self._connection.close()
        self._closing.close()
        if self._lock is not None:
            self._lock.close()

    def _write(self, statement: str, rows: Sequence[tuple[Any, ...]], *then: tuple[str, tuple[Any, ...]]) -> None:
        """Write in one transaction, also if the process is killed meanwhile; wait for a lock of another program."""

        def transaction() -> None:
            with self._connection:
                self._connection.executemany(statement, rows)
                for further, values in then:
                    self._connection.execute(further, values)

        if self._watch is None or self._path is None:
            transaction()
            return
        if found := self._watch.lost() or ("was overwritten" if self._watch.overwritten() else ""):
            self._go_on_in_memory(found)
        try:
            with explaining_failures(self._path):
                patiently(transaction, self._path)
        except (OSError, sqlite3.DatabaseError) as error:
            if isinstance(error, sqlite3.IntegrityError) or not (found := self._ruined(error)):
                raise
            self._go_on_in_memory(found)
            transaction()
        if self._watch is not None:
            self._watch.settle()

    def _ruined(self, error: Exception) -> str:
        """Describe the damage to the file if it caused an error; empty otherwise."""
        code = getattr(error, "sqlite_errorcode", 0)
        if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return "was overwritten"
        return self._watch.lost() if self._watch is not None else ""

    def _go_on_in_memory(self, happened: str) -> None:
        """Continue in memory if the file is gone, so that the search keeps its trials so far."""
        note = (
            f"the journal {self._path} {happened} while the search was writing it; what came after that is in this "
            "result alone, so save it, and the search cannot be resumed there"
        )
        log.error("%s", note)
        self.notes = (note,)
        lost = self._connection
        self._connection = rescued(lost)
        with suppress(sqlite3.Error):  # pending writes have no file any more
            lost.close()
        self._watch = None

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """Turn all errors of damaged rows into one."""
        told = f"run_dir must hold a journal of autoprune, but {shortened(self._path or 'this one')} is damaged"
        with sound(told, "name another run_dir"):
            try:
                yield
            except sqlite3.Error as error:
                raise ValueError(brief(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self, table: str, column: str) -> int:
        row = self._connection.execute(f"SELECT {column} FROM {table} ORDER BY id DESC LIMIT 1").fetchone()
        return max(row[0] if row else -1, self._last.get(f"{table}.{column}", -1)) + 1


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _values(stage: Measurement | Failure) -> dict[str, bytes]:
    """Columns with the values per sample; none for a failure."""
    if isinstance(stage, Failure):
        return {}
    return {"signals": stage.signal.astype("<f4").tobytes(), "metrics": stage.metric.astype("<f4").tobytes()}
