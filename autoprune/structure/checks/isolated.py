"""Isolated call of a function in a separate process, which may be killed; the process never outlives the call."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

# The path of modules comes first: the pickles after it may need modules of the user's.
_CHILD = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from autoprune.structure.checks.isolated import answer; answer()"
)


class ProcessDiedError(Exception):
    """The process ended without an answer."""


def call_alone(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function in a new Python process, with arguments and result as pickles through pipes.

    Output of the function goes to standard error. With pipes and one process that is waited for, nothing outlives the
    call; pools of processes keep a tracker of resources and a pipe to it until this process ends.

    Raises:
        ProcessDiedError: If the process was killed, or ended itself.
        Exception: The error that the function raised.
    """
    import cloudpickle  # it pickles functions and classes of the main script by value

    task = pickle.dumps(sys.path) + cloudpickle.dumps((function, args, kwargs))
    child = [sys.executable, "-c", _CHILD]
    with subprocess.Popen(child, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            answered, _ = process.communicate(task)
        except BaseException:  # raised again: Ctrl-C must not leave it running
            process.kill()
            raise
    if process.returncode or not answered:
        raise ProcessDiedError(f"it ended with code {process.returncode}")
    found, error = pickle.loads(answered)
    if error is not None:
        raise error
    result: T = found
    return result


def answer() -> None:
    """Answer the request of `call_alone` in the child process."""
    import cloudpickle

    function, args, kwargs = pickle.load(sys.stdin.buffer)
    pipe = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        told = cloudpickle.dumps((function(*args, **kwargs), None))
    except Exception as error:  # the caller raises it
        told = _pickled(error)
    with os.fdopen(pipe, "wb") as out:
        out.write(told)


def _pickled(error: Exception) -> bytes:
    import cloudpickle

    error.__traceback__ = None
    try:
        told: bytes = cloudpickle.dumps((None, error))
        pickle.loads(told)
    except Exception:  # a class that cannot be rebuilt from its arguments
        told = cloudpickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
    return told
