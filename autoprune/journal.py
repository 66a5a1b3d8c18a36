"""The journal: every ask, evaluation and tell of a search, on disk the moment it happens.

``run_dir/journal.sqlite`` is an ordinary SQLite file that any SQLite tool can read while the search writes it (on the
same machine: write-ahead logging shares memory)::

    pandas.read_sql("SELECT * FROM trials JOIN evaluations ON trial = trials.id", sqlite3.connect(path))

`autoprune.journal_file.SCHEMA` documents it and goes into the file, comments included; ``PRAGMA user_version`` holds
its version.

- Candidates and costs are JSON text, so that people and ``json_extract`` read them; 10,000 trials of 100 dimensions
  take about 4 MB. Only values per sample are blobs.
- Each event is one transaction. With ``synchronous=NORMAL`` it survives ``kill -9`` as soon as the method returns; a
  power cut may undo the last few, never corrupt the file, and costs their evaluation anew. FULL would wait for the disk
  three times a trial to save those.
- One search writes at a time: it holds a lock on ``journal.lock``, which the system lets go of when the process ends,
  however that happens.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from autoprune.journal_file import FILE_NAME, acquire, check, connect, explaining_failures, lay_out, reserve, writable
from autoprune.protocols import Failure, FloatArray, IntArray, Measurement
from autoprune.statistics import fidelity_of, reason_of, stages_of, statistics_of, status_of


@dataclass(frozen=True)
class EvaluationRow:
    """One row of ``evaluations``, without the values per sample.

    Attributes:
        started: Unix time.
        samples: How many samples `signal` is the mean of; 0 if the evaluation failed.
        signal: Lower is better; None if the evaluation failed.
        signal_change_stderr: Standard error of the mean difference to the dense model on the same samples.
        metric: In the metric's own direction; None if the evaluation failed.
        distortion: Mean distance to the outputs of the dense model; None if it was not measured.
        reason: Why the evaluation failed or was stopped early, else empty.
    """

    id: int
    trial: int
    fidelity: str
    worker: str
    started: float
    seconds: float
    samples: int
    signal: float | None
    signal_stderr: float | None
    signal_change_stderr: float | None
    metric: float | None
    metric_change_stderr: float | None
    distortion: float | None
    distortion_stderr: float | None
    reason: str


@dataclass(frozen=True)
class TrialRow:
    """One row of ``trials`` with its evaluations in order of arrival; `status` is pending, ok, raced or failed."""

    id: int
    ask: int
    candidate: tuple[int, ...]
    costs: dict[str, float]
    status: str
    reason: str
    evaluations: tuple[EvaluationRow, ...]


class Journal:
    """Trials on disk. `create` or `resume` one to write, `open` one to read; close it, or use it in a `with`."""

    def __init__(self, connection: sqlite3.Connection, lock: IO[bytes] | None = None) -> None:
        self._connection = connection
        self._lock = lock

    @classmethod
    def create(cls, run_dir: str | Path | None, meta: Mapping[str, Any]) -> Self:
        """Start a journal in `run_dir`, made if missing; ``None`` keeps it in memory, behind the same methods.

        Args:
            run_dir: The folder of this run and of no other.
            meta: What identifies the run, such as space, limits, seed and versions; JSON-ready values.

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
        unfinished = path.with_suffix(".new")  # renamed when it is whole, so that a kill leaves no half of a journal
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
        return cls(connect(path), lock)

    @classmethod
    def resume(cls, run_dir: str | Path) -> Self:
        """Open the journal in `run_dir` to go on writing it.

        Raises:
            FileNotFoundError: If `run_dir` holds no journal.
            BlockingIOError: If another search is writing it.
            OSError: If it cannot be written.
            RecipeError: If the file is corrupted, not a journal, or written by a newer version.
        """
        path = Path(run_dir) / FILE_NAME
        cls.open(run_dir).close()  # whether it is a journal of ours shows without changing it
        with writable(path.parent):
            lock = acquire(path)
        try:
            return cls(connect(path), lock)
        except BaseException:  # raised again: nothing is left open
            lock.close()
            raise

    @classmethod
    def open(cls, run_dir: str | Path) -> Self:
        """Open the journal in `run_dir` for reading, also while a search writes it.

        Raises:
            FileNotFoundError: If `run_dir` holds no journal.
            RecipeError: If the file is corrupted, not a journal, or written by a newer version.
        """
        path = Path(run_dir) / FILE_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"run_dir must be the folder of an earlier search, got {run_dir}: no {FILE_NAME} there"
            )
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        try:
            check(connection, path)
        except BaseException:  # raised again: nothing is left open
            connection.close()
            raise
        return cls(connection)

    def record_ask(self, candidates: IntArray, costs: Mapping[str, FloatArray]) -> list[int]:
        """Add a pending trial for each of the candidates (n, d), with its named costs (n,); return the ids."""
        ask, first, asked = self._next("trials", "ask"), self._next("trials", "id"), time.time()
        rows = [
            (first + i, ask, asked, _json(candidate), _json({name: float(values[i]) for name, values in costs.items()}))
            for i, candidate in enumerate(candidates.tolist())
        ]
        with self._transaction():
            self._connection.executemany(
                "INSERT INTO trials (id, ask, asked, candidate, costs) VALUES (?, ?, ?, ?, ?)", rows
            )
        return [row[0] for row in rows]

    def record_evaluation(
        self,
        trial: int,
        outcome: Measurement | Failure,
        *,
        dense: Measurement | None = None,
        worker: str = "local",
        started: float | None = None,
    ) -> None:
        """Add what was measured of `trial`, and settle the trial's fate: ok, or raced or failed with the reason.

        Args:
            trial: An id that `record_ask` returned.
            outcome: Values per sample, or why there are none; with a row for each rung on the way.
            dense: What an evaluation of the dense model saw on the same samples.
            worker: Where it ran.
            started: Unix time; None if it ended just now.
        """
        stages, first = stages_of(outcome), self._next("evaluations", "id")
        began = time.time() - sum(stage.seconds for stage in stages) if started is None else started
        rows = []
        for i, stage in enumerate(stages):
            ran = {"fidelity": fidelity_of(stage), "worker": worker, "started": began, "seconds": stage.seconds}
            rows.append({"id": first + i, "trial": trial, **ran, **_outcome_columns(stage, dense)})
            began += stage.seconds
        with self._transaction():
            self._connection.executemany(
                f"INSERT INTO evaluations ({', '.join(rows[0])}) VALUES ({', '.join('?' * len(rows[0]))})",
                [tuple(row.values()) for row in rows],
            )
            self._connection.execute(
                "UPDATE trials SET status = ?, reason = ? WHERE id = ?", (status_of(outcome), reason_of(outcome), trial)
            )

    def record_tell(self, trials: Sequence[int]) -> None:
        """Add that these trials were told to the optimizer together, in this order. A trial is told once."""
        tell, first = self._next("tells", "tell"), self._next("tells", "id")
        with self._transaction():
            self._connection.executemany(
                "INSERT INTO tells (id, tell, trial) VALUES (?, ?, ?)",
                [(first + i, tell, trial) for i, trial in enumerate(trials)],
            )

    def record_meta(self, key: str, value: Any) -> None:
        """Replace what identifies the run under `key`, such as the number of trials wanted by now."""
        with self._transaction():
            self._connection.execute("REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value, allow_nan=False)))

    def meta(self) -> dict[str, Any]:
        """What `create` was given, and `record_meta` after it."""
        return {key: json.loads(value) for key, value in self._connection.execute("SELECT key, value FROM meta")}

    def trials(self) -> list[TrialRow]:
        """All trials in the order proposed, pending ones included."""
        with self._connection:
            self._connection.execute("BEGIN")  # both queries see the same moment of a search that goes on writing
            rows = self._connection.execute(
                "SELECT id, ask, candidate, costs, status, reason FROM trials ORDER BY id"
            ).fetchall()
            evaluations = defaultdict(list)
            for row in self._connection.execute(f"SELECT {_EVALUATION_COLUMNS} FROM evaluations ORDER BY id"):
                evaluations[row[1]].append(EvaluationRow(*row))
        return [
            TrialRow(id_, ask, tuple(json.loads(candidate)), json.loads(costs), status, reason, tuple(evaluations[id_]))
            for id_, ask, candidate, costs, status, reason in rows
        ]

    def metrics(self, evaluation: int) -> FloatArray:
        """The metric of each sample in an evaluation, rounded to float32, shape (n,); empty if it failed."""
        (blob,) = self._connection.execute("SELECT metrics FROM evaluations WHERE id = ?", (evaluation,)).fetchone()
        return np.frombuffer(blob or b"", "<f4").astype(np.float64)

    def values(self, trial: int) -> tuple[FloatArray, FloatArray]:
        """Signal and metric of each sample in the last evaluation of `trial`, float32; empty if it failed."""
        query = "SELECT signals, metrics FROM evaluations WHERE trial = ? ORDER BY id DESC LIMIT 1"
        signals, metrics = self._connection.execute(query, (trial,)).fetchone()
        return np.frombuffer(signals or b"", "<f4"), np.frombuffer(metrics or b"", "<f4")

    def first_of_ask(self, trial: int) -> int:
        """The first trial of those proposed together with `trial`."""
        query = "SELECT min(id) FROM trials WHERE ask = (SELECT ask FROM trials WHERE id = ?)"
        (first,) = self._connection.execute(query, (trial,)).fetchone()
        return int(first)

    def told(self) -> set[int]:
        """The trials that were told to the optimizer."""
        return {trial for (trial,) in self._connection.execute("SELECT trial FROM tells")}

    def close(self) -> None:
        """Close the file. Everything recorded is already in it."""
        self._connection.close()
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it or nothing, even when the process is killed in between."""
        (_, _, path) = self._connection.execute("PRAGMA database_list").fetchone()
        with explaining_failures(path), self._connection:
            yield

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self, table: str, column: str) -> int:
        row = self._connection.execute(f"SELECT {column} + 1 FROM {table} ORDER BY id DESC LIMIT 1").fetchone()
        return row[0] if row else 0


_EVALUATION_COLUMNS = ", ".join(field.name for field in fields(EvaluationRow))


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _outcome_columns(outcome: Measurement | Failure, dense: Measurement | None) -> dict[str, Any]:
    columns = {**statistics_of(outcome, dense)._asdict(), "reason": reason_of(outcome)}
    if isinstance(outcome, Failure):
        return columns
    values = {"signals": outcome.signal.astype("<f4").tobytes(), "metrics": outcome.metric.astype("<f4").tobytes()}
    return {**columns, **values}
