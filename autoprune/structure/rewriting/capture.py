"""Record the functions that a module's own code calls, at the level at which the user wrote them.

ATen operations depend on the device and on the mode (a fused attention, a dropout that evaluation leaves out); the
functions of ``torch`` that a forward calls do not. Calls of submodules are recorded as such, and the operations inside
them are recorded for them alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves

from autoprune.structure.rewriting.graph_module import FACTORIES, PROPERTIES, function_of, is_method

ABOUT_SIZES = frozenset(
    (
        *("size", "dim", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex", "__len__"),
        *("element_size", "ndimension", "get_device", "storage_offset", "has_names", "type", "is_inference"),
        *("is_signed", "is_conj", "is_neg", "can_cast", "result_type", "promote_types", "_is_view"),
    )
)
"""Functions that return properties of a tensor that do not depend on its values."""

READ = frozenset(
    (
        *("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_mps"),
        *("is_xpu", "is_xla", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_leaf", "itemsize", "nbytes"),
        *("grad_fn", "names", "is_mtia", "is_maia", "is_hpu", "is_vulkan", "is_ipu", "is_sparse_csr"),
    )
)
"""Properties of a tensor that do not depend on its values."""

RESHAPED_IN_PLACE = frozenset(("unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "as_strided_"))

OPERATORS = {"__getitem__": "getitem", "__setitem__": "setitem"}


@dataclass(frozen=True)
class Held:
    """Placeholder of a tensor in recorded arguments: an index into ``Frame.tensors``."""

    index: int


@dataclass(frozen=True)
class Step:
    """Call in the code of a module: ``function``, ``method``, ``operator``, ``property`` or ``module``.

    Attributes:
        kind: Kind of the call.
        target: Its qualified name, or that of the submodule.
        args: Positional arguments; tensors as `Held`.
        kwargs: Keyword arguments.
        output: Its result; tensors as `Held`.
    """

    kind: str
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Frame:
    """Call of a module.

    Attributes:
        name: Qualified name of the module.
        arguments: By name of the forward's parameter; tensors as `Held`.
        steps: Calls in its own code, in order.
        output: Its return value; tensors as `Held`.
        shapes: Shape of each tensor at its first use.
        values: Index of each tensor in the record of a pass that was traced meanwhile; -1 without one.
        states: Path of each tensor that is a parameter or buffer, or another attribute, by its index.
        refused: Reason why the call cannot be repeated from the recording; empty if it can.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    output: Any = None
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    values: list[int] = field(default_factory=list)
    states: dict[int, str] = field(default_factory=dict)
    refused: str = ""
    _module: nn.Module | None = None
    _tensors: list[Tensor] = field(default_factory=list)
    _index: dict[int, int] = field(default_factory=dict)
    _paths: dict[int, str] | None = None
    _names: dict[int, str] = field(default_factory=dict)

    def hold(self, tensor: Tensor) -> Held:
        """Give a tensor an index, and keep it alive so that no other takes its identity.

        The result of a call gets a new index even if it is its input, because that may depend on sizes and the mode.
        """
        self._index[id(tensor)] = len(self._tensors)
        self._tensors.append(tensor)
        self.shapes.append(tuple(tensor.shape))
        self.dtypes.append(tensor.dtype)
        self.values.append(_recorded(tensor))
        return Held(self._index[id(tensor)])

    def read(self, tensor: Tensor) -> Held:
        """Find a tensor that is read: a known one, or a parameter, buffer or attribute of the module."""
        if id(tensor) not in self._index:
            path = self._path(tensor)
            if path is None:
                self.refuse("its forward reads a tensor that is no parameter, buffer or attribute of it")
            held = self.hold(tensor)
            self.states[held.index] = path or ""
        return Held(self._index[id(tensor)])

    def given(self, tensor: Tensor) -> Held:
        """Hold a tensor that the module is called with, perhaps in more than one place."""
        return Held(self._index[id(tensor)]) if id(tensor) in self._index else self.hold(tensor)

    def refuse(self, reason: str) -> None:
        """Note the first reason why the call cannot be repeated."""
        self.refused = self.refused or reason

    def encode(self, given: Any, tensor: Callable[[Tensor], Held]) -> Any:
        """Copy a structure of plain Python with `Held` for tensors."""
        if isinstance(given, Tensor):
            return tensor(given)
        if isinstance(given, dict):
            if type(given) is not dict or not all(isinstance(key, str) for key in given):
                self.refuse(f"its forward handles a {type(given).__name__}")
            return {str(key): self.encode(value, tensor) for key, value in given.items()}
        if isinstance(given, slice):
            return slice(*(self.encode(part, tensor) for part in (given.start, given.stop, given.step)))
        if isinstance(given, list):
            return [self.encode(item, tensor) for item in given]
        if isinstance(given, tuple):
            return tuple(self.encode(item, tensor) for item in given)
        plain = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
        if given is None or given is ... or type(given) in plain:
            return given
        self.refuse(f"its forward handles a {type(given).__name__}")
        return None

    def _path(self, tensor: Tensor) -> str | None:
        """Path of a tensor, found when first asked for, because parameters are swapped for each pass."""
        assert self._module is not None
        if self._paths is None or id(tensor) not in self._paths:
            self._paths = {}
            for prefix, module in self._module.named_modules():
                for holder in (vars(module), module._parameters, module._buffers):
                    for key, value in holder.items():
                        if isinstance(value, Tensor):
                            self._paths.setdefault(id(value), f"{prefix}.{key}" if prefix else key)
        return self._paths.get(id(tensor))

    def add(self, kind: str, target: str, args: Any, kwargs: Any, output: Any) -> None:
        """Note a call."""
        if not self.refused:
            given = self.encode(tuple(args), self.read)
            named = self.encode(dict(kwargs), self.read)
            self.steps.append(Step(kind, target, given, named, self.encode(output, self.hold)))


