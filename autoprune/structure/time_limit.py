"""How long an analysis may take: whatever takes time in it looks here between operations."""

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
    """The time is over; no ``except Exception`` around the user's code takes it for a failure of that."""


_limit: ContextVar[_Limit | None] = ContextVar("limit", default=None)


@contextmanager
def limited(until: float | None) -> Iterator[None]:
    """Do what is inside until then, by `time.monotonic`; None for as long as it takes.

    Raises:
        TimeoutError: If it takes longer; says what was being done.
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
    """Say what is being done from now on, such as ``"the checks ran"``."""
    limit = _limit.get()
    if limit is not None:
        limit.doing = what
    look()


def look() -> None:
    """Go on only while there is time."""
    limit = _limit.get()
    if limit is not None and time.monotonic() > limit.until:
        raise _OverError
