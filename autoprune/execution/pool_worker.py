"""Program of a pool: ``python -m autoprune.execution.pool_worker CONNECTION FILE``, numbers of open descriptors.

It imports, unpickles and prepares once, and forks a worker whenever it is asked to: all of that is in memory once, and
a worker adds the pages that it writes to. A program of its own, so that a script that searches needs no guard of its
main module: nothing of it runs again here.

A process is forked only while it has one thread, since locks of others would stay locked for ever, and only on Linux,
because libraries of other systems do not survive it. Else each worker is started as a program, and prepares itself.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any, NamedTuple

from autoprune.execution.pool_source import END, LAUNCH, READY, REAP

_ALONE = "alone"  # argument of a worker that was not forked
_PR_SET_PDEATHSIG = 1


class _Given(NamedTuple):
    """First message of the search."""

    path: list[str]
    pickled: bytes
    threads: int


class _Parts:
    """Evaluator and context, prepared here or still to be prepared by a worker.

    Attributes:
        reason: Why they cannot be had, in plain words; empty if they can.
    """

    def __init__(self, given: _Given, file: int) -> None:
        sys.path[:] = given.path
        import torch

        from autoprune.arguments import said
        from autoprune.execution.shipping import opened

        torch.set_num_threads(1)  # further threads would not survive a fork
        self.reason = ""
        self._threads, self._prepared = given.threads, False
        try:
            self.evaluator, self.context = opened(given.pickled, os.dup(file))
        except Exception as error:  # whatever a user's object raises here is told where the search runs
            self.reason = said(error)

    def prepare(self, threads: int) -> None:
        """Prepare the evaluator with a number of PyTorch's threads, once."""
        import torch

        from autoprune.arguments import said
        from autoprune.evaluators.scoring.untouched import Untouched

        torch.set_num_threads(threads)
        if self.reason or self._prepared:
            return
        try:
            self.untouched = Untouched(self.context.model, self.evaluator)
            self.evaluator.prepare(self.context)
            self._prepared = True
        except Exception as error:  # as above
            self.reason = said(error)

    def prepare_for_all(self) -> None:
        """Prepare what all workers may share; the evaluator only if its `prepare` is known to start nothing."""
        from autoprune.evaluators.scoring.untouched import is_ours
        from autoprune.imports import import_late_ones

        import_late_ones()
        if not self.reason and self._threads == 1 and is_ours(self.evaluator):
            self.prepare(1)
        gc.collect()
        gc.freeze()  # a collection would write to all objects, which copies their pages

    def work(self, connection: Connection[Any, Any]) -> None:
        """Score candidates until the other end is gone."""
        self.prepare(self._threads)
        if self.reason:
            connection.send(self.reason)
            return
        connection.send((READY, os.getpid()))
        for candidate, race in _tasks(connection):
            outcome = self._outcome(candidate, race)
            _flush()  # what a user's parts have printed: a worker may be killed from here on
            connection.send(outcome)

    def _outcome(self, candidate: Any, race: Any) -> Any:
        """Score one candidate, shape (d,)."""
        from autoprune.evaluators import Orders, Rests
        from autoprune.execution.local import evaluate_one
        from autoprune.protocols import Failure

        if isinstance(self.evaluator, Orders):
            self.evaluator.order(candidate[None])  # the evaluator counts shared prefixes to know which to cache
        outcome = evaluate_one(self.evaluator, candidate, race)
        if isinstance(self.evaluator, Rests):
            self.evaluator.rest()
        try:
            self.untouched.require()
        except ValueError as error:
            return Failure(str(error), outcome.seconds)
        return outcome


def _tasks(connection: Connection[Any, Any]) -> Iterator[Any]:
    while (task := connection.recv()) is not None:
        yield task


class _Workers:
    """Workers that this process has started, by the keys of the search."""

    def __init__(self, connection: Connection[Any, Any], given: _Given, file: int) -> None:
        self._connection, self._given, self._file = connection, given, file
        self._started: dict[int, int] = {}
        self._parts: _Parts | None = None
        if sys.platform == "linux":
            self._parts = _Parts(given, file)
            self._parts.prepare_for_all()

    def serve(self) -> None:
        """Answer requests until the search ends, or is gone."""
        while (request := self._connection.recv())[0] != END:
            kind, key = request
            if kind == LAUNCH:
                handle = recv_handle(self._connection)
                may_fork = self._parts is not None and len(os.listdir("/proc/self/task")) == 1
                self._started[key] = self._forked(handle) if may_fork else self._program(handle)
                os.close(handle)
            elif kind == REAP:
                self._connection.send(_ended(self._started.pop(key)))

    def _forked(self, handle: int) -> int:
        """Fork a worker; return its number."""
        parent = os.getpid()
        _flush()  # else each worker would print it again
        if number := os.fork():
            return number
        assert self._parts is not None
        try:
            _die_with(parent)
            self._connection.close()  # so that the end of this process shows at the other end
            self._parts.work(Connection(handle))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the search is over
        except BaseException:  # nothing else may run twice
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)

    def _program(self, handle: int) -> int:
        """Start a worker as a program; return its number."""
        threads = str(self._given.threads)
        process = subprocess.Popen(
            [sys.executable, "-m", "autoprune.execution.pool_worker", str(handle), str(self._file), _ALONE],
            pass_fds=(handle, self._file),
            stdin=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
        assert process.stdin is not None
        try:
            pickle.dump((tuple(self._given), os.getpid()), process.stdin)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended, which shows at the other end
        process.returncode = 0  # `_ended` asks for it
        return process.pid

    def end(self) -> None:
        """End the workers, and wait until they are gone."""
        for number in self._started.values():
            os.kill(number, signal.SIGKILL)
        for number in self._started.values():
            _ended(number)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _ended(number: int) -> int:
    """Wait for the end of a process; return its exit code, or the negative number of the signal that ended it."""
    os.kill(number, signal.SIGKILL)  # changes nothing where it ends already
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def _die_with(parent: int) -> None:
    """End this process when another, its parent, ends in any way; only on Linux."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def main() -> None:
    """Serve until the other end closes: nothing is left running when the search ends in any way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the search decides
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    file = int(sys.argv[2])
    workers = None
    try:
        if sys.argv[3:] == [_ALONE]:
            given, parent = pickle.load(sys.stdin.buffer)
            _die_with(parent)
            _Parts(_Given(*given), file).work(connection)
        else:
            workers = _Workers(connection, _Given(*connection.recv()), file)
            workers.serve()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the search is over
    finally:
        if workers is not None:
            workers.end()
    os._exit(0)  # threads of libraries must not keep the process


if __name__ == "__main__":
    main()
