"""Cache of repeated operations on the meta device: their results have no values, so one run gives all of their forms.

Many of PyTorch's rules for shapes are Python code that takes far longer than the operation. A deep network repeats the
same few operations, and an analysis passes through it dozens of times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and type of a tensor on the meta device."""

_SCALARS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


Known = dict[Hashable, "tuple[bool, tuple[Form, ...]] | None"]
"""Forms of results by operation and forms of arguments; None where they share memory with these."""

_KEPT: ContextVar[defaultdict[torch.dtype, Known] | None] = ContextVar("known shapes", default=None)


@contextmanager
def shapes_kept() -> Iterator[None]:
    """Let all passes inside share what they learn."""
    token = _KEPT.set(defaultdict(dict))
    try:
        yield
    finally:
        _KEPT.reset(token)


class _UnknownError(Exception):
    """An argument whose form does not determine the form of results."""


class KnownShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's, without types
    """Returns new tensors in the form of earlier results of an operation with arguments of the same form.

    It serves operations that only make new tensors, from tensors on the meta device; all others run. Inside
    `shapes_kept`, those of earlier passes count, too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        kept = _KEPT.get()
        # Results of whole numbers may have the default type, which a pass in float64 sets.
        self._known: Known = {} if kept is None else kept[torch.get_default_dtype()]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation, or return new tensors in the known form of its results."""
        if not _only_makes(func):
            return func(*args, **kwargs)
        met: list[Tensor] = []
        try:
            key = (func, _form(args, met), tuple((name, _form(value, met)) for name, value in kwargs.items()))
        except _UnknownError:
            return func(*args, **kwargs)
        if not met:
            return func(*args, **kwargs)
        if key not in self._known:
            if func is torch.ops.aten.convolution.default:
                _require_fitting_bias(args[1], args[2], args[6], args[8])
            out = func(*args, **kwargs)
            self._known[key] = _described(out, met)
            return out
        known = self._known[key]
        if known is None:
            return func(*args, **kwargs)
        several, forms = known
        made = [torch.empty_strided(size, strides, dtype=dtype, device="meta") for size, strides, dtype in forms]
        return tuple(made) if several else made[0]


def _require_fitting_bias(weight: Tensor, bias: Tensor | None, transposed: bool, groups: int) -> None:
    """Refuse a bias of the wrong size, which every kernel of a convolution refuses and the meta device does not."""
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    if bias is not None and bias.shape != (channels,):
        raise RuntimeError(f"a convolution to {channels} channels got a bias of shape {tuple(bias.shape)}")


@cache
def _only_makes(func: Any) -> bool:
    """Return whether an operation returns new tensors, and does not change its arguments."""
    if not isinstance(func, torch._ops.OpOverload):
        return False
    schema = func._schema
    return not any(each.alias_info is not None for each in (*schema.arguments, *schema.returns))


def _form(leaf: Any, met: list[Tensor]) -> Hashable:
    """Form of an argument, which determines the form of results; 1, 1.0 and True differ.

    Raises:
        _UnknownError: If it may hold more than that.
    """
    kind = type(leaf)
    if kind is Tensor or kind is nn.Parameter:
        if not leaf.is_meta or leaf.layout != torch.strided or leaf.is_conj() or leaf.is_neg():
            raise _UnknownError
        met.append(leaf)
        return leaf.shape, leaf.stride(), leaf.dtype
    if kind is list or kind is tuple:
        return tuple([_form(item, met) for item in leaf])
    if kind in _SCALARS:
        return kind, leaf
    raise _UnknownError


def _described(out: Any, met: list[Tensor]) -> tuple[bool, tuple[Form, ...]] | None:
    """Form of results; None unless they are tensors with memory of their own."""
    several = type(out) is tuple
    leaves = out if several else (out,)
    if any(type(leaf) is not Tensor or not leaf.is_meta or leaf.layout != torch.strided for leaf in leaves):
        return None
    stored = [leaf.untyped_storage()._cdata for leaf in (*leaves, *met)]
    made = stored[: len(leaves)]
    if len(set(made)) < len(made) or set(made) & set(stored[len(leaves) :]) or any(x.storage_offset() for x in leaves):
        return None
    return several, tuple([(leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves])
