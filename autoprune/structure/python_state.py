"""State that modules hold in Python, to tell whether a forward has left something in them."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterable
from enum import Enum
from functools import partial
from operator import is_
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.structure.rewriting.graph_module import RecordedModule


class _Plain:
    pass


class _UnknownError(Exception):
    """An object whose state cannot be read."""


_dispatch: dict[type, Any] = copy._deepcopy_dispatch  # type: ignore[attr-defined]  # not in its stubs
_ATOMS = frozenset(kind for kind, way in _dispatch.items() if way is _dispatch[int]) | {
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, ModuleType)
}
"""Types whose objects copies share, so that a copy would be no fresher."""


def python_state(model: nn.Module) -> list[Any] | None:
    """List all that the modules of a model refer to, apart from their parameters, buffers and training mode.

    Returns:
        The objects, kept alive so that no other takes their place; None where one may hold more than can be read.
    """
    found: list[Any] = []
    try:
        _walk(model, found, set())
    except (_UnknownError, RecursionError):
        return None
    return found


def same_state(one: list[Any] | None, other: list[Any] | None) -> bool:
    """Return whether two lists of `python_state` are known to describe the same state."""
    if one is None or other is None or len(one) != len(other):
        return False
    return all(map(is_, one, other)) or all(map(_same, one, other))


def _same(one: Any, other: Any) -> bool:
    """Return whether two entries are one object, or equal where copies would share them."""
    return one is other or (type(one) is type(other) and type(one) in _ATOMS and bool(one == other))


def _walk(value: Any, found: list[Any], seen: set[int]) -> None:
    """Add an object, and all that it refers to."""
    found.append(value)
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        _walk_module(value, found, seen)
    elif isinstance(value, Tensor):
        if value.is_inference():  # PyTorch counts no writes to it
            raise _UnknownError
        found.append(value._version)
    elif isinstance(value, dict):
        found.extend(value)
        _walk_all(value.values(), found, seen)
    elif isinstance(value, list | tuple | deque):
        _walk_all(value, found, seen)
    elif isinstance(value, set | frozenset):
        _walk_all(sorted(value, key=id), found, seen)
    elif isinstance(value, partial):
        _walk_all((value.func, value.args, value.keywords), found, seen)
    elif isinstance(value, MethodType):
        _walk_all((value.__func__, value.__self__), found, seen)
    elif not isinstance(value, Enum | type):
        if type(value).__basicsize__ != _Plain.__basicsize__:  # it has fields of its own: in C, or in slots
            raise _UnknownError
        _walk_all((vars(value),), found, seen)


def _walk_all(values: Iterable[Any], found: list[Any], seen: set[int]) -> None:
    for value in values:
        kind = type(value)
        if kind in _ATOMS or (kind is OrderedDict and not value):  # almost all are, such as a module's empty hooks
            found.append(value)
        else:
            _walk(value, found, seen)


def _walk_module(module: nn.Module, found: list[Any], seen: set[int]) -> None:
    found.append(type(module))
    state = module.state() if isinstance(module, RecordedModule) else vars(module)
    for holder in (module._parameters, module._buffers):
        found.extend(holder)
        found.extend([tensor is None for tensor in holder.values()])
    rest = {key: value for key, value in state.items() if key not in ("_parameters", "_buffers", "training")}
    found.extend(rest)
    _walk_all(rest.values(), found, seen)
