"""Build a plain, smaller module: sliced parameters and buffers, and attributes that mirror sizes rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.protocols import IntArray
from autoprune.structure.owners import Owner, owners
from autoprune.structure.python_state import python_state, same_state
from autoprune.structure.rewriting.graph_module import Description, RecordedModule
from autoprune.structure.sizes.held import hold_size, size_held
from autoprune.structure.slicing.adapters import adapter_of
from autoprune.structure.slicing.dropped import Dropped
from autoprune.structure.slicing.skeleton import skeleton
from autoprune.structure.slicing.zeros import Pattern

Slices = Mapping[str, Mapping[int, IntArray]]
"""Indices that stay, ascending, of each tensor (by qualified name) along each dimension that shrinks."""


CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
"""Arguments by which models of transformers hand over what they have read."""


@dataclass(frozen=True)
class Edit:
    """Edit that turns a dense model into a pruned one; small, and JSON-ready with lists for arrays.

    Attributes:
        slices: Indices that stay of each tensor that shrinks.
        attributes: Sizes that modules keep in Python, by module and attribute path.
        zeroed: Number of elements of a parameter that are set to zero: those of least magnitude among those that stay.
        graphs: Modules that are delivered as graphs of their operations, because their code does not follow the widths.
        dropped: Modules that are left out, each with what stands for its return value, see `Dropped`.
        patterns: Pattern of the zeros of a parameter; others are single elements.
    """

    slices: Slices
    attributes: Mapping[str, Mapping[str, int]]
    zeroed: Mapping[str, int] = field(default_factory=dict)
    graphs: Mapping[str, Description] = field(default_factory=dict)
    dropped: Mapping[str, Any] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)


class Slicer:
    """Applies edits to one model's skeleton repeatedly; parameters that do not shrink are shared.

    Args:
        model: The dense model; it stays as it is, and the results of `cut` share its parameters. Elements are ranked
            once, so call `rerank` if its weights change between cuts that set some to zero.
    """

    def __init__(self, model: nn.Module) -> None:
        self.skeleton = skeleton(model)
        self._owners = list(owners(self.skeleton))
        self._modules = dict(self.skeleton.named_modules())
        adapters = {name: found for name, m in self._modules.items() if (found := adapter_of(m)) is not None}
        self._resize = {name: adapter.resize for name, adapter in adapters.items() if adapter.resize is not None}
        # Modules resized by the last cut may be dense in the next; prepared ones differ from the dense one until then.
        self._changed = {name for name, adapter in adapters.items() if adapter.prepare is not None}
        self._dense: dict[tuple[str, str], int] = {}
        self._recorded: dict[str, RecordedModule] = {}
        names = {id(module): name for name, module in self._modules.items()}
        self._spots: dict[str, list[tuple[dict[str, Any], str]]] = {}  # the places of each module
        for module in self._modules.values():
            for key, child in module._modules.items():
                if child is not None:
                    self._spots.setdefault(names[id(child)], []).append((module._modules, key))
        self._around = {owner.module: {owner.module, *_parents(owner.module)} for owner in self._owners}
        self._left_out: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._ranks: dict[str, Tensor] = {}

    def cut(self, edit: Edit, *, private: bool = False) -> nn.Module:
        """Return the skeleton as edited: valid until the next call. Buffers are always private copies.

        Args:
            edit: The edit; an empty one gives the dense model.
            private: Copy parameters that do not shrink, too.
        """
        made: dict[int, Tensor] = {}
        changed = set()
        self._restore()
        self._exchange(edit.graphs)
        self._leave_out(edit.dropped)
        for owner in self._owners:
            if not self._around[owner.module].isdisjoint(edit.dropped):
                continue
            if id(owner.tensor) not in made:
                made[id(owner.tensor)] = self._edited(owner, edit, private)
            owner.holder[owner.key] = made[id(owner.tensor)]
            if owner.name in edit.slices or owner.name in edit.zeroed:
                changed |= {owner.module, *_parents(owner.module)}
        self._rewrite(edit.attributes)
        resized = self._resize.keys() if private else (self._changed | changed) & self._resize.keys()
        for name in sorted(resized, key=lambda name: -name.count(".") - bool(name)):  # inner modules come first
            self._resize[name](self._modules[name])
        self._changed = changed
        return self.skeleton

    def release(self) -> None:
        """Keep no tensor of the last cut: until the next one, the skeleton holds the model's own and must not run."""
        for owner in self._owners:
            owner.holder[owner.key] = owner.tensor

    def _leave_out(self, dropped: Mapping[str, Any]) -> None:
        """Put modules without parameters in place of those that are dropped."""
        for name, returns in dropped.items():
            made = Dropped(self._modules[name], returns)
            for holder, key in self._spots[name]:
                self._left_out.append((holder, key, holder[key]))
                holder[key] = made

    def _restore(self) -> None:
        """Put the modules back that the last cut left out."""
        for holder, key, original in self._left_out:
            holder[key] = original
        self._left_out.clear()

    def _exchange(self, graphs: Mapping[str, Description]) -> None:
        """Put recorded modules in place of their originals, and restore the originals of the last cut.

        Both hold the same dictionaries of parameters, buffers and submodules.
        """
        for name, description in graphs.items():
            made = self._recorded.get(name)
            if made is None or made.description != description:
                if made is not None:
                    self._replace(made, self._modules[name])
                self._recorded[name] = RecordedModule(self._modules[name], description)
        for name, made in self._recorded.items():
            original = self._modules[name]
            self._replace(*((original, made) if name in graphs else (made, original)))

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        if self.skeleton is old:
            self.skeleton = new
            new.training = old.training
        for parent in self._modules.values():
            for key, child in parent._modules.items():
                if child is old:
                    parent._modules[key] = new
                    new.training = old.training

    def rerank(self) -> None:
        """Rank elements again, because the weights have changed."""
        self._ranks.clear()

    def _edited(self, owner: Owner, edit: Edit, private: bool) -> Tensor:
        kept = edit.slices.get(owner.name, {})
        zeroed = edit.zeroed.get(owner.name, 0)
        if not zeroed:
            return _sliced(owner.tensor, kept, private)
        if owner.name in edit.patterns:
            whole = _sliced(owner.tensor, kept, private).detach()
            gone = Pattern.parse(edit.patterns[owner.name]).mask(whole.square(), zeroed)
            return nn.Parameter(whole.masked_fill(gone, 0), requires_grad=owner.tensor.requires_grad)
        if kept:
            whole = _sliced(owner.tensor, kept, private).detach()
            ranks = magnitude_ranks(whole)
        else:
            whole = owner.tensor.detach()
            if owner.name not in self._ranks:
                self._ranks[owner.name] = magnitude_ranks(whole)
            ranks = self._ranks[owner.name]
        return nn.Parameter(whole.masked_fill(ranks < zeroed, 0), requires_grad=owner.tensor.requires_grad)

    def _rewrite(self, attributes: Mapping[str, Mapping[str, int]]) -> None:
        """Set sizes kept in Python, and restore those of the last cut to their dense values."""
        wanted = {(name, path): value for name, values in attributes.items() for path, value in values.items()}
        for (name, path), value in {**self._dense, **wanted}.items():
            module = self._modules[name]
            if "." in path or hasattr(module, path):  # a forward that calls F.conv2d may compute its groups
                self._dense.setdefault((name, path), size_held(module, path))
                hold_size(module, path, value)
                if name in self._recorded:
                    hold_size(self._recorded[name], path, value)


