"""Rewriting of modules whose code does not follow the widths, as descriptions that do.

The forward of a smaller model stops at some operation because code ties sizes, ``B, N, C = x.shape`` and later
``reshape(B, N, C)`` for example. The smallest module around that operation is recorded at several input sizes and
described by its own calls (see `describe`). The description is used if the forward then gets further.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from autoprune.structure.checks.checks import Checker
from autoprune.structure.example import Example
from autoprune.structure.labels import Propagation
from autoprune.structure.rewriting.capture import Capture, Frame
from autoprune.structure.rewriting.describe import NotFollowedError, Run, describe
from autoprune.structure.rewriting.graph_module import Description, RecordedModule
from autoprune.structure.slicing.adapters import adapter_of
from autoprune.structure.slicing.skeleton import ForwardModule, call_with, skeleton
from autoprune.structure.tracing.record import CallForward, Inputs
from autoprune.structure.tracing.trace import trace
from autoprune.structure.units import Units, find_units

log = logging.getLogger(__name__)

REACH = 8
"""Number of operations after its end for which a module is still a candidate."""

MOST_TRIED = 6
"""Most modules that are tried at one operation."""

DRAWS = 2
"""Number of smaller models that are followed: in one of them, tied widths may be equal by chance."""

MOST_SIZES = 24
"""Most other input sizes that are tried."""


def rewritten(model: nn.Module, graphs: Mapping[str, Description]) -> nn.Module:
    """Copy the modules of `model`, sharing its tensors, with some replaced by their recordings."""
    return put(skeleton(model), graphs) if graphs else model


def put(model: nn.Module, graphs: Mapping[str, Description]) -> nn.Module:
    """Replace modules in place; also the model itself, if the empty name is among them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    made = {name: RecordedModule(modules[name], description) for name, description in graphs.items()}
    for name, module in made.items():
        original = modules[name]
        for parent in modules.values():
            for key, child in parent._modules.items():
                if child is original:
                    parent._modules[key] = module
    return made.get("", model)


class Recordings:
    """Recorded calls of every module of a model that is not one of PyTorch's layers, at several input sizes.

    Args:
        example: The model with its calls.
        flow: Labels of the pass in these calls.
        units: Their units.
    """

    def __init__(self, example: Example, flow: Propagation, units: Units) -> None:
        self.modules = dict(example.model.named_modules())
        self._example = example
        self._meta = flow.record.device == "meta"
        self._runs: dict[str, list[Run]] = {}
        self._training: dict[str, list[Frame]] = {}
        self._add(self._base(flow), flow, units)
        for choices in other_sizes(example.inputs):
            worked = 0
            for inputs in choices:
                try:
                    frames = self._run(inputs, training=False)
                except Exception as error:  # the model may not work at other sizes
                    log.debug("not recorded at another size: %r", error)
                    continue
                self._add(frames, None, None)
                worked += 1
                if worked == 2:
                    break
        try:
            for frame in self._run(example.inputs, training=True):
                self._training.setdefault(frame.name, []).append(frame)
        except Exception as error:  # as above; the calls of evaluation then count for training, too
            log.info("not recorded in training mode: %r", error)

    def wanted(self, name: str) -> bool:
        """Return whether a module has a forward of its own, not one of PyTorch's layers."""
        module = self.modules[name]
        return adapter_of(module) is None and type(module).forward is not nn.Sequential.forward

    def describe(self, name: str) -> Description:
        """Describe a module.

        Raises:
            NotFollowedError: If its calls do not determine a description.
        """
        runs, training = self._runs.get(name, []), self._training.get(name, [])
        if not runs:
            raise NotFollowedError("it is not called")
        return describe(self.modules[name], runs, training[0] if training else None)

    def _base(self, flow: Propagation) -> list[Frame]:
        frames: list[Frame] = []
        record = trace(replace(self._example, forward=self._watched(frames)))
        same = [op.func for op in record.ops] == [op.func for op in flow.record.ops]
        if not same:
            raise NotFollowedError("the model runs other operations each time")
        return frames

    def _watched(self, frames: list[Frame]) -> CallForward:
        def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with Capture(model, self.wanted).watching(model) as capture:
                out = self._example.forward(model, *args, **kwargs)
            frames.extend(capture.frames)
            return out

        return run

    def _run(self, calls: Sequence[Inputs], *, training: bool) -> list[Frame]:
        frames: list[Frame] = []
        copied = skeleton(self._example.model).eval()
        if training:
            for module in copied.modules():  # batch norm refuses to train on one value a channel
                module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)

        def place(leaf: Any) -> Any:
            return leaf.detach().to("meta") if self._meta and isinstance(leaf, Tensor) else leaf

        call = ForwardModule(copied, self._watched(frames))
        state = {name: place(tensor) for name, tensor in (*call.named_parameters(), *call.named_buffers())}
        for args, kwargs in calls:
            call_with(call, state, tree_map(place, (args, dict(kwargs))))
        return frames

    def _add(self, frames: list[Frame], flow: Propagation | None, units: Units | None) -> None:
        for frame in frames:
            runs = self._runs.setdefault(frame.name, [])
            runs.append(Run(frame, frame.shapes))
            if flow is not None and units is not None:
                runs.append(Run(frame, _imagined(frame, flow, units), imagined=True))


