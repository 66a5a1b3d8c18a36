"""Recorder of a pass: it gives every tensor an identity, and records each operation and the module that ran it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from autoprune.structure.time_limit import look
from autoprune.structure.tracing.foreseen import foresee, stand_in
from autoprune.structure.tracing.record import Foreseen, ModuleCall, Op, Record, Ref, Value


@contextmanager
def module_paths(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder which module of `model` is running, and have it note each call."""
    names = {id(module): name for name, module in model.named_modules()}
    record = recorder.record
    starts = list[int]()

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in names:
            recorder.path.append(names[id(module)])
            starts.append(len(record.ops))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if id(module) in names and recorder.path:
            # Only leaves: a container of the user's may check its entries, and a `Ref` is no tensor.
            inputs, outputs = (tuple(map(recorder.known, tree_leaves(tree))) for tree in ((args, kwargs), output))
            places = tuple(place for place, tree in (*enumerate(args), *kwargs.items()) for _ in tree_leaves(tree))
            first = starts.pop()
            name = recorder.path.pop()
            form = form_of(output)
            record.calls.append(ModuleCall(name, first, len(record.ops), inputs, outputs, places, form))

    # On each module: PyTorch's note of a global hook with keyword arguments outlives the hook's removal.
    handles = [module.register_forward_hook(leave, with_kwargs=True) for module in model.modules()]
    handles.append(register_module_forward_pre_hook(enter))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def form_of(tree: Any) -> Any:
    """Describe plain containers, with their leaves numbered in the order of `tree_leaves`; None for any others."""
    numbers = count()

    def described(node: Any) -> Any:
        if type(node) in (tuple, list):
            return {type(node).__name__: [described(entry) for entry in node]}
        if type(node) is dict and all(isinstance(key, str) for key in node):
            return {"dict": {key: described(entry) for key, entry in node.items()}}
        if not _is_leaf(node):
            raise TypeError
        return {"leaf": next(numbers)}

    try:
        return described(tree)
    except TypeError:
        return None


def _is_leaf(node: Any) -> bool:
    """Return whether an object is a leaf of PyTorch's trees."""
    leaves = tree_leaves(node)
    return len(leaves) == 1 and leaves[0] is node


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, without types
    """Records the operations that run under it; results of those in `foreseen` are not computed."""

    def __init__(self, foreseen: Foreseen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.record = Record()
        self.foreseen = foreseen
        self._learned: dict[torch._ops.OpOverload, tuple[bool, ...] | None] = {}
        self.path: list[str] = []
        self._ids: dict[int, int] = {}
        self._alive: dict[int, Any] = {}

    def add(self, tensor: Tensor, kind: str, name: str, born: int, base: int | None = None) -> int:
        """Give `tensor` an identity that lasts as long as Python keeps the object."""
        record = self.record
        index = len(record.values)
        keep = tensor if kind == "constant" else None
        shape = tuple(tensor.shape)
        base = index if base is None else base
        dense = tensor.layout == torch.strided
        strides, stored = (tuple(tensor.stride()), None) if dense else ((), tensor._nnz())
        record.values.append(Value(shape, tensor.dtype, kind, name, base, born, 2**62, keep, strides, stored))
        key = id(tensor)
        self._ids[key] = index

        def forget(_: Any) -> None:
            record.values[index].died = len(record.ops)
            if self._ids.get(key) == index:  # Python may have given the address to another tensor already
                del self._ids[key]

        self._alive[index] = weakref.ref(tensor, forget)
        return index

    def lookup(self, tensor: Tensor) -> int:
        """Return the identity of a tensor; an unknown one is a constant."""
        index = self._ids.get(id(tensor))
        return self.add(tensor, "constant", "", born=-1) if index is None else index

    def lives(self, value: int) -> bool:
        """Return whether anything still keeps a tensor: the model, what it returned, or code outside of it."""
        return self._alive[value]() is not None

    def known(self, leaf: Any) -> Any:
        """Return the `Ref` of a known tensor; anything else as it is."""
        return Ref(self._ids[id(leaf)]) if isinstance(leaf, Tensor) and id(leaf) in self._ids else leaf

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        look()
        kwargs = kwargs or {}
        read = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        reshaped = torch.Tag.inplace_view in func.tags  # such as transpose_: the same object, other dimensions
        bound = _bind(func, args, kwargs)
        refs = {name: tree_map(self._ref, value) for name, value in bound.items()}
        storages = {_storage(t): self.lookup(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = self._run(func, args, kwargs)
        born = len(self.record.ops)

        def result(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if id(leaf) in read and not reshaped:
                return Ref(self.lookup(leaf))  # in place: the same value, with the same labels
            owner = storages.get(_storage(leaf))
            base = None if owner is None else self.record.values[owner].base
            return Ref(self.add(leaf, "result", "", born, base))

        outputs = tree_map(result, out)
        self.record.ops.append(Op(born, func, refs, outputs, self.path[-1] if self.path else ""))
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in self.foreseen:
            return stand_in(func, args, kwargs, self.foreseen[func])
        out = func(*args, **kwargs)
        known = func not in self._learned or self._learned[func] is not None
        if known and self._learned.setdefault(func, found := foresee(func, args, kwargs, out)) != found:
            self._learned[func] = None
        return out

    def foreseeable(self) -> Foreseen:
        """Operations whose results always had the form given by the meta device; none if the pass depends on values."""
        reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if any(reads.intersection(func.tags) for func in self._learned):
            return {}
        return {func: empty for func, empty in self._learned.items() if empty is not None}

    def _ref(self, leaf: Any) -> Any:
        return Ref(self.lookup(leaf)) if isinstance(leaf, Tensor) else leaf


def _storage(tensor: Tensor) -> int:
    """Identify the memory of a tensor; a sparse one has no storage."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else -id(tensor)


def _bind(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Bind the arguments of an operation to its schema names, with defaults filled in."""
    bound = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            bound[argument.name] = args[i]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound
