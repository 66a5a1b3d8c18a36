"""Detection of a journal file that was moved, deleted or overwritten by someone else while a search writes it."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from autoprune.journal.sqlite_file import lay_out

_MARKS = "SELECT key, value FROM meta WHERE key != 'trials' UNION ALL SELECT 'asked', asked FROM trials WHERE id = 0"


class Watch:
    """Compares a file with its state when this process last wrote it.

    Args:
        path: The file, open for writing in this process.
        connection: Connection that writes it.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._state = os.stat(path)

    def settle(self) -> None:
        """Record the state of the file after a write of this process."""
        if not self.lost():
            self._state = os.stat(self._path)

    def lost(self) -> str:
        """Describe what happened to the file; empty if it is still the one that is open here."""
        try:
            now = os.stat(self._path)
        except OSError:
            return "was deleted or moved"
        if not os.path.samestat(now, self._state):
            return "was replaced by another file"
        return ""

    def overwritten(self) -> bool:
        """Return whether someone else changed the contents of the file; a checkpoint of another program does not."""
        now = os.stat(self._path)
        before = self._state
        if (now.st_mtime_ns, now.st_size) == (before.st_mtime_ns, before.st_size):
            return False
        self._state = now
        try:
            there = sqlite3.connect(f"{self._path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
            try:
                found = dict(there.execute(_MARKS).fetchall())
            finally:
                there.close()
            own = dict(self._connection.execute(_MARKS).fetchall())
        except sqlite3.Error:
            return True
        return any(own.get(key) != value for key, value in found.items()) or ("asked" not in own and "asked" in found)


def rescued(connection: sqlite3.Connection) -> sqlite3.Connection:
    """Make a journal in memory with everything that can still be read through a connection, or an empty one."""
    memory = sqlite3.connect(":memory:")
    try:
        connection.backup(memory)
        if memory.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
            return memory
    except sqlite3.Error:
        pass  # the file is incomplete
    memory.close()
    memory = sqlite3.connect(":memory:")
    lay_out(memory, [])
    return memory
