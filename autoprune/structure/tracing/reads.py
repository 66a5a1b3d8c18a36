"""Watching of the attributes that the code of a model reads while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from autoprune.structure.sizes.held import DEEPEST, get
from autoprune.structure.tracing.special_methods import subclass_of


class Reads:
    """Notes reads of attributes of a model's modules, and of the objects that these refer to, while inside ``with``.

    Their classes are replaced by watching ones until its end: loggers, and objects with a copy method of their own, are
    shared with the user's model.

    Args:
        model: A copy of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._seen: set[tuple[int, str]] = set()
        self._watched: dict[int, tuple[Any, type]] = {}  # kept alive, so that no other object takes its identity
        self._kinds: dict[type, type] = {}

    def __enter__(self) -> Reads:
        for module in self._modules.values():
            self._watch(module)
            for value in list(vars(module).values()):
                self._watch_inside(value, DEEPEST - 1)
        return self

    def __exit__(self, *_: object) -> None:
        for holder, kind in self._watched.values():
            object.__setattr__(holder, "__class__", kind)

    def read(self, module: str, path: str) -> bool:
        """Return whether the value at a path from a module was read; True if that is not known."""
        holder: Any = self._modules[module]
        for part in path.split("."):
            if id(holder) in self._watched and not self._seen & {(id(holder), part), (id(holder), "__dict__")}:
                return False
            holder = get(holder, part)
        return True

    def _watch_inside(self, value: Any, depth: int) -> None:
        if id(value) in self._watched or isinstance(value, str | bytes | Tensor | nn.Module | type) or callable(value):
            return
        inner: Iterable[Any] = ()
        if isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, list | tuple):
            inner = value
        elif hasattr(value, "__dict__"):
            inner = vars(value).values()
            self._watch(value)
        if depth:
            for each in list(inner):
                self._watch_inside(each, depth - 1)

    def _watch(self, holder: Any) -> None:
        if id(holder) in self._watched:
            return
        kind = type(holder)
        try:
            object.__setattr__(holder, "__class__", self._watching(kind))
        except Exception:  # reads of classes with another layout, or that refuse subclasses, are not known
            return
        self._watched[id(holder)] = holder, kind

    def _watching(self, kind: type) -> type:
        if kind not in self._kinds:
            seen = self._seen
            inherited: Any = kind.__getattribute__

            def __getattribute__(self: Any, name: str) -> Any:  # noqa: N807  # the method of that name
                if name != "__dict__" or not isinstance(self, nn.Module):  # which modules read at every call
                    seen.add((id(self), name))
                return inherited(self, name)

            self._kinds[kind] = subclass_of(kind, {"__getattribute__": __getattribute__})
        return self._kinds[kind]
