"""Three checks of a structure before anything relies on it; each alone misses errors that the others catch.

*Permutation*: the record run with units permuted inside every group, in all tensors, must give the model's outputs.
*Replay*: the record run with sliced tensors must agree with the record run dense and masked. *Module*: the user's own
forward on the sliced module must agree with the sliced replay. Shapes are tried on the meta device first, because a
wrong slice may kill the process in a native kernel.

The record runs in float64 where the device has it, and so does the module where that is no larger than `WIDE`; how
what is left of rounding is told from an error is `rounding`'s matter. The work is bounded by the number of kinds of
groups, not by a clock: groups whose names differ in numbers alone, as in repeated blocks, are tried together.

The record needs copies of what one operation reads, and no more. A sliced module needs a copy of every tensor that it
cuts, so large models are cut in batches of groups: extra memory stays below `ALLOWANCE`, or a copy of what the largest
group touches.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.protocols import IntArray, Pruning
from autoprune.sources import seeded
from autoprune.structure.attributes import Found
from autoprune.structure.containers import map_tensors, tensors_in
from autoprune.structure.propagate import Propagation
from autoprune.structure.record import Forward, Inputs
from autoprune.structure.replay import Replay, widened
from autoprune.structure.rounding import CheckError, compare, native_tolerances, wide_tolerances
from autoprune.structure.sizes import Sizes, some
from autoprune.structure.skeleton import Call, call_with, skeleton
from autoprune.structure.slicing import Slicer, owners
from autoprune.structure.structure import Structure, assemble
from autoprune.structure.training import run_in_training
from autoprune.structure.units import Group, Slot, Units, find_units

ALLOWANCE = 2**28
"""Bytes of tensors that the module check cuts at once; a single group may touch more."""

WIDE = 2**30
"""Bytes that a model may take in float64 for its own forward to be checked in that type."""

log = logging.getLogger(__name__)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make floating-point tensors in another type where code names none."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
        self,
        model: nn.Module,
        *,
        meta: bool = False,
        mode: AbstractContextManager[Any] | None = None,
        wide: bool = False,
    ) -> list[Tensor]:
        """Output tensors of `model`, put in evaluation mode, for all inputs; the same random numbers each time.

        Args:
            model: Runs with copies of the inputs and of its buffers.
            meta: Run on the meta device, for the shapes.
            mode: Watches the operations.
            wide: Run in float64, tensors made on the way included; raises where the forward insists on another type.
        """
        model.eval()

        def place(leaf: Tensor) -> Tensor:
            if wide and widened(leaf) is not leaf:
                return nn.Parameter(widened(leaf.detach())) if isinstance(leaf, nn.Parameter) else widened(leaf)
            return _on_meta(leaf) if meta else _copied(leaf)

        call = Call(model, self.forward)
        state = {name: place(tensor) for name, tensor in (*call.named_parameters(), *call.named_buffers())}
        outputs = []
        with seeded(0), default_dtype(torch.float64 if wide else torch.get_default_dtype()):
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
    """Runs the checks on one example, and finds a large set of groups that passes them jointly.

    Args:
        flow: Labels of the traced pass; ties that the code needs are added to its edges.
        example: The model and the inputs it was traced on.
        untouched: Parameters that the pass did not read.
        seed: Draws the units that the checks remove and permute.

    Attributes:
        sizes: The sizes kept in Python, the ties and what is stuck.
    """

    def __init__(self, flow: Propagation, example: Example, untouched: tuple[str, ...], seed: int) -> None:
        self.flow = flow
        self.example = example
        self.untouched = untouched
        self.seed = seed
        self._measured = False
        named = (*example.model.named_parameters(), *example.model.named_buffers())
        self.tensors = {name: tensor.detach() for name, tensor in named}
        self.inputs = tensors_in([(a, dict(k)) for a, k in example.inputs], objects=True)
        # What only runs on the meta device is cut there as well, which costs no memory.
        self.shapes = _hollow(example.model) if flow.record.device == "meta" else example.model
        self.sizes = Sizes(flow, self.shapes, self._module_of, self._follow, seed)

    @cached_property
    def dense(self) -> list[Tensor]:
        """Outputs of the model as it is, in its own type."""
        return self.example.run(skeleton(self.example.model))

    def on(self, model: nn.Module, other: Collection[str]) -> Checker:
        """The same checks of a model that does the same by other code in some modules, named in `other`."""
        checker = Checker(self.flow, replace(self.example, model=model), self.untouched, self.seed)
        checker.sizes.known |= {where: place for where, place in self.sizes.known.items() if where[0] not in other}
        return checker

    def failures(self) -> dict[str, str]:
        """Groups that must be frozen, each with the check that it failed."""
        reasons = self.sizes.settle()
        names = [group.name for group in find_units(self.flow, reasons).groups]
        if names and self.error(reasons) is not None:
            self._grow(set(), _kinds(names), reasons)
        return reasons

    def follow(self, units: Units, draw: int) -> Found:
        """Follow the forward of a smaller model as far as it goes, rewriting sizes kept in Python on the way."""
        return self.sizes.follow(units, self.seed + draw)

    def reach(self, units: Units, draw: int) -> int:
        """Operation up to which the forward of a smaller model runs with the sizes found so far."""
        return self.sizes.reach(units, self.seed + draw)

    def error(self, frozen: Mapping[str, str]) -> str | None:
        """What goes wrong when all groups but some are pruned at once, or None."""
        if not self._measured:
            self._measure_rounding()
        units = find_units(self.flow, frozen)
        rng = np.random.default_rng(self.seed)
        try:
            self._permutation(units, rng)
            structure = assemble(self.flow, units, self.untouched, self.sizes.attributes)
            for pruning in _draws(units.groups, rng):
                self._values(units, structure, pruning)
            for pruning in _apart(units.groups, rng):
                self._shapes(units, structure, pruning)
        except CheckError as error:
            return str(error)
        except Exception as error:  # whatever the user's forward raises on a smaller module is a failed check
            return f"the forward of a smaller module raised {type(error).__name__}: {error}"
        return None

    def _grow(self, passed: set[str], parts: list[list[str]], reasons: dict[str, str]) -> set[str]:
        """Add to `passed` the parts that still pass with it, halving what fails; says why a part does not."""
        tried = {*passed, *(name for part in parts for name in part)}
        everyone = [group.name for group in find_units(self.flow).groups]
        frozen = {**reasons, **{name: "not under test" for name in everyone if name not in tried}}
        error = self.error(frozen)
        if error is None:
            return tried
        if len(parts) == 1 and len(parts[0]) == 1:
            reasons[parts[0][0]] = f"fails together with others: {error}" if passed else error
            return passed
        if len(parts) > 1:
            half = len(parts) // 2
            return self._grow(self._grow(passed, parts[:half], reasons), parts[half:], reasons)
        return self._grow_alike(passed, parts[0], reasons)

    def _grow_alike(self, passed: set[str], names: list[str], reasons: dict[str, str]) -> set[str]:
        """The same for groups of one kind: where the first and the last fail, so do all."""
        ends = self._grow(self._grow(passed, [names[:1]], reasons), [names[-1:]], reasons)
        inner = [name for name in names if name not in (names[0], names[-1])]
        if ends == passed:
            reasons |= dict.fromkeys(inner, f"like {names[0]}: {reasons[names[0]]}")
            return passed
        half = (len(inner) + 1) // 2
        parts = [part for part in (inner[:half], inner[half:]) if part]
        for part in parts:
            ends = self._grow(ends, [part], reasons)
        return ends

    def _module_of(self, units: Units, structure: Structure, pruning: Pruning) -> nn.Module:
        """A fresh smaller copy, because modules may keep what they computed; on the meta device where possible."""
        return Slicer(self.shapes).cut(structure.edit(pruning))

    def _follow(self, module: nn.Module, mode: AbstractContextManager[Any]) -> None:
        self.example.run(module, meta=self.flow.record.device == "meta", mode=mode)

    def _measure_rounding(self) -> None:
        """Run the dense model as exactly as possible, and find out how far passes may differ."""
        for self.wide in (True, False):
            try:
                self.exact = self._unchanged()
                break
            except Exception as error:  # the device or an operation may have no float64
                log.info("the record does not run %s: %s", "in float64" if self.wide else "again", error)
                self.exact = self.dense  # what does not run at all fails every check, with its own words
        own = native_tolerances(self.dense, self.exact)
        self.replayed = wide_tolerances(self.dense, self.exact) if self.wide else own
        self.module_is_wide = self.wide and self._runs_wide()
        self.modules = self.replayed if self.module_is_wide else own

    def _unchanged(self) -> list[Tensor]:
        units = find_units(self.flow)
        replay = Replay(self.flow, units, np.ones(len(units.group_of), dtype=bool), wide=self.wide)
        return replay.prepared(self.tensors, self.inputs, lambda _, tensor: tensor)

    def _runs_wide(self) -> bool:
        """Whether the model's own forward does in float64 what the record does."""
        if 8 * sum(tensor.numel() for tensor in self.tensors.values()) > WIDE:
            return False
        try:
            found = self.example.run(skeleton(self.example.model), wide=True)
            compare("float64", found, self.exact, self.replayed)
        except Exception as error:  # a forward may insist on a type of its own
            log.info("the model does not run in float64 (%s); checking its forward in its own type", error)
            return False
        return True

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

        replay = Replay(self.flow, units, np.ones(len(units.group_of), dtype=bool), wide=self.wide)
        compare("permutation", replay.prepared(self.tensors, self.inputs, permuted), self.exact, self.replayed)

    def _shapes(self, units: Units, structure: Structure, pruning: Pruning) -> None:
        """The user's forward on a smaller module must give the shapes that the record says."""
        replay = Replay(self.flow, units, structure.keep(pruning))
        expected = [replay.shape(value) for value in self.flow.record.outputs]
        module = self._module_of(units, structure, pruning)
        found = [tuple(out.shape) for out in self.example.run(module, meta=structure.device == "meta")]
        if found != expected:
            raise CheckError(f"the module check saw outputs of shapes {found} instead of {expected}")

    def _values(self, units: Units, structure: Structure, pruning: Pruning) -> None:
        """The replay and the module check."""
        if structure.device == "meta":
            self._shapes(units, structure, pruning)
        replay = Replay(self.flow, units, structure.keep(pruning), wide=self.wide)
        sliced = replay.sliced(self.tensors, self.inputs)
        compare("replay", sliced, replay.masked(self.tensors, self.inputs), self.replayed)
        for part in self._batches(units.groups, pruning):
            cut = Slicer(self.example.model).cut(structure.edit(part))
            if len(part.kept) < len(pruning.kept):
                replay = Replay(self.flow, units, structure.keep(part), wide=self.wide)
                sliced = replay.sliced(self.tensors, self.inputs)
            compare("module", self.example.run(cut, wide=self.module_is_wide), sliced, self.modules)

    def misfit_in_training(self, units: Units, structure: Structure) -> str:
        """What goes wrong when a smaller module runs in training mode, in shapes; empty where nothing does."""
        record = self.flow.record
        if not record.training:
            return ""
        rng = np.random.default_rng(self.seed)
        pruning = Pruning({group.name: some(group, rng) for group in units.groups})
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


def _kinds(names: Sequence[str]) -> list[list[str]]:
    """Names that differ in numbers alone, together."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return list(kinds.values())


def _draws(groups: Sequence[Group], rng: np.random.Generator) -> list[Pruning]:
    """One unit fewer of every group, which shows misplaced units most, and a random number of random units."""
    fewer = {group.name: some(group, rng, group.size - group.multiple) for group in groups}
    return [Pruning(fewer), Pruning({group.name: some(group, rng) for group in groups})]


def _apart(groups: Sequence[Group], rng: np.random.Generator) -> list[Pruning]:
    """Random units of the groups whose number has a bit set, for each bit.

    Of any two groups one is once pruned without the other, which shows sizes that the code needs to be equal.
    """
    draws = []
    for bit in range(len(groups).bit_length()):
        chosen = [group for i, group in enumerate(groups, 1) if i >> bit & 1]
        draws.append(Pruning({group.name: some(group, rng) for group in chosen}))
    return draws
