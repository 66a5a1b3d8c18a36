"""Sizes that modules hold in Python: integers, also in tuples, lists, dicts and objects, however nested."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

DEEPEST = 3
"""Depth of nested holders that is searched."""

MOST_ENTRIES = 64
"""Longest container that is searched; longer ones hold no sizes."""


def sizes_held(module: nn.Module) -> dict[str, int]:
    """Find sizes among the attributes of a module, by path: ``"num_heads"``, ``"config.num_heads"``, ``"shape.2"``."""
    found: dict[str, int] = {}
    for name, value in vars(module).items():
        if type(value) is int and value > 1:
            found[name] = value
        elif name not in ("_parameters", "_buffers", "_modules"):
            found |= _walk(value, f"{name}.", DEEPEST - 1)
    return found


def _walk(holder: Any, prefix: str, depth: int) -> Iterable[tuple[str, int]]:
    for key, value in _entries(holder):
        if type(value) is int:
            if value > 1:
                yield f"{prefix}{key}", value
        elif depth:
            yield from _walk(value, f"{prefix}{key}.", depth - 1)


def _entries(holder: Any) -> Iterable[tuple[str, Any]]:
    """Entries of a holder, by the part of a path that leads to each."""
    if isinstance(holder, str | bytes | Tensor | nn.Module | type) or callable(holder):
        return []
    if isinstance(holder, Mapping):
        named = [(key, value) for key, value in holder.items() if isinstance(key, str | int)]
    elif isinstance(holder, tuple | list):
        named = list(enumerate(holder))
    else:
        slots = [name for kind in type(holder).__mro__ for name in getattr(kind, "__slots__", ())]
        own = [(name, getattr(holder, name)) for name in slots if not name.startswith("__") and hasattr(holder, name)]
        return [*getattr(holder, "__dict__", {}).items(), *own]
    return [(str(key), value) for key, value in named if "." not in str(key)] if len(named) <= MOST_ENTRIES else []


def size_held(module: nn.Module, path: str) -> int:
    """Return the size at a path.

    Raises:
        AttributeError: If there is nothing, also for a missing index or key.
    """
    value: Any = module
    for part in path.split("."):
        value = get(value, part)
    size: int = value
    return size


def hold_size(module: nn.Module, path: str, size: int) -> None:
    """Set a size in a module, or in a holder that it refers to, such as ``"config.num_heads"``, copied first.

    Modules share such holders, and a size may differ between layers once they are pruned.
    """
    first, *rest = path.split(".")
    setattr(module, first, _with(get(module, first), rest, size) if rest else size)


def get(holder: Any, part: str) -> Any:
    """Return the entry that one part of a path leads to."""
    if isinstance(holder, tuple | list) and part.isdigit():
        return holder[int(part)]
    if isinstance(holder, Mapping):
        return holder[_key(holder, part)]
    return getattr(holder, part)


def _key(holder: Mapping[Any, Any], part: str) -> Any:
    return part if part in holder else int(part)


def _with(holder: Any, parts: list[str], size: int) -> Any:
    """Copy a holder with another size at a path inside it."""
    part, *rest = parts
    value = _with(get(holder, part), rest, size) if rest else size
    if isinstance(holder, tuple):
        items: list[Any] = [value if i == int(part) else item for i, item in enumerate(holder)]
        return type(holder)(*items) if hasattr(holder, "_fields") else type(holder)(items)
    copied = copy.copy(holder)
    if isinstance(copied, list):
        copied[int(part)] = value
    elif isinstance(copied, Mapping):
        copied[_key(copied, part)] = value  # type: ignore[index]  # a dict, or it refuses in its own words
    else:
        object.__setattr__(copied, part, value)  # frozen dataclasses refuse the usual way
    return copied
