"""Tensors inside inputs and outputs of models, in containers of any kind.

PyTorch's pytrees rebuild a container through its class, whose constructor may check its arguments: a packed sequence
refuses anything but a tensor on the CPU. Here a container is copied and its entries are replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import SUPPORTED_NODES, tree_flatten, tree_unflatten


def tensors_in(tree: Any, *, objects: bool = False) -> list[Tensor]:
    """List the tensors in a tree, in order.

    Args:
        tree: Mappings, lists, tuples, dataclasses and registered pytrees, nested.
        objects: Look into the attributes of other objects, too.
    """
    return list(_tensors(tree, objects, frozenset()))


def sizes_of(tensors: Sequence[Tensor]) -> str:
    """Describe types and shapes of a few tensors, for messages."""
    some = ", ".join(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}" for tensor in tensors[:4])
    return f"{some or 'none'}{', ...' * (len(tensors) > 4)}"


def _tensors(tree: Any, objects: bool, around: frozenset[int]) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif id(tree) not in around:  # objects may refer to each other in a circle
        for child in (_children(tree, objects) or {}).values():
            yield from _tensors(child, objects, around | {id(tree)})


def map_tensors(fn: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Copy a tree, with attributes of objects, and apply `fn` to its tensors; returned as it is if it has none."""
    return _mapped(fn, tree, {})


def _mapped(fn: Callable[[Tensor], Tensor], tree: Any, copies: dict[int, Any]) -> Any:
    if isinstance(tree, Tensor):
        return fn(tree)
    if id(tree) in copies:
        return copies[id(tree)]
    if next(_tensors(tree, True, frozenset()), None) is None:
        return tree
    changed = not isinstance(tree, tuple) and type(tree) not in SUPPORTED_NODES
    if changed or isinstance(tree, list | MutableMapping):
        copies[id(tree)] = copy.copy(tree)  # before its entries, one of which may refer to it
    children = {key: _mapped(fn, child, copies) for key, child in (_children(tree, objects=True) or {}).items()}
    return _filled(tree, children, copies.get(id(tree)))


def _children(tree: Any, objects: bool) -> dict[Any, Any] | None:
    """Return the entries of a container by key, or None for anything else."""
    if isinstance(tree, Tensor | nn.Module | type | str | bytes):
        return None
    if isinstance(tree, Mapping):
        return dict(tree)
    if isinstance(tree, list | tuple):
        return dict(enumerate(tree))
    if is_dataclass(tree):
        return {field.name: getattr(tree, field.name, None) for field in fields(tree)}
    if type(tree) in SUPPORTED_NODES:
        return dict(enumerate(tree_flatten(tree)[0]))
    return dict(vars(tree)) if objects and hasattr(tree, "__dict__") and not callable(tree) else None


def _filled(tree: Any, children: dict[Any, Any], copied: Any) -> Any:
    """Fill a container like `tree` with other entries: its copy, if that can be changed."""
    if isinstance(tree, tuple):
        return tuple.__new__(type(tree), children.values())  # past the constructor of a named tuple
    if isinstance(tree, list | MutableMapping):
        for key, child in children.items():
            copied[key] = child
        return copied
    if isinstance(tree, Mapping):
        return children
    if copied is None:
        return tree_unflatten(list(children.values()), tree_flatten(tree)[1])
    for name, child in children.items():
        object.__setattr__(copied, name, child)  # a frozen dataclass allows no other
    return copied
