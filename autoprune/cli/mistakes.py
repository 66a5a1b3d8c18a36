"""Mistakes of the user, told in one line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from autoprune.errors import AutopruneError, DataError


@contextmanager
def errors_on_one_line(debug: bool) -> Iterator[None]:
    """Turn mistakes of the user into one line and exit code 2; bugs, ours or the user's, keep their traceback."""
    try:
        yield
    except (AutopruneError, ValueError, OSError, ImportError) as error:
        if debug or not (isinstance(error, AutopruneError) or _raised_by_autoprune(error)):
            raise
        typer.echo(f"error: {' '.join(str(error).split())}{_way_out(error)}", err=True)
        raise typer.Exit(2) from None


def _way_out(error: BaseException) -> str:
    """Option of the command line that helps, for errors of parts that do not know of it."""
    from autoprune.search_spaces.registry import UnknownSpaceError

    if isinstance(error, DataError) and error.__cause__ is not None:
        return " (--debug shows where)"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UnknownSpaceError):
            return " (from a shell: --import FILE.py, or --import package.module)"
        cause = cause.__cause__
    return ""


def _raised_by_autoprune(error: BaseException) -> bool:
    """Return whether autoprune raised an error, directly or in the standard library, and not the user's code."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    tops = [name.partition(".")[0] for name in modules]
    return [top for top in tops if top not in sys.stdlib_module_names][-1] == "autoprune"
