"""Watch of the attributes that a forward pass writes: a pass that keeps something may not be skipped."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from autoprune.data.batch import Batch, Forward
from autoprune.structure.tracing.special_methods import overridden, subclass_of

_PLAIN = ("_parameters", "_buffers", "_modules")


def watching(forward: Forward, written: list[str]) -> Forward:
    """Wrap a forward to note the attributes of modules that it writes.

    Args:
        forward: Runs a model on a batch; the model is a copy that no other thread uses.
        written: Gets the names.
    """

    def run(model: nn.Module, batch: Batch) -> Any:
        before = _attributes(model)
        with overridden(_every_module(model), _noting(written)):
            outputs = forward(model, batch)
        after = _attributes(model)
        written.extend(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))
        return outputs

    return run


def _noting(written: list[str]) -> Callable[[type], type]:
    """Make the function that gives a class of modules a subclass whose objects note what is written to them."""

    @cache
    def noting(kind: type) -> type:
        inherited: Any = kind.__setattr__

        def __setattr__(self: nn.Module, name: str, value: Any) -> None:  # noqa: N807  # the method of that name
            if not name.startswith("_flat_weights"):  # which tracing itself writes
                written.append(f"{kind.__name__}.{name}")
            inherited(self, name, value)

        return subclass_of(kind, {"__setattr__": __setattr__})

    return noting


def _every_module(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, and those that it holds in plain lists, tuples, sets and dictionaries."""
    found: dict[int, nn.Module] = {}
    left: list[Any] = [model]
    seen: set[int] = set()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module):
            found[id(each)] = each
            left += vars(each).values()
        elif isinstance(each, dict):
            left += each.values()
        elif isinstance(each, list | tuple | set):
            left += each
    return list(found.values())


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Python attributes of all modules: objects by identity, the contents of containers by identity too."""
    found = {}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name in _PLAIN or name.startswith("_flat_weights"):
                continue
            listed = value if isinstance(value, list | set) else ()
            inside = value.items() if isinstance(value, dict) else listed
            found[f"{prefix}.{name}"] = (id(value), tuple(map(_identity, inside)))
    return found


def _identity(item: Any) -> Any:
    return tuple(map(id, item)) if isinstance(item, tuple) else id(item)
