"""Modules made from a description: JSON that lists calls and arguments, with every size taken from a tensor.

A description represents the recorded forward of one module. Its numbers are those of the code that do not
depend on a width or on an input's size; all others are computed from the sizes of tensors when the forward runs. So the
same description serves the dense module and every pruned one, and no code travels with it.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx, nn

Description = Mapping[str, Any]
"""JSON-ready: ``name``, ``inputs``, ``nodes`` (each ``[kind, target, args, kwargs]``) and ``output``.

Nodes are numbered from the inputs on. In arguments, ``{"node": 3}`` is the result of node 3; tuples, dictionaries,
slices, an ellipsis, dtypes and infinite numbers are dictionaries of one key, too.
"""

FACTORIES = frozenset(
    (
        *("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "zeros", "tensor", "scalar_tensor"),
        *("rand", "randn", "randint", "randperm", "tril_indices", "triu_indices", "hann_window", "bartlett_window"),
    )
)
"""Functions of ``torch`` that make tensors from numbers."""

PROPERTIES = frozenset(("T", "mT", "H", "mH", "real", "imag", "device", "dtype"))
OPERATORS = frozenset(("getitem", "setitem", "mul", "add", "sub", "floordiv", "mod", "neg"))
NEW = frozenset(("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"))
REFUSED = frozenset(
    (
        *("__reduce_ex__", "__reduce__", "__setstate__", "__deepcopy__", "__array__", "__array_wrap__", "__dir__"),
        *("backward", "register_hook", "share_memory_", "apply_", "map_", "map2_", "numpy", "tolist", "item"),
        *("resize_", "resize_as_", "set_", "storage", "untyped_storage", "to_mkldnn", "__dlpack__"),
    )
)
"""Methods of tensors that no description may name."""


_PATH = re.compile(r"(?!_\b|.*__)\w+(\.\w+)*", re.ASCII)


class RecordedModule(fx.GraphModule):
    """Runs the recorded calls of a module on the module's own parameters, buffers and submodules.

    Args:
        module: Source of parameters, buffers, submodules, hooks and other attributes; they are shared.
        description: Calls to run.

    Raises:
        ValueError: If the description names anything but functions on tensors.
    """

    description: Description

    def __init__(self, module: nn.Module, description: Description) -> None:
        super().__init__(module, _graph(description), str(description["name"]))
        own = {key: value for key, value in vars(module).items() if key not in _GRAPH_STATE}
        self.__dict__.update(own)
        self.description = description

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.state(), self.description)

    def __deepcopy__(self, memo: dict[int, Any]) -> RecordedModule:
        return _restore(copy.deepcopy(self.state(), memo), self.description)

    def __copy__(self) -> RecordedModule:
        return _restore(self.state(), self.description)

    def recompile(self) -> Any:
        """Make the forward from the graph, for this module alone even where copies share its class."""
        if type(self) in _LENT:
            self.__class__ = type(type(self).__name__, type(self).__bases__, {"__qualname__": "GraphModuleImpl"})
        return super().recompile()

    def own(self) -> None:
        """Give a module a graph and a class of its own, if it shares them."""
        if type(self) in _LENT:
            self.graph = _graph(self.description)

    def takes(self, name: str) -> bool:
        """Return whether the forward has an argument of this name."""
        return any(name == own for own, *_ in self.description["inputs"])

    def state(self) -> dict[str, Any]:
        """Attributes that are the module's, and not those of its graph."""
        return {key: value for key, value in vars(self).items() if key not in _GRAPH_STATE}


_LENT: WeakSet[type] = WeakSet()


def lend(module: RecordedModule) -> RecordedModule:
    """Make an empty module that shares the graph and the compiled forward: compiling takes longer than a copy."""
    _LENT.add(type(module))
    made = object.__new__(type(module))
    made.__dict__.update({key: value for key, value in vars(module).items() if key in _GRAPH_STATE})
    return made


# Attributes of a graph module in addition to those of every module; the rest is the user's.
_GRAPH_STATE = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(vars(nn.Module())) | {
    *("description", "forward", "_graph", "_code")
}


def _restore(state: dict[str, Any], description: Description) -> RecordedModule:
    holder = nn.Module()
    holder.__dict__.update(state)
    return RecordedModule(holder, description)


def require_same(given: Any, recorded: Any, name: str) -> None:
    """Refuse an argument for which other operations than the recorded ones might run.

    Raises:
        ValueError: If it differs from the recorded one.
    """
    if given is recorded or (not isinstance(given, Tensor) and type(given) is type(recorded) and given == recorded):
        return
    shown = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)
    raise ValueError(
        f"{name} must be {recorded!r}, as in the example inputs, got {shown}; this module was rewritten for pruning: "
        "give a list of examples of both kinds, or autoprune.Call(rewrite='off')"
    )


