"""Holders of parameters and buffers: the dictionaries of modules, in which tensors are swapped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Owner:
    """Holder of a parameter or buffer.

    Attributes:
        name: First qualified name of the tensor, the same for all owners of a tied one.
        module: Name of the module that holds it here.
        holder: The module's dictionary of parameters or buffers.
        key: Its key there.
        tensor: The tensor found there.
    """

    name: str
    module: str
    holder: dict[str, Any]
    key: str
    tensor: Tensor


def owners(model: nn.Module) -> Iterable[Owner]:
    """Iterate over every holder of a parameter or buffer."""
    first: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            for key, tensor in holder.items():
                if tensor is not None:
                    name = first.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                    yield Owner(name, prefix, holder, key, tensor)


@contextmanager
def swapped(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other tensors in place of those of a model; afterwards it holds its own again, also where code replaced them.

    Args:
        model: Holds the tensors; tied ones are replaced together.
        state: Tensors by the first qualified name of those that they replace.
    """
    held = [owner for owner in owners(model) if owner.name in state]
    try:
        for owner in held:
            owner.holder[owner.key] = state[owner.name]
        yield
    finally:
        for owner in held:
            owner.holder[owner.key] = owner.tensor
