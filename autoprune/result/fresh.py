"""Fresh models for a recipe that names its class: one that is imported already, and made without arguments.

A file never makes autoprune import or call anything but the constructor of a class of modules that the caller's own
process has imported.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

from autoprune.data.sampling import seeded
from autoprune.errors import FileFormatError


def class_path(kind: type[nn.Module]) -> str:
    """Path of a class that is made without arguments, such as ``"package.module:Net"``; empty if it is none.

    PyTorch's own classes are none: a ``Sequential`` that is made without arguments is empty.
    """
    path = f"{kind.__module__}:{kind.__qualname__}"
    own = kind.__module__.partition(".")[0] != "torch"
    return path if own and _found(path) is kind and _takes_nothing(kind) else ""


def fresh_model(path: str, file: str) -> nn.Module:
    """Make a model of the class at a path, with the random state as before.

    Args:
        path: As `class_path` wrote it; empty if none was written.
        file: File that named it, for messages.

    Raises:
        FileFormatError: If there is no such class in a module that is imported, or it takes arguments.
    """
    way_out = "pass fresh_model, a dense model of the class that was pruned"
    if not path:
        raise FileFormatError(f"{file} names no class that is made without arguments; {way_out}")
    kind = _found(path)
    if kind is None or not _takes_nothing(kind):
        module = path.partition(":")[0]
        raise FileFormatError(
            f"{file} names {path!r:.80}, which is no class of models that is imported and made without arguments; "
            f"import {module:.60} first, or {way_out}"
        )
    with seeded(0):
        made: nn.Module = kind()
    return made


def _found(path: str) -> type[nn.Module] | None:
    """Class of modules at a path in a module that is imported; None if there is none."""
    name, _, qualified = path.partition(":")
    found: Any = sys.modules.get(name)
    for part in qualified.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _takes_nothing(kind: type[nn.Module]) -> bool:
    try:
        inspect.signature(kind).bind()
    except (TypeError, ValueError):  # it takes arguments, or has no signature
        return False
    return True
