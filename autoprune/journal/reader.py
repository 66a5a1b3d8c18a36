"""Reading of a journal: also while a search writes it, or in a folder that cannot be written; it leaves no files."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from autoprune.errors import FileFormatError
from autoprune.files.access import MIB, require_file
from autoprune.journal.sqlite_file import BUSY_SECONDS, FILE_NAME, check, is_written, patiently

MOST_BYTES = 64 * 1024 * MIB
"""Largest size of a journal."""
MOST_VALUE_BYTES = 256 * MIB
"""Largest size of a single value in it."""

_TRIES, _WAIT_SECONDS = 20, 0.1
_MOST_BUSY_SECONDS = 60.0


def open_to_read(run_dir: str | Path) -> tuple[sqlite3.Connection, ExitStack]:
    """Open a connection that cannot write, with a stack that closes it.

    SQLite's readers of a write-ahead log share memory through a file next to it, which they make and leave behind. So
    a file without a writer and with an empty log is opened as immutable, which needs none. Where a killed search left a
    log in a folder that has no such file or cannot be written, a copy is read.

    Raises:
        FileNotFoundError: If there is no journal.
        FileFormatError: If it is corrupted, no journal, or written by another version.
        OSError: If another program keeps it locked.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(f"run_dir must be the folder of an earlier search, got {run_dir}: no {FILE_NAME} there")
    require_file(path, "run_dir must hold a journal of autoprune", MOST_BYTES)
    for last in [False] * (_TRIES - 1) + [True]:
        # A search that begins makes the file first and its tables an instant later; one that another user runs may
        # write while the file is opened as immutable.
        stack = ExitStack()
        try:
            connection = _connect(path, stack)
            patiently(partial(check, connection, path), path, _MOST_BUSY_SECONDS)
            return connection, stack
        except (FileFormatError, FileNotFoundError) as error:
            stack.close()
            vanished = isinstance(error, FileNotFoundError) and path.exists()  # the log, because its writer ended
            if last or not (vanished or (path.exists() and not path.stat().st_size)):
                raise
        except BaseException:  # raised again: nothing is left open
            stack.close()
            raise
        time.sleep(_WAIT_SECONDS)
    raise AssertionError("the last try returns or raises")


def _connect(path: Path, stack: ExitStack) -> sqlite3.Connection:
    log, shared = (path.with_name(f"{path.name}-{ending}") for ending in ("wal", "shm"))
    pending = log.exists() and log.stat().st_size > 0
    begun = path.with_name(f"{path.name}-journal").exists()  # by a program that is just laying it out
    if begun or is_written(path) or (pending and shared.exists() and os.access(shared, os.W_OK)):
        options = "mode=ro"
    elif not pending:
        options = "mode=ro&immutable=1"
    else:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="autoprune-")))
        for side in (path, log):
            shutil.copyfile(require_file(side, "run_dir must hold a journal", MOST_BYTES), folder / side.name)
        path = folder / path.name
        options = "mode=rw"
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?{options}", uri=True, timeout=BUSY_SECONDS)
    stack.callback(connection.close)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_VALUE_BYTES)
    connection.execute("PRAGMA query_only=ON")
    return connection
