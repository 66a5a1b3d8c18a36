"""Plain arguments: check numbers and flags, and put values and errors into words for messages."""

from __future__ import annotations

import difflib
import inspect
import math
import operator
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
from torch import Tensor, nn

T = TypeVar("T")

MOST_SHOWN = 200
"""Characters of a value in a message."""

MOST_SAID = 500
"""Characters of an error of the user's code that are kept."""

MOST_SEED = 2**63 - 1
"""Largest seed that the generators of PyTorch take."""

_ENTRIES = 8  # of a container
_FEW = 16  # elements of an array that is shown as it is


def shown(value: Any) -> str:
    """Put a value into a message: at most 200 characters on one line; tensors and arrays by type and shape."""
    text = " ".join(_shown(value, 0).split())
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


def _shown(value: Any, depth: int) -> str:
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.size > _FEW):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return f"a module {type(value).__name__}"
    if type(value) in (list, tuple, dict, set) and value and depth < 2:
        return _entries(value, depth)
    try:
        return repr(value)
    except Exception:  # a user's class may raise anything here, and there must be a message
        return f"an object of type {type(value).__name__}"


def _entries(values: Any, depth: int) -> str:
    """The first entries of a plain container in its own brackets."""
    if isinstance(values, Mapping):
        parts = [f"{_shown(k, depth + 1)}: {_shown(v, depth + 1)}" for k, v in list(values.items())[:_ENTRIES]]
    else:
        parts = [_shown(value, depth + 1) for value in list(values)[:_ENTRIES]]
    parts += [f"... ({len(values)} in all)"] if len(values) > _ENTRIES else []
    if isinstance(values, tuple):
        return f"({', '.join(parts)}{',' * (len(values) == 1)})"
    return f"[{', '.join(parts)}]" if isinstance(values, list) else f"{{{', '.join(parts)}}}"


def said(error: BaseException) -> str:
    """Type and message of an error that a user's code raised, shortened where they are long."""
    try:
        message = str(error)
    except Exception:  # even this may be the user's code
        message = "(its message cannot be read)"
    text = f"{type(error).__name__}: {message}"
    return text if len(text) <= MOST_SAID else f"{text[: MOST_SAID - 3]}..."