class FreshCuts:
    """Cuts of a model for one run each, of modules in which no earlier run has left anything.

    Args:
        model: As for `Slicer`. Its modules are copied again only after a run that left something in them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._slicer: Slicer | None = None
        self._before: list[Any] | None = None

    def cut(self, edit: Edit) -> nn.Module:
        """Return the model as edited: valid until the next call."""
        slicer = self._slicer
        if slicer is None or not same_state(self._before, python_state(slicer.skeleton)):
            slicer = Slicer(self._model)
        self._slicer = None  # a cut that a user's class refuses may have changed some modules
        module = slicer.cut(edit)
        self._slicer = slicer
        self._before = python_state(module)
        return module


def build(model: nn.Module, edit: Edit) -> nn.Module:
    """Build a plain module that shares no state with `model`.

    Args:
        model: The dense model; stays as it is.
        edit: The edit; an empty one gives a copy.

    Returns:
        A module of the same class, in the same training mode, on the same device.
    """
    built = Slicer(model).cut(edit, private=True)
    recorded = [module for module in built.modules() if isinstance(module, RecordedModule)]
    for module in recorded:
        module.own()
    if any(module.takes(name) for module in recorded for name in CACHES):
        _run_without_cache(built)
    return built


def _run_without_cache(built: nn.Module) -> None:
    """Let a model of transformers keep no keys and values, which recorded modules did not see in the example inputs."""
    for name in ("config", "generation_config"):
        holder: Any = getattr(built, name, None)
        if getattr(holder, "use_cache", False) is True:
            holder.use_cache = False


def _parents(name: str) -> list[str]:
    """Names of the modules around a module, the model itself (the empty name) last."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]


def _sliced(tensor: Tensor, kept: Mapping[int, IntArray], private: bool) -> Tensor:
    parameter = isinstance(tensor, nn.Parameter)
    if parameter and not kept and not private:
        return tensor
    data = tensor.detach()
    for dim, index in kept.items():
        data = data.index_select(dim, torch.from_numpy(index).to(data.device))
    data = _laid_out_as(tensor, data) if kept else data.clone()
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if parameter else data


def _laid_out_as(dense: Tensor, sliced: Tensor) -> Tensor:
    """Restore the order of dimensions in memory: PyTorch's selection loses the channels-last format.

    Kernels convert a weight of another format again in each pass, which takes time and memory.
    """
    strides = dense.stride()
    order = sorted(range(dense.ndim), key=lambda dim: -strides[dim])
    if order == list(range(dense.ndim)):
        return sliced
    stored = sliced.new_empty([sliced.shape[dim] for dim in order])  # not contiguous(), which keeps strides of size 1
    return stored.permute([order.index(dim) for dim in range(dense.ndim)]).copy_(sliced)


def magnitude_ranks(tensor: Tensor) -> Tensor:
    """Rank of each element by rising magnitude, ties in memory order; int32 or int64, same shape."""
    order = tensor.flatten().abs().argsort(stable=True)
    ranks = torch.empty_like(order, dtype=torch.int32 if order.numel() < 2**31 else torch.int64)
    ranks[order] = torch.arange(order.numel(), dtype=ranks.dtype, device=order.device)
    return ranks.view(tensor.shape)
