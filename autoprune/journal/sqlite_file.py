"""File of a journal: its schema, and functions to make, open, lock and check it."""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import IO, TypeVar

from autoprune.errors import FileFormatError
from autoprune.files.access import brief, shortened

log = logging.getLogger(__name__)
T = TypeVar("T")

try:
    import fcntl
except ImportError:  # Windows, where two searches with one run_dir are not told apart
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

FILE_NAME = "journal.sqlite"
LOCK_NAME = "journal.lock"
APPLICATION_ID = int.from_bytes(b"aupr")
SCHEMA_VERSION = 2
BUSY_SECONDS = 1.0
"""Seconds that SQLite itself waits for a lock, during which Ctrl-C must wait too."""
MOST_BUSY_SECONDS = 600.0
"""Seconds to wait in total for a lock of another program."""
_TRIES, _WAIT_SECONDS = 20, 0.05
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
    """Make the tables, and fill the one with the identity of the run."""
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
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS)
    try:
        with explaining_failures(path):
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
                patiently(partial(connection.execute, f"PRAGMA {pragma}"), path)
    except BaseException:  # raised again: nothing is left open
        connection.close()
        raise
    return connection


def patiently(action: Callable[[], T], path: str | Path, most_seconds: float = MOST_BUSY_SECONDS) -> T:
    """Repeat an action until no other program holds a lock on the file, and log that it waits.

    Raises:
        OSError: If the lock is still held after `most_seconds`.
    """
    began = time.monotonic()
    told = False
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
            waited = time.monotonic() - began
            if waited > most_seconds:
                raise OSError(
                    f"run_dir must not be locked, but another program has held a lock on {shortened(path)} for "
                    f"{waited:.0f} s; end that program, then go on with resume=True"
                ) from error
        if not told:
            log.warning("another program holds a lock on %s; waiting until it lets go", path)
            told = True
        time.sleep(_WAIT_SECONDS)


@contextmanager
def explaining_failures(path: str | Path) -> Iterator[None]:
    """Name the file that could not be written, and say that its contents are safe."""
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
    """Make the folder of a new file and lock it, so that two searches can never share one.

    Raises:
        FileExistsError: If there is such a file, or the folder is a file.
        BlockingIOError: If another search holds the lock.
        OSError: If the folder cannot be written.
    """
    run_dir = path.parent
    try:
        with writable(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(path):
                raise FileExistsError
            lock = acquire(path)
            if os.path.lexists(path):  # again: the search that held the lock may have made it
                lock.close()
                raise FileExistsError
            return lock
    except FileExistsError as error:
        raise _taken(run_dir) from error


def require_free(run_dir: str | Path, resume: bool) -> None:
    """Refuse a file, and a folder that holds a journal unless it is to be resumed, before anything is measured.

    Raises:
        FileExistsError: If `run_dir` is one.
    """
    folder = Path(run_dir)
    if (folder.exists() and not folder.is_dir()) or (not resume and (folder / FILE_NAME).exists()):
        raise _taken(folder)


def _taken(run_dir: Path) -> FileExistsError:
    rule = f"already holds a {FILE_NAME}" if run_dir.is_dir() else "is a file"
    return FileExistsError(
        f"run_dir must be a folder of its own, but {run_dir} {rule}; pass another run_dir, or resume=True to go on "
        "with the search in it"
    )


@contextmanager
def writable(run_dir: Path) -> Iterator[None]:
    """Name the folder that could not be written."""
    try:
        yield
    except (FileExistsError, BlockingIOError):
        raise
    except OSError as error:
        raise type(error)(
            f"run_dir must be a folder that can be written, got {run_dir} ({error.strerror}); pass another run_dir"
        ) from error


def acquire(path: Path) -> IO[bytes]:
    """Lock the folder of a file until the returned lock is closed.

    Raises:
        BlockingIOError: If another search holds the lock.
        FileExistsError: If the name of the lock belongs to something other than a file.
    """
    name = path.with_name(LOCK_NAME)
    if name.exists() and not name.is_file():
        raise FileExistsError
    for _ in range(_TRIES):  # a reader holds it for an instant, to check whether a search does
        lock = name.open("ab")
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fcntl is None or _is_open(lock, name):
                return lock
        except BlockingIOError:
            pass
        lock.close()
        time.sleep(_WAIT_SECONDS)
    raise BlockingIOError(
        f"run_dir must not be in use, but another search is writing to {path.parent}; wait until it ends, stop it, "
        "or pass another run_dir"
    )


def _is_open(lock: IO[bytes], name: Path) -> bool:
    """Return whether a lock belongs to the file that has the name now: its folder may have been made again."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), name.stat())
    except FileNotFoundError:
        return False


def is_written(path: Path) -> bool:
    """Return whether a search is writing the file now."""
    name = path.with_name(LOCK_NAME)
    if fcntl is None:
        return True
    try:
        if not name.is_file():
            return False
        with name.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # another user's: writes meanwhile show as damage, and the file is read again
        return False
    return False


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Check for a complete journal of this version, before any of its definitions is run.

    Raises:
        FileFormatError: If it is corrupted, of another program, or of another version.
    """
    try:
        connection.execute("PRAGMA trusted_schema=OFF")
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        problem = _problem(application, version, set(connection.execute("SELECT type, name, sql FROM sqlite_master")))
        # Only once the tables are known to be ours: this check evaluates their definitions.
        if not problem and (state := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            problem = f"cannot be read: {state}"
    except (sqlite3.Error, ValueError) as error:  # such as invalid UTF-8 in a definition or a message
        problem = f"cannot be read: {brief(error)}"
    if problem:
        raise FileFormatError(
            f"run_dir must hold a journal of autoprune, but {shortened(path)} {problem}; name another run_dir"
        )


def _problem(application: int, version: int, found: Set[tuple[str, str, str]]) -> str:
    if application != APPLICATION_ID:
        return "is an SQLite file of another program"
    if version != SCHEMA_VERSION:
        return f"has schema {version}, and this autoprune reads schema {SCHEMA_VERSION}: use the version that wrote it"
    for kind, name, _ in sorted(found - _expected(), key=str):
        return f"has another {kind} {name!r:.60} than a journal has: drop what was added to it"
    for kind, name, _ in sorted(_expected() - found, key=str):
        return f"lacks the {kind} {name!r}"
    return ""


@cache
def _expected() -> frozenset[tuple[str, str, str]]:
    """Tables and indices of a journal, as SQLite lists them."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(SCHEMA)
        return frozenset(connection.execute("SELECT type, name, sql FROM sqlite_master"))
    finally:
        connection.close()
