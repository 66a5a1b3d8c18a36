"""Rules for the answer to a wrong argument, and the data that calls are made with."""

import contextlib
import re
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.damaging import TooSlowError
from tests.machine import Machine

MOST_SECONDS = 10
WAITED = 12
MOST_CHARACTERS = 700
X = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)


def settled(make: Callable[[], tuple[str, str]]) -> tuple[str, str, bool]:
    """Judge a call, and return whether it was repeated because it was too slow.

    A hang comes back, and a stall of a machine that others use too does not.
    """
    fate, why = make()
    again = why.startswith(TooSlowError.__name__)
    if again:
        fate, why = make()
    return fate, why, again


def judged(message: str, words: Sequence[str], error: BaseException | None = None) -> tuple[str, str]:
    """Judge whether a message is short, holds no dump, and names one of the arguments."""
    said = f"{type(error).__name__}: {message}" if error is not None else message
    if len(message) > MOST_CHARACTERS or re.search(r"tensor\(|\[\[.*\]\]\n", message):
        return "WRONG", f"too long: {said}"
    if not any(re.search(rf"(?<![a-z])({word})", message) for word in words):
        return "WRONG", f"does not name {' or '.join(words)}: {said}"
    return "refused", said


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Leaves the current folder as it was."""
    there = {path: path.read_bytes() if path.is_file() else b"" for path in Path().iterdir()}
    try:
        yield
    finally:
        for path in set(Path().iterdir()) - there.keys():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path, content in there.items():
            if path.is_file() and path.read_bytes() != content:
                path.write_bytes(content)


@contextlib.contextmanager
def deadline() -> Iterator[None]:
    """Ends what takes longer than it may, with an error that no ``except`` of ours takes."""

    def stop(*_: Any) -> None:
        raise TooSlowError

    # The time of the processor, because others may use it too; what only waits gets much more.
    handlers = {name: signal.signal(name, stop) for name in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    signal.alarm(WAITED * MOST_SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for name, handler in handlers.items():
            signal.signal(name, handler)


def simulated_clock() -> contextlib.AbstractContextManager[object]:
    """A simulated machine in the place of the clock, so that a table takes no time."""
    machine = Machine(cold=1.3, per_pass=2e-5)
    return mock.patch("autoprune.costs.latency.profile.clock_for", return_value=machine)