def _imagined(frame: Frame, flow: Propagation, units: Units) -> list[tuple[int, ...]]:
    """Compute the shapes of the tensors of a call at large random widths, which no sum or product of others gives."""
    widths = np.random.default_rng(0).integers(10**5, 10**6, len(units.groups)).tolist()
    shapes = []
    for shape, value in zip(frame.shapes, frame.values, strict=True):
        dims = [None] * len(shape) if value < 0 else flow.of(value)
        if len(dims) != len(shape):  # reshaped in place
            dims = [None] * len(shape)
        affine = [units.affine(labels, size) for labels, size in zip(dims, shape, strict=True)]
        shapes.append(tuple(size.fixed + sum(each * widths[group] for group, each in size.shares) for size in affine))
    return shapes


def other_sizes(calls: Sequence[Inputs]) -> Iterator[Iterator[list[Inputs]]]:
    """Vary the inputs by longer dimensions, in a few ways: each alone, and all of one size together."""
    flat, tree = tree_flatten([(args, dict(kwargs)) for args, kwargs in calls])
    dims = [(i, d, leaf.shape[d]) for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) for d in range(leaf.ndim)]
    by_size: dict[int, list[tuple[int, int]]] = {}
    for i, d, size in dims:
        by_size.setdefault(size, []).append((i, d))
    firsts = [(i, d) for i, d, _ in dims if d == 0]
    sets = [[(i, d)] for i, d, _ in dims] + [*by_size.values(), firsts]
    chosen = [places for n, places in enumerate(sets) if places and places not in sets[:n]]

    def longer(places: list[tuple[int, int]]) -> Iterator[list[Inputs]]:
        for times, more in ((1, 1), (2, 0), (3, 0)):
            leaves = list(flat)
            for i, d in places:
                leaves[i] = _longer(leaves[i], d, times * leaves[i].shape[d] + more)
            yield tree_unflatten(leaves, tree)

    return (longer(places) for places in chosen[:MOST_SIZES])


def _longer(tensor: Tensor, dim: int, size: int) -> Tensor:
    """Lengthen a dimension by repeating its values, so that indices stay valid."""
    index = torch.arange(size, device=tensor.device) % tensor.shape[dim]
    return tensor.detach().index_select(dim, index)


class Rewriter:
    """Chooses the modules to rewrite while a smaller model is followed.

    Args:
        example: The model with its calls.
        flow: Labels of the pass in these calls.
    """

    def __init__(self, example: Example, flow: Propagation) -> None:
        self._example = example
        self._flow = flow
        self._recordings: Recordings | None = None
        self._described: dict[str, Description | None] = {}
        self.reasons: dict[str, str] = {}

    def candidates(self, at: int, graphs: Mapping[str, Description]) -> Iterator[dict[str, Description]]:
        """Propose sets of modules to rewrite, the smallest around operation `at` first, each with all of its class."""
        tried: set[type[nn.Module]] = set()
        for name in self._around(at):
            kind = type(self._recorded.modules[name])
            if name in graphs or kind in tried or self._description(name) is None:
                continue
            tried.add(kind)
            names = (other for other, module in self._recorded.modules.items() if type(module) is kind)
            like = {other: made for other in names if (made := self._description(other)) is not None}
            yield {**graphs, **like}

    def _around(self, at: int) -> list[str]:
        """Find modules that ran around an operation or ended shortly before it, those of few operations first."""
        calls = [call for call in self._flow.record.calls if call.first <= at < call.last + REACH]
        calls.sort(key=lambda call: (call.last <= at and at - call.last, call.last - call.first))
        return [name for name in dict.fromkeys(call.name for call in calls) if self._recorded.wanted(name)][:MOST_TRIED]

    @property
    def _recorded(self) -> Recordings:
        if self._recordings is None:
            units = find_units(self._flow)
            self._recordings = Recordings(self._example, self._flow, units)
        return self._recordings

    def _description(self, name: str) -> Description | None:
        if name not in self._described:
            self._described[name] = None
            try:
                self._described[name] = self._recorded.describe(name)
            except NotFollowedError as error:
                log.info("%s is not rewritten: %s", name or "the model", error)
                self.reasons[name] = str(error)
        return self._described[name]


def find_rewrites(checker: Checker) -> dict[str, Description]:
    """Find the modules to deliver as graphs, so that a smaller model runs as recorded.

    Args:
        checker: Follows the model; it keeps the sizes that it finds.
    """
    model = checker.example.model
    flow = checker.flow
    rewriter = Rewriter(checker.example, flow)
    graphs: dict[str, Description] = {}
    stuck: dict[str, str] = {}
    for draw in range(DRAWS):
        units = find_units(flow, stuck)
        found = checker.follow(units, draw)
        while found.stuck:
            for more in rewriter.candidates(found.reached, graphs):
                other = checker.on(rewritten(model, more), more)
                if other.reach(units, draw) > found.reached:
                    checker = other
                    graphs = more
                    found = other.follow(units, draw)
                    break
            else:
                stuck |= checker.sizes.stuck_alike(units, found)
                units = find_units(flow, stuck)
                found = checker.follow(units, draw)
    return graphs
