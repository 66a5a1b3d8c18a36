"""Process that workers of a pool are forked from, seen by the search."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprune.execution.shipping import Parcel

log = logging.getLogger(__name__)

READY = "ready"
"""Message of a worker whose evaluator is prepared, with the number of its process."""

LAUNCH, REAP, END = "launch", "reap", "end"
"""Requests: start a worker on the connection that follows; wait for its end; end all workers."""

_STOP_SECONDS = 2.0
_PROGRAM = "autoprune.execution.pool_worker"


class Source:
    """Starts the program of a pool, which prepares once and forks workers; see there.

    Args:
        parcel: Evaluator and context.
        threads: PyTorch threads of each worker.
    """

    def __init__(self, parcel: Parcel, threads: int) -> None:
        self._connection, theirs = Pipe()
        descriptors = (theirs.fileno(), parcel.file.fileno())
        one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # a process of several cannot be forked
        self._process = subprocess.Popen(
            [sys.executable, "-m", _PROGRAM, *map(str, descriptors)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **one, "PYTHONPATH": _path()},
        )
        theirs.close()  # so that the death of the process shows here
        self._say((list(sys.path), parcel.pickled, threads))

    @property
    def pid(self) -> int:
        """Number of the process by the system."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while it can start workers."""
        return self._process.poll() is None

    def launched(self, number: int) -> Connection[Any, Any]:
        """Start a worker as soon as all is prepared; return the connection to it, at whose end its death shows."""
        ours, theirs = Pipe()
        self._say((LAUNCH, number))
        try:
            send_handle(self._connection, theirs.fileno(), self._process.pid)
        except OSError as error:
            log.debug("no worker can be started: %s", error)
        theirs.close()
        return ours

    def exit_code(self, number: int) -> int | None:
        """Wait for the end of a worker; None where it is not known, because this process has ended as well."""
        self._say((REAP, number))
        try:
            code: int = self._connection.recv()
        except (EOFError, OSError):
            self._process.wait()
            return None
        return code

    def stop(self) -> None:
        """End it and its workers."""
        self._say((END, 0))
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:  # it still prepares
            self._process.kill()
            self._process.wait()
        self._connection.close()

    def _say(self, message: object) -> None:
        """Send a message; that the process is gone shows when an answer is read."""
        try:
            self._connection.send(message)
        except OSError as error:
            log.debug("the process that starts workers takes no message: %s", error)


def _path() -> str:
    """Path by which a new process finds this package, with what it would find anyway."""
    found = [path for path in sys.path if path]
    return os.pathsep.join(dict.fromkeys(found))
