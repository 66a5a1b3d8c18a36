"""Time limit of an analysis: every slow step in it checks the limit between operations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class _Limit:
    until: float
    doing: str = "it began"


class _OverError(BaseException):
    """Raised when the time is over; no ``except Exception`` around the user's code catches it."""


_limit: ContextVar[_Limit | None] = ContextVar("limit", default=None)


@contextmanager
def limited(until: float | None) -> Iterator[None]:
    """Limit the code inside to end by `until`, by `time.monotonic`; None for no limit.

    Raises:
        TimeoutError: If it takes longer; names the step that was running.
    """
    limit = None if until is None else _Limit(until)
    token = _limit.set(limit)
    try:
        yield
    except _OverError:
        raise TimeoutError(f"time was over while {limit.doing if limit else ''}") from None
    finally:
        _limit.reset(token)


def doing(what: str) -> None:
    """Name the step that runs from now on, such as ``"the checks ran"``."""
    limit = _limit.get()
    if limit is not None:
        limit.doing = what
    look()


def look() -> None:
    """Check that there is time left."""
    limit = _limit.get()
    if limit is not None and time.monotonic() > limit.until:
        raise _OverError
