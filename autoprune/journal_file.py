"""The file behind a journal: its schema, and how it is made, opened, locked and checked."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from autoprune.errors import RecipeError

try:
    import fcntl
except ImportError:  # Windows, where two searches with one run_dir are not told apart
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

FILE_NAME = "journal.sqlite"
LOCK_NAME = "journal.lock"
APPLICATION_ID = int.from_bytes(b"aupr")
SCHEMA_VERSION = 2
_TRIES, _WAIT_SECONDS = 20, 0.1
SCHEMA = """
CREATE TABLE meta (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL             -- JSON
);
CREATE TABLE trials (
    id INTEGER PRIMARY KEY,         -- 0, 1, 2, ... in the order proposed
    ask INTEGER NOT NULL,           -- which ask proposed it, from 0
    asked REAL NOT NULL,            -- Unix time
    candidate TEXT NOT NULL,        -- JSON list of option indices, 0 is dense
    costs TEXT NOT NULL,            -- JSON object: name of the cost, value
    status TEXT NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'ok', 'raced', 'failed')),
    reason TEXT NOT NULL DEFAULT '' -- why it failed or was dropped
);
CREATE TABLE evaluations (
    id INTEGER PRIMARY KEY,         -- 0, 1, 2, ... in the order of arrival
    trial INTEGER NOT NULL REFERENCES trials,
    fidelity TEXT NOT NULL,         -- how much data or training: 'full' is all of the validation subset, 'part' its
                                    -- first samples, '89 steps' all of it after so much of a training
    worker TEXT NOT NULL,
    started REAL NOT NULL,          -- Unix time
    seconds REAL NOT NULL,
    samples INTEGER NOT NULL,       -- 0 if failed
    signal REAL,                    -- mean over the samples, lower is better; NULL if failed
    signal_stderr REAL,             -- standard error of that mean; NULL below two samples
    signal_change_stderr REAL,      -- of the mean difference to the dense model on the same samples, which is smaller
    metric REAL,                    -- mean, in the metric's own direction; NULL if failed
    metric_change_stderr REAL,      -- as above
    distortion REAL,                -- mean distance to the outputs of the dense model; NULL if not measured
    distortion_stderr REAL,         -- standard error of that mean
    reason TEXT NOT NULL,           -- why it failed or was stopped early, else empty
    signals BLOB,                   -- value of each sample, little-endian float32
    metrics BLOB                    -- the same; a single value for a metric of the whole set
);
CREATE TABLE tells (
    id INTEGER PRIMARY KEY,         -- 0, 1, 2, ... in the order told
    tell INTEGER NOT NULL,          -- which tell, from 0
    trial INTEGER NOT NULL UNIQUE REFERENCES trials
);
"""


def lay_out(connection: sqlite3.Connection, entries: Sequence[tuple[str, str]]) -> None:
    """Make the tables, and fill that of what identifies the run."""
    connection.executescript(
        f"BEGIN; PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION}; {SCHEMA}"
    )
    connection.executemany("INSERT INTO meta VALUES (?, ?)", entries)
    connection.commit()


def connect(path: Path) -> sqlite3.Connection:
    """Open a file for writing.

    Raises:
        OSError: If it cannot be written.
    """
    connection = sqlite3.connect(path)
    try:
        with explaining_failures(path):
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")
    except BaseException:  # raised again: nothing is left open
        connection.close()
        raise
    return connection


@contextmanager
def explaining_failures(path: str | Path) -> Iterator[None]:
    """Say which file could not be written, and that the rest of it is safe."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            raise
        raise OSError(
            f"run_dir must have room for the journal, but {path} cannot be written: {error}; everything recorded so "
            "far can be read, and once there is room again, resume=True goes on from there"
        ) from error


def reserve(path: Path) -> IO[bytes]:
    """Make the folder of a file that is not there yet and lock it, so that two searches can never share one.

    Raises:
        FileExistsError: If there is such a file, or the folder is a file.
        BlockingIOError: If another search holds the lock.
        OSError: If the folder cannot be written.
    """
    run_dir = path.parent
    try:
        with writable(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            if path.exists():
                raise FileExistsError
            return acquire(path)
    except FileExistsError as error:
        rule = f"already holds a {FILE_NAME}" if run_dir.is_dir() else "is a file"
        raise FileExistsError(
            f"run_dir must be a folder of its own, but {run_dir} {rule}; pass another run_dir, or resume=True to go on "
            "with the search in it"
        ) from error


@contextmanager
def writable(run_dir: Path) -> Iterator[None]:
    """Say which folder could not be written."""
    try:
        yield
    except (FileExistsError, BlockingIOError):
        raise
    except OSError as error:
        raise type(error)(
            f"run_dir must be a folder that can be written, got {run_dir} ({error.strerror}); pass another run_dir"
        ) from error


def acquire(path: Path) -> IO[bytes]:
    """Lock the folder of a file until what is returned is closed.

    Raises:
        BlockingIOError: If another search holds the lock.
    """
    lock = path.with_name(LOCK_NAME).open("ab")
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise BlockingIOError(
            f"run_dir must not be in use, but another search is writing to {path.parent}; wait until it ends, stop it, "
            "or pass another run_dir"
        ) from error
    return lock


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse what is no whole journal of this version.

    Raises:
        RecipeError: If it is corrupted, of another program, or of another version.
    """
    try:
        for _ in range(_TRIES):  # a search that begins makes the file first and lays it out an instant later
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                break
            time.sleep(_WAIT_SECONDS)
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        application, version, state = APPLICATION_ID, SCHEMA_VERSION, str(error)
    if application != APPLICATION_ID:
        problem = "is an SQLite file of another program"
    elif version != SCHEMA_VERSION:
        problem = (
            f"has schema {version}, and this autoprune reads schema {SCHEMA_VERSION}: use the version that wrote it"
        )
    elif state != "ok":
        problem = f"cannot be read: {state}"
    else:
        return
    raise RecipeError(f"run_dir must hold a journal of autoprune, but {path} {problem}")