def require_given(given: Any, name: str) -> None:
    """Refuse None where the example inputs gave a tensor.

    Raises:
        ValueError: If it is None.
    """
    if given is None:
        raise ValueError(
            f"{name} must be a tensor, as in the example inputs, got None; this module was rewritten for pruning: "
            "give a list of examples of both kinds, or autoprune.Call(rewrite='off')"
        )


def require_identical(given: Tensor, other: Tensor, name: str) -> None:
    """Refuse two tensors where the example inputs gave one twice.

    Raises:
        ValueError: If they are not the same tensor.
    """
    if given is not other:
        raise ValueError(
            f"{name} must be a tensor given for another argument, too, as in the example inputs; this module was "
            "rewritten for pruning: give a list of examples of both kinds, or autoprune.Call(rewrite='off')"
        )


def _graph(description: Description) -> fx.Graph:
    names = [str(description["name"]), *(str(name) for name, *_ in description["inputs"])]
    names += [str(target) for kind, target, *_ in description["nodes"] if kind in ("state", "module")]
    for name in names:  # they become parts of Python code
        if not _PATH.fullmatch(name):
            raise ValueError(f"a description must name attributes, got {name!r}")
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for name, *default in description["inputs"]:
        nodes.append(
            graph.placeholder(name, default_value=_value(default[0], nodes)) if default else graph.placeholder(name)
        )
    for kind, target, args, kwargs in description["nodes"]:
        nodes.append(_node(graph, kind, target, _value({"tuple": args}, nodes), _value(kwargs, nodes)))
    graph.output(_value(description["output"], nodes))
    return graph


def _node(graph: fx.Graph, kind: str, target: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    if not all(key.isidentifier() for key in kwargs):
        raise ValueError(f"a description must name arguments, got {sorted(kwargs)}")
    if kind == "state":
        return graph.get_attr(target)
    if kind == "module":
        return graph.call_module(target, args, kwargs)
    if kind == "method":
        if not is_method(target):
            raise ValueError(f"a description must call methods of tensors, got {target!r}")
        return graph.call_method(target, args, kwargs)
    if kind == "expect":
        return graph.call_function(require_same, (*args, target))
    if kind == "given":
        return graph.call_function(require_given, (*args, target))
    if kind == "identical":
        return graph.call_function(require_identical, (*args, target))
    if kind == "property" and target in PROPERTIES:
        return graph.call_function(getattr, (*args, target))
    if kind == "operator" and target in OPERATORS:
        return graph.call_function(getattr(operator, target), args, kwargs)
    if kind == "function" and (function := function_of(target)) is not None:
        return graph.call_function(function, args, kwargs)
    raise ValueError(f"a description must call functions on tensors, got {kind} {target!r}")


def _value(given: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(given, list):
        return [_value(item, nodes) for item in given]
    if not isinstance(given, Mapping):
        return given
    kinds: dict[str, Callable[[Any], Any]] = {
        "node": nodes.__getitem__,
        "tuple": lambda inner: tuple(_value(item, nodes) for item in inner),
        "dict": lambda inner: {name: _value(item, nodes) for name, item in inner},
        "slice": lambda inner: slice(*(_value(item, nodes) for item in inner)),
        "ellipsis": lambda inner: ...,
        "float": float,
        "torch": _torch_constant,
    }
    if len(given) != 1 or not kinds.keys() >= given.keys():
        raise ValueError(f"a description must have arguments of known kinds, got {given!r}")
    ((kind, inner),) = given.items()
    return kinds[kind](inner)


def _torch_constant(name: str) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype | torch.memory_format | torch.layout):
        raise ValueError(f"a description must name dtypes or memory formats, got {name!r}")
    return found


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    from torch.overrides import get_overridable_functions, resolve_name

    spaces = (torch, torch.functional, torch.nn.functional, torch.special, torch.linalg, torch.fft)
    listed = get_overridable_functions()
    found = {str(resolve_name(f)): f for space in spaces for f in listed.get(space, ())}
    return {**found, **{f"torch.{name}": getattr(torch, name) for name in FACTORIES}}


def function_of(name: str) -> Callable[..., Any] | None:
    """Find the function on tensors of this qualified name, ``"torch.nn.functional.softmax"`` for example."""
    return _functions().get(name)


@cache
def is_method(name: str) -> bool:
    """Return whether tensors have this method, and it works on tensors only."""
    from torch.overrides import get_overridable_functions

    if name in REFUSED or not callable(getattr(Tensor, name, None)):
        return False
    return name in NEW or getattr(Tensor, name) in get_overridable_functions()[Tensor]