def _recorded(tensor: Tensor) -> int:
    for mode in _get_current_dispatch_mode_stack():
        ids = getattr(mode, "_ids", None)
        if ids is not None:
            return int(ids.get(id(tensor), -1))
    return -1


class Capture(TorchFunctionMode):
    """Records one call of some modules, at any depth of a model, while it runs.

    Attributes:
        frames: Finished calls, in the order in which they ended.
    """

    def __init__(self, model: nn.Module, wanted: Callable[[str], bool]) -> None:
        super().__init__()
        self.frames: list[Frame] = []
        self._names = {id(module): name for name, module in model.named_modules()}
        self._wanted = wanted
        self._calls: list[tuple[Any, Any, Frame | None]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        frame = self._calls[-1][2] if self._calls else None
        if frame is not None and not frame.refused:
            _note(frame, func, args, kwargs, out)
        return out

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[Capture]:
        """Record the calls of `model` inside."""
        handles = []
        for module in model.modules():
            # Arguments and results as callers see them, and the calls of the forward itself: hooks lie between them.
            handles.append(module.register_forward_pre_hook(self._called, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._returned, with_kwargs=True))
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._calls.append((args, kwargs, None))

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self._names[id(module)]
        if self._wanted(name):
            frame = Frame(name, _module=module, _names={id(m): n for n, m in module.named_modules()})
            frame.arguments = _bound(frame, module, args, kwargs)
            self._calls[-1] = (*self._calls[-1][:2], frame)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        frame = self._calls[-1][2]
        if frame is not None:
            frame.output = frame.encode(output, frame.read)
            self.frames.append(frame)
            self._calls[-1] = (*self._calls[-1][:2], None)

    def _returned(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, named, _ = self._calls.pop()
        frame = self._calls[-1][2] if self._calls else None
        if frame is not None:
            path = frame._names.get(id(module))
            if path is None:
                frame.refuse(f"it calls a module that is no part of it ({type(module).__name__})")
            else:
                frame.add("module", path, given, named, output)


def _bound(frame: Frame, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(module.forward)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    bound = signature.bind(*args, **kwargs).arguments
    given = {}
    for name, value in bound.items():
        if kinds[name] is inspect.Parameter.VAR_POSITIONAL and value:
            frame.refuse("its forward takes any number of arguments")
        elif kinds[name] is inspect.Parameter.VAR_KEYWORD:
            if value:
                frame.refuse(f"its forward takes keyword arguments that it does not name ({', '.join(value)})")
        elif kinds[name] is not inspect.Parameter.VAR_POSITIONAL:
            given[name] = frame.encode(value, frame.given)
    return given


def _note(frame: Frame, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    qualified = str(resolve_name(func) or getattr(func, "__name__", func))
    owner, _, name = qualified.rpartition(".")
    tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(out))
    if name == "__get__":
        attribute = owner.rpartition(".")[2]
        if tensors and attribute in PROPERTIES:
            frame.add("property", attribute, args[:1], {}, out)
        elif attribute not in READ:
            frame.refuse(f"its forward reads {attribute} of a tensor")
    elif owner == "torch.Tensor" and name in OPERATORS:
        frame.add("operator", OPERATORS[name], args, kwargs, out)
    elif name in RESHAPED_IN_PLACE:
        frame.refuse(f"its forward calls {name}")
    elif not tensors:
        if name not in ABOUT_SIZES:
            frame.refuse(f"its forward calls {name}, which may depend on values")
    elif owner == "torch.Tensor" and is_method(name):
        frame.add("method", name, args, kwargs, out)
    elif function_of(qualified) is not None or name in FACTORIES:
        frame.add("function", qualified if owner else f"torch.{name}", args, kwargs, out)
    else:
        frame.refuse(f"its forward calls {qualified}")
