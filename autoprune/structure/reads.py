"""Which attributes the code of a model reads while it runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from autoprune.structure.held import DEEPEST, get


class Reads:
    """Notes what is read of the modules of a model, and of the objects that these refer to, from now on.

    Args:
        model: A copy that nothing else uses: the classes of its modules are replaced by watching ones.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._seen: set[tuple[int, str]] = set()
        self._watched: dict[int, Any] = {}  # kept alive, so that no other object takes its identity
        self._kinds: dict[type, type] = {}
        for module in list(model.modules()):
            self._watch(module)
            for value in list(vars(module).values()):
                self._watch_inside(value, DEEPEST - 1)

    def read(self, module: str, path: str) -> bool:
        """Whether the value at a path from a module was read, as far as that can be told."""
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
        try:
            object.__setattr__(holder, "__class__", self._watching(type(holder)))
        except Exception:  # of classes with another layout, or that refuse heirs, what is read cannot be told
            return
        self._watched[id(holder)] = holder

    def _watching(self, kind: type) -> type:
        if kind not in self._kinds:
            seen = self._seen
            inherited: Any = kind.__getattribute__

            def __getattribute__(self: Any, name: str) -> Any:  # noqa: N807  # the method of that name
                if name != "__dict__" or not isinstance(self, nn.Module):  # which modules read at every call
                    seen.add((id(self), name))
                return inherited(self, name)

            members = {"__getattribute__": __getattribute__, "__module__": kind.__module__}
            self._kinds[kind] = type(kind)(kind.__name__, (kind,), members)
        return self._kinds[kind]
