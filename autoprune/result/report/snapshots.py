"""Snapshots of a journal for viewers: read again when the file changed, however many look at it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

from autoprune.errors import FileFormatError
from autoprune.files.access import brief
from autoprune.journal.sqlite_file import FILE_NAME, is_written
from autoprune.result.report.data import data_of
from autoprune.result.report.packing import as_json
from autoprune.result.report.page import assembled
from autoprune.result.saving import RESULT
from autoprune.result.search_result import SearchResult

RUNNING, ENDED, KILLED, LOCKED, LOST = "running", "ended", "killed", "locked", "lost"
LOOK_SECONDS = 1.0
_SHARE = 4  # of the time, reading a long journal takes at most one part in this many
_SLOW_SECONDS = 3.0  # after which a read that has not come back waits for a lock
_LOOKS_ALONE = 3  # at a journal that no search holds, until its search counts as killed

Signature = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Snapshot:
    """State of a run at one moment.

    Attributes:
        result: As read from the journal.
        data: The parts of the report as JSON.
        version: Changes with the data; quoted, as in the header ``ETag``.
        kind: One of the kinds of this module.
        state: The same in words.
        read: Time of the day when it was read.
    """

    result: SearchResult = field(repr=False)
    data: bytes = field(repr=False)
    version: str
    kind: str
    state: str
    read: str

    def page(self) -> bytes:
        """Page with this data, which asks for newer one."""
        return assembled(self.result, json.loads(self.data), live="data").encode("utf-8")


@final
class Snapshots:
    """Reads a journal in a thread of its own; see `Snapshot`.

    Args:
        run_dir: The folder.
        model: ``FILE.py:NAME`` in the build command.
    """

    def __init__(self, run_dir: Path, model: str | None = None) -> None:
        self._folder = run_dir
        self._journal = run_dir / FILE_NAME
        self._model = model
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="journal", daemon=True)
        self._alone = 0
        self._began: float | None = None  # of a read that has not come back
        self._seen = self._signature()
        self._last = self._read()

    def start(self) -> None:
        """Begin to follow the journal."""
        self._thread.start()

    def close(self) -> None:
        """Stop following; a read that waits for a lock is left behind."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * LOOK_SECONDS)

    def now(self) -> Snapshot:
        """Return the last snapshot, with the state as it is now."""
        last, began = self._last, self._began
        if began is not None and time.monotonic() - began > _SLOW_SECONDS:
            told = f"another program holds a lock on the journal; this is the state of {last.read}"
            return replace(last, kind=LOCKED, state=told)
        return last

    def _follow(self) -> None:
        while not self._ended.is_set():
            started = time.monotonic()
            self._look()
            self._ended.wait(max(LOOK_SECONDS, (_SHARE - 1) * (time.monotonic() - started)))

    def _look(self) -> None:
        """Read again what changed; what cannot be read leaves the last snapshot, with the reason."""
        seen = self._signature()
        self._alone = 0 if is_written(self._journal) else self._alone + 1
        try:
            if seen != self._seen:
                self._began = time.monotonic()
                self._last = self._read()
                self._seen = seen
            else:
                kind, state = self._state(self._last.result, self._last.read)
                self._last = replace(self._last, kind=kind, state=state)
        except (OSError, FileFormatError) as error:
            locked = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            told = f"{brief(error)}; this is the state of {self._last.read}"
            self._last = replace(self._last, kind=LOCKED if locked else LOST, state=told)
        finally:
            self._began = None

    def _signature(self) -> Signature:
        """Times and sizes of the files that a search writes; of those that are missing, zeros."""
        found = []
        for path in (self._journal, self._journal.with_name(f"{FILE_NAME}-wal")):
            try:
                now = path.stat()
                found.append((now.st_mtime_ns, now.st_size))
            except OSError:
                found.append((0, 0))
        return tuple(found)

    def _read(self) -> Snapshot:
        result = SearchResult.from_journal(self._folder)
        data = as_json(data_of(result, model=self._model).to_json()).encode("ascii")
        read = time.strftime("%H:%M:%S")
        kind, state = self._state(result, read)
        return Snapshot(result, data, f'"{hashlib.sha256(data).hexdigest()[:16]}"', kind, state, read)

    def _state(self, result: SearchResult, read: str) -> tuple[str, str]:
        """Kind and words: what became of the search."""
        done = sum(trial.status != "pending" for trial in result.trials)
        if is_written(self._journal) or self._alone < _LOOKS_ALONE:
            return RUNNING, f"the search is running: {done} trials finished, read at {read}"
        if (self._folder / RESULT).exists():
            return ENDED, "the search has ended and was saved: autoprune report writes the page of its result"
        if result.stopped != "unfinished":
            return ENDED, f"the search has ended, with {done} trials"
        return KILLED, f"no search is writing the journal any more: it was killed after {done} trials; resume it"
