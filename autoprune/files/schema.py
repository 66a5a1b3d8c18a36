"""Schema of parsed JSON, stated as data and checked before anything relies on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Form = Any
"""Form of a value:

- ``bool``, ``int`` (no bool), ``float`` (any finite number), ``str``, ``None``, or ``object`` for anything;
- ``[form]``, a list of it; ``{str: form}``, an object with any keys;
- ``{"key": form, "key?": form}``, an object with these keys, of which those with a question mark may be missing;
- ``(form, form)``, either; ``frozenset`` of texts, one of them.
"""

_NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", None: "null"}
_SHOWN = 60
_MOST = 2.0**1023


def require_form(value: Any, form: Form, at: str = "it") -> None:
    """Check the form of a value.

    Args:
        value: The parsed value.
        form: The form required.
        at: Its place, for messages.

    Raises:
        ValueError: Names the first place that differs, with the value there.
    """
    if isinstance(form, list):
        _require_list(value, form[0], at)
    elif isinstance(form, dict):
        _require_object(value, form, at)
    elif isinstance(form, tuple):
        if not any(_fits(value, each) for each in form):
            _refuse(value, " or ".join(map(_name_of, form)), at)
    elif isinstance(form, frozenset):
        if not (isinstance(value, str) and value in form):
            _refuse(value, f"one of {sorted(form)}", at)
    elif not _is(value, form):
        _refuse(value, _NAMES[form], at)


def _require_list(value: Any, form: Form, at: str) -> None:
    if not isinstance(value, list):
        _refuse(value, "a list", at)
    if form is int and all(type(each) is int for each in value):  # some files are mostly long lists of numbers
        return
    for i, each in enumerate(value):
        require_form(each, form, f"{at}[{i}]")


def _require_object(value: Any, form: dict[Any, Form], at: str) -> None:
    if not isinstance(value, Mapping):
        _refuse(value, "an object", at)
    if str in form:
        for key, each in value.items():
            require_form(each, form[str], f"{at}[{key!r:.{_SHOWN}}]")
        return
    for name, each in form.items():
        key = name.removesuffix("?")
        if key in value:
            require_form(value[key], each, f"{at}.{key}" if at != "it" else key)
        elif key == name:
            raise ValueError(f"{key!r} is missing" + ("" if at == "it" else f" in {at}"))


def _fits(value: Any, form: Form) -> bool:
    try:
        require_form(value, form)
    except ValueError:
        return False
    return True


def _is(value: Any, form: Form) -> bool:
    if form is object:
        return True
    if form is None:
        return value is None
    if form is float:
        return type(value) in (int, float) and abs(value) < _MOST  # NaN is not
    return type(value) is form


def _name_of(form: Form) -> str:
    if isinstance(form, list):
        return "a list"
    return "an object" if isinstance(form, dict) else _NAMES.get(form, "another form")


def _refuse(value: Any, expected: str, at: str) -> None:
    raise ValueError(f"{at} must be {expected}, got {repr(value)[:_SHOWN]}")
