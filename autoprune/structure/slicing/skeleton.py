"""Skeleton of a model: a copy of its modules that shares its tensors, or runs on others, so that it stays unchanged."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copyreg import dispatch_table
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from autoprune.errors import UnsupportedModelError
from autoprune.structure.owners import swapped
from autoprune.structure.rewriting.graph_module import RecordedModule, lend
from autoprune.structure.slicing.adapters import adapter_of, refresh_flat_weights
from autoprune.structure.tracing.known_shapes import KnownShapes
from autoprune.structure.tracing.record import CallForward, Inputs

_EMPTY = (OrderedDict, set)
_ATOMS = (bool, int, float, str, type(None), torch.dtype, torch.device)


def skeleton(model: nn.Module) -> nn.Module:
    """Copy modules but share parameters and buffers, so that a copy costs no memory and hides every side effect.

    Raises:
        UnsupportedModelError: If Python cannot copy the model.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for value in (value for module in model.modules() for value in vars(module).values()):
        if isinstance(value, Tensor) and not value.is_leaf:  # kept from an earlier pass; Python cannot copy its graph
            shared[id(value)] = value.detach().clone()
    try:
        copied = _copied(model, dict(shared))
    except Exception as error:  # anything may be raised by a user's __deepcopy__ or by an attribute that has none
        raise UnsupportedModelError(
            f"model must be copyable with copy.deepcopy, but {type(model).__name__} raised {error!r}; "
            "move the attribute that cannot be copied out of the model"
        ) from error
    for module in copied.modules():
        adapter = adapter_of(module)
        if adapter is not None and adapter.prepare is not None:
            adapter.prepare(module)
    return copied


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy as `copy.deepcopy` does, in a fraction of the time for classes without a copy method of their own."""
    kind: Any = type(module)
    if id(module) in memo or not (isinstance(module, RecordedModule) or _copies_plainly(kind)):
        for part in module.modules():
            # Every module has a dozen empty containers, on which `deepcopy` spends most of its time.
            empty = (value for value in vars(part).values() if type(value) in _EMPTY and not value)
            memo.update((id(value), type(value)()) for value in empty if id(value) not in memo)
        copied: nn.Module = copy.deepcopy(module, memo)
        return copied
    made: nn.Module
    if isinstance(module, RecordedModule):
        made = lend(module)
        given = module.state()
    else:
        made, given = kind.__new__(kind), module.__getstate__()  # type: ignore[no-untyped-call]  # as torch has it
    memo[id(module)] = made
    state: dict[str, Any] = {}
    for key, value in given.items():
        if type(value) in _ATOMS:
            state[key] = value
        elif type(value) in _EMPTY and not value:
            state[key] = memo.setdefault(id(value), type(value)())
        elif key == "_modules" and type(value) is dict:
            memo[id(value)] = state[key] = {}
            for name, child in value.items():
                state[key][name] = None if child is None else _copied(child, memo)
        else:
            state[key] = copy.deepcopy(value, memo)
    made.__setstate__(state)  # type: ignore[no-untyped-call]  # as above
    return made


@cache
def _copies_plainly(kind: type[nn.Module]) -> bool:
    """Return whether copies of a class are new objects with copied attributes."""
    says = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__getnewargs__", "__getnewargs_ex__")
    own = {name for base in kind.__mro__ if base not in (nn.Module, object) for name in vars(base)}
    return kind not in dispatch_table and own.isdisjoint((*says, "__slots__"))


class ForwardModule(nn.Module):
    """Makes ``forward(model, ...)`` a module, so that the tensors of both can be swapped."""

    def __init__(self, model: nn.Module, run: CallForward) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model as the user would."""
        return self.run(self.model, *args, **kwargs)


def call_with(
    call: ForwardModule,
    state: Mapping[str, Tensor],
    inputs: Inputs,
    mode: AbstractContextManager[Any] | None = None,
    *,
    decomposed: bool = False,
) -> Any:
    """Run a model with other tensors in place of its own, under a dispatch mode, without fused shortcuts.

    Args:
        call: The model with its forward.
        state: Tensors by their name in `call`.
        inputs: Positional and keyword inputs.
        mode: Watches the operations.
        decomposed: Run recurrent layers as their separate operations, not as one fused operation.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    handle = register_module_forward_pre_hook(lambda module, _: refresh_flat_weights(module))
    torch.backends.mha.set_fastpath_enabled(False)  # the operations inside a fused encoder layer cannot be seen
    try:
        shapes = KnownShapes() if any(tensor.is_meta for tensor in state.values()) else nullcontext()
        layers = _layers_decomposed() if decomposed else nullcontext()
        with swapped(call, state), torch.no_grad(), layers, shapes, mode or nullcontext():
            return call(*inputs[0], **inputs[1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        handle.remove()


@contextmanager
def _layers_decomposed() -> Iterator[None]:
    """Disable the single operations of oneDNN and cuDNN for recurrent layers."""
    fused = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(fused[0])
        torch._C._set_cudnn_enabled(fused[1])