def whole_number(name: str, value: Any, least: int, most: int | None = None, why: str = "") -> int:
    """Check an integer, which may come from NumPy, but not from a bool or a float.

    Args:
        name: The argument.
        value: What was given.
        least: The smallest allowed.
        most: The largest allowed, if any.
        why: Text after the rule.

    Raises:
        ValueError: If it is none, or out of range.
    """
    if not is_whole(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}{why}, got {shown(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be an integer of at most {most}{why}, got {shown(value)}")
    return operator.index(value)


def is_whole(value: Any) -> bool:
    """Return whether a value is an integer of Python or NumPy; no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite real number of Python or NumPy; no bool."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    try:
        return real and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def positive(name: str, value: Any, or_else: str = "") -> float:
    """Check a finite number above 0.

    Args:
        name: The argument.
        value: What was given.
        or_else: Other values allowed, such as ``" or None"``, for the message.

    Raises:
        ValueError: If it is none, or not above 0.
    """
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name} must be positive{or_else}, got {shown(value)}")
    return float(value)


def one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """Check that a value is one of the known words.

    Raises:
        ValueError: If it is anything else; lists those known.
    """
    words = list(known)
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name} must be one of {words}, got {shown(value)}")
    return value


def numbers(values: Any) -> list[float]:
    """Finite real numbers of a list, a tuple or an array; empty if it holds anything else, or is a generator."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Collection):
        return []
    found = list(values)
    return found if all(map(is_number, found)) else []


def patterns(name: str, values: Any) -> tuple[str, ...]:
    """Check a list of names or globs.

    Raises:
        ValueError: If it is text, holds anything else than text, or is no list, such as a generator, which can only be
            read once.
    """
    if isinstance(values, str):
        raise ValueError(f"{name} must be a list of names or globs, got the string {shown(values)}")
    if not isinstance(values, Collection) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} must be a list of names or globs, got {shown(values)}")
    return tuple(values)


def number(name: str, value: Any, least: float, rule: str) -> float:
    """Check a finite number of at least `least`.

    Raises:
        ValueError: If it is none, or too small; says the `rule`, such as ``"at least 0"``.
    """
    if not is_number(value) or value < least:
        raise ValueError(f"{name} must be a number of {rule}, got {shown(value)}")
    return float(value)


def by_name(argument: str, spec: Any, known: Mapping[str, Callable[[], T]], kind: str, method: str) -> T:
    """Make the part that a name means, or take one already made.

    Args:
        argument: Name of the argument.
        spec: What was given for it.
        known: Functions that make the parts, by name.
        kind: Name of their protocol, with its article.
        method: A method that each of them has.

    Raises:
        ValueError: If it is an unknown name, or no such part.
    """
    if isinstance(spec, str) and spec in known:
        return known[spec]()
    if isinstance(spec, str | type) or not hasattr(spec, method):
        raise ValueError(f"{argument} must be one of {sorted(known)} or {kind} instance, got {shown(spec)}")
    return cast(T, spec)


def why_no_function(value: Any, arguments: int, classes: bool = False) -> str:
    """Describe a value that is no function of this number of positional arguments, for a message; empty if it is one.

    A class is none, unless `classes` are allowed. Builtins without a signature count as fitting.
    """
    if not callable(value) or (isinstance(value, type) and not classes):
        return f"got {shown(value)}"
    try:
        signature = inspect.signature(value.forward if isinstance(value, nn.Module) else value)
    except (TypeError, ValueError):  # a builtin
        return ""
    try:
        signature.bind(*range(arguments))
    except TypeError:
        return f"got {shown(value)}, which takes {signature!s:.100}"
    return ""


P = ParamSpec("P")
R = TypeVar("R")


def pointing(places: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function to say, in a TypeError, what to write for an argument that it does not take.

    Args:
        places: What to write for an argument that is part of another, by its name; for others, the most similar name.
            A function that takes any names checks them itself.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        known = list(parameters)
        any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if misplaced := [name for name in kwargs if name in places and name not in known]:
                write = ", ".join(dict.fromkeys(places[name] for name in misplaced))
                raise TypeError(f"{function.__name__}() has no argument {', '.join(misplaced)}; write {write}")
            if not any_name and (unknown := [name for name in kwargs if name not in known]):
                nearest = difflib.get_close_matches(unknown[0], known, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"it takes {', '.join(known)}"
                raise TypeError(f"{function.__name__}() has no argument {unknown[0]}; {hint}")
            return function(*args, **kwargs)

        return call

    return decorate


@contextmanager
def naming(rule: str) -> Iterator[None]:
    """Name the argument in errors of a user's function that is called inside; errors of autoprune stay as they are.

    Raises:
        ValueError: Says the `rule`, such as ``"criterion must score group '0'"``.
    """
    try:
        yield
    except Exception as error:  # whatever the user's code raises
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "autoprune":
            raise
        raise ValueError(f"{rule}, but raised {said(error)}") from error


def flag(name: str, value: Any, why: str = "") -> bool:
    """Check that a value is True or False, and no other type.

    Raises:
        ValueError: If it is neither.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False{why and f', {why}'}, got {shown(value)}")
    return bool(value)


def require_storage(given: Any) -> Any:
    """Check that a value may be a storage of Optuna, which the start of a search then opens.

    Raises:
        TypeError: If it is neither an object with the methods of one nor text.
        ValueError: If it is empty text.
    """
    rule = "storage must be an Optuna storage, its URL such as 'sqlite:///runs/optuna.db', or None"
    if not isinstance(given, str | None) and (isinstance(given, type) or not hasattr(given, "get_all_studies")):
        raise TypeError(f"{rule}, got {shown(given)}")
    if given == "":
        raise ValueError(f"{rule}, got ''")
    return given
