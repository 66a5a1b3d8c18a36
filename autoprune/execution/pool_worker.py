"""Process of a pool: ``python -m autoprune.execution.pool_worker CONNECTION FILE``, numbers of open descriptors.

A program of its own, so that a script that searches needs no guard of its main module: nothing of it runs again here.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any


def serve(connection: Connection[Any, Any], file: int) -> None:
    """Prepare the evaluator that comes first, and score candidates until there are none, or the other end is gone."""
    path, pickled, threads = connection.recv()
    sys.path[:] = path
    import torch

    from autoprune.arguments import said
    from autoprune.evaluators.scoring.untouched import Untouched
    from autoprune.execution.pool import READY
    from autoprune.execution.shipping import opened

    torch.set_num_threads(threads)
    try:
        evaluator, context = opened(pickled, file)
        untouched = Untouched(context.model, evaluator)
        evaluator.prepare(context)
    except Exception as error:  # whatever a user's object raises here is told where the search runs
        connection.send(said(error))
        return
    connection.send(READY)
    for candidate, race in _tasks(connection):
        connection.send(_outcome(evaluator, untouched, candidate, race))


def _tasks(connection: Connection[Any, Any]) -> Iterator[Any]:
    while (task := connection.recv()) is not None:
        yield task


def _outcome(evaluator: Any, untouched: Any, candidate: Any, race: Any) -> Any:
    """Score one candidate, shape (d,)."""
    from autoprune.evaluators import Orders
    from autoprune.execution.local import evaluate_one
    from autoprune.protocols import Failure

    if isinstance(evaluator, Orders):
        evaluator.order(candidate[None])  # the evaluator counts shared prefixes to know which to cache
    outcome = evaluate_one(evaluator, candidate, race)
    try:
        untouched.require()
    except ValueError as error:
        return Failure(str(error), outcome.seconds)
    return outcome


def main() -> None:
    """Serve until the other end closes: nothing is left running when the search ends in any way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the search decides
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    try:
        serve(connection, int(sys.argv[2]))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # threads of libraries must not keep the process


if __name__ == "__main__":
    main()
