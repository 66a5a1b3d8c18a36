"""Modules in place of those that were left out: without parameters, they hand an input on or return zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_ATOMS = (bool, int, float, str, type(None), torch.dtype)


class Dropped(nn.Module):
    """Stands for a module that was left out.

    Attributes of the original that are plain numbers, names or flags can still be read, also through its submodules,
    because code around it may do so; its parameters read as None.

    Args:
        module: The module that was left out; nothing of it is kept but these attributes.
        returns: What calls return, JSON-ready: ``{"same": ["x", 0]}`` is the argument of that name or position,
            ``{"zeros": ["x", 0, [0, 2]]}`` zeros like it with two more along dimension 1, and with ``[0, [2, 3, 1]]``
            two thirds of its size and one more; ``{"value": null}`` is a plain value, and ``{"tuple": [...]}``,
            ``{"list": [...]}`` and ``{"dict": {...}}`` hold more of these.

    Raises:
        ValueError: If `returns` is anything else.
    """

    def __init__(self, module: nn.Module, returns: Any) -> None:
        super().__init__()
        require_returns(returns)
        self.returns = returns
        self._held = _plain(module)
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what stands for the module's result."""
        return returned(self.returns, args, kwargs)

    def extra_repr(self) -> str:
        """Describe what calls return."""
        return str(self.returns)

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__.get("_held", {})
        if name in held:
            return _Held(held[name]) if isinstance(held[name], dict) else held[name]
        return super().__getattr__(name)


class _Held:
    """Plain attributes of a submodule that was left out."""

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        self._attributes = attributes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self._attributes:
            raise AttributeError(f"the module was dropped, and its {name!r} with it")
        value = self._attributes[name]
        return _Held(value) if isinstance(value, dict) else value


class _Absent:
    """Stands for a parameter or buffer of a module that was left out.

    PyTorch's encoder layers read the parameters of their submodules to choose a fused operation; where one has a
    ``__torch_function__`` of its own, they call the submodules instead.
    """

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AttributeError(f"{function} needs a parameter of a module that was dropped")


def _plain(module: nn.Module) -> dict[str, Any]:
    """Copy the plain attributes of a module and of its submodules; parameters and buffers are `_Absent`."""
    if isinstance(module, Dropped):
        return module._held
    found: dict[str, Any] = {
        name: value
        for name, value in vars(module).items()
        if name != "training" and (type(value) in _ATOMS or _plain_tuple(value))
    }
    tensors = {**module._parameters, **module._buffers}
    found |= {name: None if tensor is None else _Absent() for name, tensor in tensors.items()}
    return found | {name: None if child is None else _plain(child) for name, child in module._modules.items()}


def _plain_tuple(value: Any) -> bool:
    return type(value) is tuple and all(type(entry) in _ATOMS for entry in value)


def require_returns(returns: Any) -> None:
    """Refuse a description of return values that `Dropped` does not know.

    Raises:
        ValueError: Says what it is.
    """
    if not isinstance(returns, Mapping) or len(returns) != 1:
        raise ValueError(f"a dropped module must return something of one kind, got {returns!r:.80}")
    ((kind, inner),) = returns.items()
    if kind in ("tuple", "list") and isinstance(inner, list):
        for entry in inner:
            require_returns(entry)
    elif kind == "dict" and isinstance(inner, Mapping):
        for entry in inner.values():
            require_returns(entry)
    elif kind in ("same", "zeros"):
        place, more = (inner[:2], inner[2:]) if isinstance(inner, list) else (None, [])
        sizes = all(type(entry) is list and all(map(_is_relation, entry)) for entry in more)
        if not (place and list(map(type, place)) == [str, int] and sizes and len(more) == (kind == "zeros")):
            raise ValueError(f"a dropped module must name an argument and its position, got {inner!r:.80}")
    elif kind != "value" or type(inner) not in (bool, int, float, str, type(None)):
        raise ValueError(f"a dropped module must return arguments, zeros or plain values, got {returns!r:.80}")


def returned(returns: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Make what stands for the result of a dropped module from the arguments that it is called with."""
    ((kind, inner),) = returns.items()
    if kind == "tuple":
        return tuple(returned(entry, args, kwargs) for entry in inner)
    if kind == "list":
        return [returned(entry, args, kwargs) for entry in inner]
    if kind == "dict":
        return {name: returned(entry, args, kwargs) for name, entry in inner.items()}
    if kind == "value":
        return inner
    given = _argument(inner[0], inner[1], args, kwargs)
    if kind == "same" or not isinstance(given, Tensor):
        return given
    relations = inner[2]
    if not any(relations):
        return torch.zeros_like(given)
    return given.new_zeros([_related(size, relation) for size, relation in zip(given.shape, relations, strict=True)])


def _is_relation(entry: Any) -> bool:
    if type(entry) is list:
        return len(entry) == 3 and all(type(n) is int for n in entry) and entry[1] > 0
    return type(entry) is int


def _related(size: int, relation: int | list[int]) -> int:
    """A size that is a number more, or a factor by a divisor and then a number more."""
    if isinstance(relation, int):
        return size + relation
    factor, divisor, more = relation
    return size * factor // divisor + more


def _argument(name: str, position: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if name in kwargs:
        return kwargs[name]
    if 0 <= position < len(args):
        return args[position]
    raise TypeError(f"a dropped module hands on its argument {name or position!r}, and it was called without")
