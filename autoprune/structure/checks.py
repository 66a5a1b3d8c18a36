"""Three checks of a structure before anything relies on it; each alone misses errors that the others catch.

*Permutation*: the record run with units permuted inside every group, in all tensors, must give the model's outputs.
*Replay*: the record run with sliced tensors must agree with the record run dense and masked. *Module*: the user's own
forward on the sliced module must agree with the sliced replay. Shapes are tried on the meta device first, because a
wrong slice may kill the process in a native kernel.

The record needs copies of what one operation reads, and no more. A sliced module needs a copy of every tensor that it
cuts, so large models are cut in batches of groups: extra memory stays below `ALLOWANCE`, or a copy of what the largest
group touches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.protocols import IntArray, Pruning
from autoprune.structure.attributes import Found, find_attributes, groups_near
from autoprune.structure.containers import map_tensors, tensors_in
from autoprune.structure.propagate import Edge, Propagation
from autoprune.structure.record import Forward, Inputs
from autoprune.structure.replay import Replay
from autoprune.structure.skeleton import Call, call_with, skeleton
from autoprune.structure.slicing import Slicer, owners
from autoprune.structure.structure import Attribute, Structure, assemble
from autoprune.structure.training import run_in_training
from autoprune.structure.units import Group, Slot, Units, find_units, first_labels

ALLOWANCE = 2**28
"""Bytes of tensors that the module check cuts at once; a single group may touch more."""


@dataclass(frozen=True)
class Example:
    """A model with inputs to run it on.

    Attributes:
        model: Never changed; copies of it run.
        args: Positional inputs, on the model's device.
        kwargs: Keyword inputs.
        forward: Runs a model on them.
        further: More inputs, which take other branches of the forward.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    forward: Forward
    further: Sequence[Inputs] = ()

    @property
    def inputs(self) -> list[Inputs]:
        """The inputs of every call."""
        return [(self.args, self.kwargs), *self.further]

    def run(
        self, model: nn.Module, *, meta: bool = False, mode: AbstractContextManager[Any] | None = None
    ) -> list[Tensor]:
        """Output tensors of `model`, put in evaluation mode, for all inputs; on the meta device just their shapes."""
        model.eval()
        place = _on_meta if meta else _copied
        call = Call(model, self.forward)
        state = {name: place(tensor) for name, tensor in (*call.named_parameters(), *call.named_buffers())}
        outputs = []
        for inputs in self.inputs:
            args, kwargs = map_tensors(place, (inputs[0], dict(inputs[1])))
            outputs.append(call_with(call, state, args, kwargs, mode, decomposed=mode is not None))
        return tensors_in(outputs)

    def run_in_training(self, model: nn.Module, *, meta: bool) -> list[Tensor]:
        """Output tensors of `model` in training mode for the first inputs, without what training makes random."""
        place = _on_meta if meta else _copied
        state = {f"model.{name}": place(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        return run_in_training(model, self.forward, state, map_tensors(place, (self.args, dict(self.kwargs))))


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _copied(tensor: Tensor) -> Tensor:
    """A copy, because a forward may write to it, of what is no parameter."""
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()


class Checker:
    """Runs the checks on one example, and finds the largest set of groups that passes them.

    Args:
        flow: Labels of the traced pass.
        example: The model and the inputs it was traced on.
        untouched: Parameters that the pass did not read.
        max_seconds: When the checks end; groups not checked by then are frozen.
        seed: Draws the units that the checks remove and permute.
    """

    def __init__(
        self, flow: Propagation, example: Example, untouched: tuple[str, ...], max_seconds: float, seed: int
    ) -> None:
        self.flow = flow
        self.example = example
        self.untouched = untouched
        self.seed = seed
        self.deadline = time.monotonic() + max_seconds
        self.max_seconds = max_seconds
        named = (*example.model.named_parameters(), *example.model.named_buffers())
        self.tensors = {name: tensor.detach() for name, tensor in named}
        self.inputs = tensors_in([(a, dict(k)) for a, k in example.inputs], objects=True)
        self.dense = example.run(skeleton(example.model))
        # What only runs on the meta device is cut there as well, which costs no memory.
        self.shapes = _hollow(example.model) if flow.record.device == "meta" else example.model
        self.attributes: tuple[Attribute, ...] = ()

    def on(self, model: nn.Module) -> Checker:
        """The same checks of a model that does the same by other code."""
        example = replace(self.example, model=model)
        return Checker(self.flow, example, self.untouched, self.max_seconds, self.seed)

    def failures(self) -> dict[str, str]:
        """Groups that must be frozen, each with the check that it failed; fills in `attributes` on the way."""
        reasons = self._rewrite_sizes()
        units = find_units(self.flow, reasons)
        if not units.groups or self._error(units, set(reasons)) is None:
            return reasons
        names = [group.name for group in units.groups]
        units = find_units(self.flow)
        for name in names:
            late = time.monotonic() > self.deadline
            others = {group.name for group in units.groups} - {name}
            error = f"not checked within {self.max_seconds:.0f} s" if late else self._error(units, others)
            if error is not None:
                reasons[name] = error
        alone = [name for name in names if name not in reasons]
        if alone and (error := self._error(units, set(reasons))) is not None:
            passed = self._largest(units, alone, set())
            reasons |= {name: f"fails together with others: {error}" for name in alone if name not in passed}
        return reasons

    def _rewrite_sizes(self) -> dict[str, str]:
        """Find the sizes kept in Python, and groups that code ties, giving up groups until the forward runs through."""
        stuck: dict[str, str] = {}
        units = find_units(self.flow)
        found = self.follow(units)
        while found.stuck and time.monotonic() < self.deadline:
            further = self._tie(units, found, stuck) or self._give_up_one(units, found, stuck)
            if further is None:
                stuck |= found.stuck
            units = find_units(self.flow, stuck)
            found = further or self.follow(units)
        self.attributes = found.attributes
        return stuck

    def _give_up_one(self, units: Units, found: Found, stuck: dict[str, str]) -> Found | None:
        """Freeze the one group nearby without which the forward gets furthest, if there is one."""
        best, name = found, None
        for group in groups_near(self.flow, units, found.reached):
            reason = found.stuck.get(group.name, f"{self.flow.record.ops[found.reached].where()} needs its full size")
            again = self.follow(find_units(self.flow, {**stuck, group.name: reason}))
            if again.reached > best.reached:
                best, name = again, group.name
                stuck_reason = reason
        if name is None:
            return None
        stuck[name] = stuck_reason
        return best

    def follow(self, units: Units) -> Found:
        """Follow the forward of a smaller model as far as it goes, rewriting sizes kept in Python on the way."""
        rng = np.random.default_rng(self.seed)
        pruning = Pruning({group.name: _some(group, rng) for group in units.groups})
        replay = Replay(self.flow, units, assemble(self.flow, units).keep(pruning))

        def cut(attributes: tuple[Attribute, ...]) -> nn.Module:
            # A fresh copy each time, because modules may keep what they computed.
            return Slicer(self.shapes).cut(assemble(self.flow, units, attributes=attributes).edit(pruning))

        def run(module: nn.Module, mode: AbstractContextManager[Any]) -> None:
            self.example.run(module, meta=self.flow.record.device == "meta", mode=mode)

        return find_attributes(self.flow, units, replay, cut, run)

    def _tie(self, units: Units, found: Found, stuck: Mapping[str, str]) -> Found | None:
        """Join a group in the way with one nearby of equal size, if the forward then gets further.

        Code such as ``self.reduce(x).reshape(b, x.shape[1], -1)`` needs equal counts where no operation does.
        """
        nearby = groups_near(self.flow, units, found.reached)
        for blocked, other in [(a, b) for a in nearby if a.name in found.stuck for b in nearby if a is not b]:
            if blocked.size == other.size:
                first, second = (first_labels(self.flow, group) for group in (blocked, other))
                self.flow.edges.append(Edge(found.reached, first, second))
                again = self.follow(find_units(self.flow, stuck))
                if again.reached > found.reached:
                    return again
                self.flow.edges.pop()
        return None

    def _largest(self, units: Units, candidates: list[str], passed: set[str]) -> set[str]:
        """Add to `passed` the candidates that still pass jointly, halving what fails."""
        everyone = {group.name for group in units.groups}
        if time.monotonic() > self.deadline:
            return passed
        if self._error(units, everyone - passed - set(candidates)) is None:
            return passed | set(candidates)
        if len(candidates) == 1:
            return passed
        half = len(candidates) // 2
        return self._largest(units, candidates[half:], self._largest(units, candidates[:half], passed))

    def _error(self, everything: Units, without: set[str]) -> str | None:
        """What goes wrong when all groups but some are pruned at once, or None."""
        units = find_units(self.flow, dict.fromkeys(without, "not under test")) if without else everything
        rng = np.random.default_rng(self.seed)
        try:
            self._permutation(units, rng)
            structure = assemble(self.flow, units, self.untouched, self.attributes)
            for pruning in _draws(units.groups, rng):
                self._slices(units, structure, pruning)
        except _CheckError as error:
            return str(error)
        except Exception as error:  # whatever the user's forward raises on a smaller module is a failed check
            return f"the forward of a smaller module raised {type(error).__name__}: {error}"
        return None

    def _permutation(self, units: Units, rng: np.random.Generator) -> None:
        order = {group.name: rng.permutation(group.size) for group in units.groups}
        slots: dict[str, list[tuple[Slot, IntArray]]] = {}
        for group in units.groups:
            for slot in group.slots:
                slots.setdefault(slot.tensor, []).append((slot, order[group.name]))

        def permuted(value: int, tensor: Tensor) -> Tensor:
            for slot, moved in slots.get(self.flow.record.values[value].name, ()):
                target = torch.from_numpy(slot.indices.reshape(-1)).to(tensor.device)
                source = torch.from_numpy(slot.indices[moved].reshape(-1)).to(tensor.device)
                tensor = tensor.index_copy(slot.dim, target, tensor.index_select(slot.dim, source))
            return tensor

        replay = Replay(self.flow, units, np.ones(len(units.group_of), dtype=bool))
        _compare("permutation", replay.prepared(self.tensors, self.inputs, permuted), self.dense)

    def _slices(self, units: Units, structure: Structure, pruning: Pruning) -> None:
        """The replay and the module check."""
        replay = Replay(self.flow, units, structure.keep(pruning))
        sliced = replay.sliced(self.tensors, self.inputs)
        _compare("replay", sliced, replay.masked(self.tensors, self.inputs))
        edit = structure.edit(pruning)
        if structure.device == "meta":
            # A copy of its own, because modules may keep what they computed on the meta device.
            shapes = [tuple(out.shape) for out in self.example.run(Slicer(self.shapes).cut(edit), meta=True)]
            if shapes != [tuple(out.shape) for out in sliced]:
                raise _CheckError(f"the module check saw outputs of shapes {shapes} on the sliced module")
        for part in self._batches(units.groups, pruning):
            cut = Slicer(self.example.model).cut(structure.edit(part))
            if len(part.kept) < len(pruning.kept):
                sliced = Replay(self.flow, units, structure.keep(part)).sliced(self.tensors, self.inputs)
            _compare("module", self.example.run(cut), sliced)

    def misfit_in_training(self, units: Units, structure: Structure) -> str:
        """What goes wrong when a smaller module runs in training mode, in shapes; empty where nothing does."""
        record = self.flow.record
        if not record.training:
            return ""
        rng = np.random.default_rng(self.seed)
        pruning = Pruning({group.name: _some(group, rng) for group in units.groups})
        replay = Replay(self.flow, units, structure.keep(pruning))
        cut = Slicer(self.shapes).cut(structure.edit(pruning))
        try:
            found = self.example.run_in_training(cut, meta=record.device == "meta")
        except Exception as error:  # whatever the user's forward raises on a smaller module
            return f"a smaller model raised {type(error).__name__}: {error}".partition("\n")[0][:160]
        expected = [replay.shape(value) for value in record.trained]
        shapes = [tuple(out.shape) for out in found]
        return "" if shapes == expected else f"a smaller model returned shapes {shapes} instead of {expected}"

    def _batches(self, groups: Sequence[Group], pruning: Pruning) -> list[Pruning]:
        """The same pruning in parts whose cut tensors take no more memory than allowed, a group at least."""
        parts: list[dict[str, tuple[int, ...]]] = [{}]
        touched: set[str] = set()
        for group in (group for group in groups if group.name in pruning.kept):
            own = {slot.tensor for slot in group.slots}
            if parts[-1] and sum(self.tensors[name].nbytes for name in own | touched) > ALLOWANCE:
                parts.append({})
                touched = set()
            parts[-1][group.name] = pruning.kept[group.name]
            touched |= own
        return [Pruning(part) for part in parts]


class _CheckError(Exception):
    pass


def _hollow(model: nn.Module) -> nn.Module:
    """The modules of a model with parameters and buffers on the meta device; tied ones stay tied."""
    hollow = skeleton(model)
    made: dict[int, Tensor] = {}
    for owner in owners(hollow):
        if id(owner.tensor) not in made:
            bare = owner.tensor.detach().to("meta")
            grad = owner.tensor.requires_grad
            made[id(owner.tensor)] = nn.Parameter(bare, grad) if isinstance(owner.tensor, nn.Parameter) else bare
        owner.holder[owner.key] = made[id(owner.tensor)]
    return hollow


def _draws(groups: Sequence[Group], rng: np.random.Generator) -> list[Pruning]:
    """One unit fewer of every group, then random units of the groups whose number has a bit set, for each bit.

    The first is what misplaced units show in most; after the others, of any two groups one was once pruned without the
    other, which shows sizes that the code needs to be equal.
    """
    draws = [{group.name: _some(group, rng, group.size - group.multiple) for group in groups}]
    for bit in range(len(groups).bit_length()):
        chosen = [group for i, group in enumerate(groups, 1) if i >> bit & 1]
        draws.append({group.name: _some(group, rng) for group in chosen})
    return [Pruning(kept) for kept in draws]


def _some(group: Group, rng: np.random.Generator, count: int | None = None) -> tuple[int, ...]:
    """Random units to keep, in a random number unless given: at least one stays, at least one goes."""
    most = (group.size - 1) // group.multiple
    count = group.multiple * int(rng.integers(1, most + 1)) if count is None else count
    return tuple(sorted(rng.choice(group.size, count, replace=False).tolist()))


def _compare(check: str, found: list[Tensor], expected: list[Tensor]) -> None:
    if len(found) != len(expected):
        raise _CheckError(f"the {check} check saw {len(found)} outputs instead of {len(expected)}")
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            raise _CheckError(f"the {check} check saw shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        if not a.numel():
            continue
        wide = torch.float64 if a.is_floating_point() else a.dtype
        gap = (a.to(wide) - b.to(wide)).abs().max().item() if a.dtype != torch.bool else (a != b).any().item()
        scale = max(b.to(wide).abs().max().item(), 1e-6) if a.dtype != torch.bool else 1.0
        # Capped, because 16-bit floats would otherwise pass whatever they are given.
        tolerance = min(100 * torch.finfo(a.dtype).eps ** 0.875, 0.1) if a.is_floating_point() else 0.0
        if not gap <= tolerance * scale:
            raise _CheckError(f"the {check} check saw outputs differ by {gap / scale:.1e} of their size")
