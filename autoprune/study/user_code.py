"""Digests of user code: compiled code of a function, the values that it refers to, and its settings.

The digest covers compiled code, so that comments, names of files and line numbers do not matter, and the values that it
refers to: other functions of the user's, numbers, text and tensors. Lists, dictionaries and variables that the code
itself assigns are left out, because counters and logs of calls live there. Functions of installed packages count by
their name.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
from torch import Tensor, nn

from autoprune.data.subsets import fingerprint

PLAIN = (bool, int, float, complex, str, bytes, type(None))
_ASSIGNS = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"}


def digest_of(value: Any) -> str:
    """Compute a short digest of a function, a callable or a plain setting; equal in every process of one Python."""
    described = json.dumps(_described(value, []), default=str)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def forward_of(model: nn.Module) -> str:
    """Compute a digest of the forwards of a model's classes that are the user's, and of the methods that they call."""
    found: dict[str, Any] = {}
    for module in model.modules():
        kind = type(module)
        if "forward" in vars(module):  # set on the instance
            found[f"{kind.__qualname__}.forward"] = _described(vars(module)["forward"], [])
        if not _installed(kind.__module__):
            found[kind.__qualname__] = _methods(kind, ("forward",), [])
    return hashlib.sha256(json.dumps(found, default=str, sort_keys=True).encode()).hexdigest()[:16]


def settings_of(value: Any) -> dict[str, str]:
    """Settings of an object of autoprune, by name: plain ones as text, others as digests; memory sizes are left out."""
    found = {}
    for name, setting in vars(value).items():
        if not name.endswith("bytes"):  # memory sizes change no score
            own = setting if isinstance(setting, PLAIN) else None
            found[name.lstrip("_")] = repr(own) if own is not None or setting is None else digest_of(setting)
    return found


def _described(value: Any, seen: list[int]) -> Any:
    """Describe a value, JSON-ready; `seen` are the objects that it is part of."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Tensor | np.ndarray):
        return _values(value)
    if id(value) in seen or len(seen) > 32:
        return "again"
    seen = [*seen, id(value)]
    if isinstance(value, partial):
        return [_described(part, seen) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, MethodType):
        return [_described(value.__func__, seen), _described(value.__self__, seen)]
    if isinstance(value, FunctionType):
        return _function(value, seen)
    if isinstance(value, type):
        return _class(value, seen)
    if isinstance(value, Mapping):
        return {str(key): _described(entry, seen) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_described(entry, seen) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_described(entry, seen), default=str) for entry in value)
    return _object(value, seen)


def _values(value: Tensor | np.ndarray[Any, Any]) -> str:
    if isinstance(value, Tensor):
        return fingerprint(value.detach())
    return f"{value.dtype}{value.shape}{hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"


def _function(function: FunctionType, seen: list[int]) -> Any:
    if _installed(function.__module__):
        return f"{function.__module__}.{function.__qualname__}"
    code = function.__code__
    closure = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    cells = {name: cell.cell_contents for name, cell in closure.items() if _is_set(cell)}
    known = {name: function.__globals__[name] for name in _names(code) if name in function.__globals__}
    assigned = _assigned(code)
    referred = {name: thing for name, thing in {**known, **cells}.items() if name not in assigned and _lasts(thing)}
    return [
        _code(code),
        _described(function.__defaults__, seen),
        _described(function.__kwdefaults__, seen),
        {name: _described(thing, seen) for name, thing in sorted(referred.items())},
    ]


def _is_set(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # not assigned yet
        return False
    return True


def _lasts(value: Any) -> bool:
    """Return whether a value is of a kind that defines a function, and not one that holds counters."""
    if isinstance(value, tuple):
        return all(map(_lasts, value))
    return isinstance(value, (*PLAIN, Tensor, np.ndarray, FunctionType, MethodType, partial, type, nn.Module))


def _code(code: CodeType) -> Any:
    """Describe compiled code, without its position and docstring."""
    constants = code.co_consts[1:] if code.co_consts and isinstance(code.co_consts[0], str) else code.co_consts
    return [
        code.co_code.hex(),
        code.co_names,
        code.co_varnames,
        [_code(each) if isinstance(each, CodeType) else _constant(each) for each in constants],
    ]


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _inner(constant)


def _names(code: CodeType) -> set[str]:
    return {name for each in _inner(code) for name in each.co_names}


def _assigned(code: CodeType) -> set[str]:
    """Globals and variables of enclosing functions that the code assigns."""
    steps = (step for each in _inner(code) for step in dis.get_instructions(each))
    return {str(step.argval) for step in steps if step.opname in _ASSIGNS}


def _class(kind: type, seen: list[int]) -> Any:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if _installed(kind.__module__):
        return name
    return [name, _methods(kind, tuple(key for key, value in vars(kind).items() if _plain(value)), seen)]


def _methods(kind: type, names: tuple[str, ...], seen: list[int]) -> dict[str, Any]:
    """Methods of a class by name, and those that they call."""
    found: dict[str, Any] = {}
    left = list(names)
    while left:
        name = left.pop()
        method = _plain(inspect.getattr_static(kind, name, None))
        if name not in found and method is not None and not _installed(method.__module__):
            found[name] = _function(method, [*seen, id(kind)])
            left += [called for called in _names(method.__code__) if called not in found]
    return dict(sorted(found.items()))


def _plain(value: Any) -> FunctionType | None:
    """The function behind a method, a property, a class method or a static one."""
    inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return inner if isinstance(inner, FunctionType) else None


def _object(value: Any, seen: list[int]) -> Any:
    """Describe an object by its class and its plain attributes; a module with its weights."""
    kind = _class(type(value), seen)
    if isinstance(value, nn.Module):
        plain = {name: repr(each) for name, each in sorted(vars(value).items()) if isinstance(each, PLAIN)}
        return [kind, plain, fingerprint(value.state_dict())]
    if inspect.isbuiltin(value) or inspect.isroutine(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
    held = {name: each for name, each in sorted(getattr(value, "__dict__", {}).items()) if _lasts(each)}
    return [kind, {name: _described(each, seen) for name, each in held.items()}]


def _installed(module: str | None) -> bool:
    """Return whether a module belongs to Python or an installed package, and so changes only with its version."""
    if module is None or module.partition(".")[0] in ("torch", "autoprune", "builtins"):
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return module in sys.builtin_module_names
    parts = Path(file).parts
    return "site-packages" in parts or "dist-packages" in parts or file.startswith(sysconfig.get_paths()["stdlib"])
