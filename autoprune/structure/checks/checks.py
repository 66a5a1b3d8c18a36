"""Checks of a structure before anything relies on it; each of the three alone misses errors that the others catch.

*Permutation*: the record run with units permuted inside every group, in all tensors, must give the model's outputs.
*Replay*: the record run with sliced tensors must agree with the record run dense and masked. *Module*: the user's own
forward on the sliced module must agree with the sliced replay. Shapes are tried on the meta device first, because a
wrong slice may kill the process in a native kernel.

The record runs in float64 where the device has it, and so does the module where its code allows it; `rounding`
distinguishes the remaining rounding from errors. The work is bounded by the number of kinds of groups, not by a clock:
groups whose names differ only in numbers, as in repeated blocks, are tried together. Values of a large example are
checked on its beginning, see `shorter`.

The record needs only copies of the inputs of one operation. A sliced module needs a copy of every tensor that it cuts,
one copy of the model at most.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from autoprune.protocols import Pruning
from autoprune.structure.checks.replay import Replay
from autoprune.structure.checks.rounding import CheckError
from autoprune.structure.checks.shorter import Shorter, same_units, shorten
from autoprune.structure.checks.values import Values
from autoprune.structure.example import Example
from autoprune.structure.labels import Propagation
from autoprune.structure.owners import owners
from autoprune.structure.sizes.attributes import Found
from autoprune.structure.sizes.sizes import Sizes, some
from autoprune.structure.slicing.skeleton import skeleton
from autoprune.structure.slicing.slicing import FreshCuts, Slicer
from autoprune.structure.structure import Structure, assemble
from autoprune.structure.units import Group, Units, find_units


class Checker:
    """Runs the checks on one example, and finds a large set of groups that passes them jointly.

    Args:
        flow: Labels of the traced pass; ties that the code needs are added to its edges.
        example: The model and the inputs it was traced on.
        untouched: Parameters that the pass did not read.
        seed: Draws the units that the checks remove and permute.

    Attributes:
        sizes: The sizes kept in Python, the ties and the groups that are stuck.
        values: The checks of values on the whole example.
    """

    def __init__(self, flow: Propagation, example: Example, untouched: tuple[str, ...], seed: int) -> None:
        self.flow = flow
        self.example = example
        self.untouched = untouched
        self.seed = seed
        self.values = Values(flow, example)
        self._short_is_right = False
        # A module that runs only on the meta device is cut there as well, which costs no memory.
        on_meta = flow.record.device == "meta"
        self.shapes = _hollow(example.model) if on_meta else example.model
        self._fresh = FreshCuts(self.shapes) if on_meta else None
        self.sizes = Sizes(flow, self.shapes, self._module_of, self._follow, seed)

    @cached_property
    def shorter(self) -> Shorter | None:
        """Smaller example for values, where the whole one is large."""
        return shorten(self.flow, self.example)

    @cached_property
    def values_of_shorter(self) -> Values:
        """Checks of values on the smaller example."""
        assert self.shorter is not None
        return Values(self.shorter.flow, self.shorter.example)

    def on(self, model: nn.Module, other: Collection[str]) -> Checker:
        """Make the same checks of an equivalent model with other code in the modules named in `other`."""
        checker = Checker(self.flow, self.example.of(model), self.untouched, self.seed)
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
        """Follow the forward of a smaller model as far as it runs, rewriting sizes kept in Python."""
        return self.sizes.follow(units, self.seed + draw)

    def reach(self, units: Units, draw: int) -> int:
        """Return the operation up to which the forward of a smaller model runs with the sizes found so far."""
        return self.sizes.reach(units, self.seed + draw)

    def error(self, frozen: Mapping[str, str]) -> str | None:
        """Prune all groups but the frozen ones at once, and return the error, or None."""
        units = find_units(self.flow, frozen)
        short = self._on_shorter(units, frozen)
        error = self._error(units, short)
        if error is not None and short is not None and not self._short_is_right:
            error = self._error(units, None)  # the model may run other operations on a smaller example
            self._short_is_right = error is not None
            self.shorter = self.shorter if self._short_is_right else None
        return error

    def values_for(self, units: Units, frozen: Mapping[str, str]) -> list[tuple[Values, Propagation, Units]]:
        """Return checks of values with their labels: on the smaller example, where there is one, then on the whole."""
        short = self._on_shorter(units, frozen)
        whole = (self.values, self.flow, units)
        return [whole] if short is None else [(self.values_of_shorter, *short), whole]

    def _on_shorter(self, units: Units, frozen: Mapping[str, str]) -> tuple[Propagation, Units] | None:
        """Return labels and units of the smaller example, if there is one and they are the same."""
        flow = None if self.shorter is None else self.shorter.tied_as(self.flow)
        found = None if flow is None else find_units(flow, frozen)
        return None if flow is None or found is None or not same_units(units, found) else (flow, found)

    def _error(self, units: Units, short: tuple[Propagation, Units] | None) -> str | None:
        values = self.values if short is None else self.values_of_shorter
        labels = short or (self.flow, units)
        rng = np.random.default_rng(self.seed)
        try:
            values.permutation(*labels, rng)
            structure = assemble(self.flow, units, self.untouched, self.sizes.attributes)
            for pruning in _draws(units.groups, rng, values.dear):
                if structure.device == "meta":
                    self._shapes(self.example, self.flow, units, structure, pruning)
                values.agree(*labels, structure, pruning)
            on_meta = structure.device == "meta"  # where the size of the example costs nothing
            where = (self.example, self.flow, units) if on_meta else (values.example, *labels)
            for pruning in _apart(units.groups, rng):
                self._shapes(*where, structure, pruning)
        except CheckError as error:
            return str(error)
        except Exception as error:  # any error of the user's forward on a smaller module is a failed check
            return f"the forward of a smaller module raised {type(error).__name__}: {error}"
        return None

    def _grow(self, passed: set[str], parts: list[list[str]], reasons: dict[str, str]) -> set[str]:
        """Add to `passed` the parts that still pass with it, halving those that fail; note the reasons of failures."""
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
        """Add groups of one kind to `passed`: if the first and the last fail, all count as failed."""
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
        """Cut fresh modules, because they may cache results; on the meta device where possible."""
        slicer = self._fresh or Slicer(self.shapes)  # of real tensors nothing is kept until the next cut
        return slicer.cut(structure.edit(pruning))

    def _follow(self, module: nn.Module, mode: AbstractContextManager[Any]) -> None:
        self.example.run(module, meta=self.flow.record.device == "meta", mode=mode)

    def _shapes(
        self, example: Example, flow: Propagation, units: Units, structure: Structure, pruning: Pruning
    ) -> None:
        """Check that the user's forward on a smaller module gives the shapes of the record."""
        replay = Replay(flow, units, structure.keep(pruning))
        expected = [replay.shape(value) for value in flow.record.outputs]
        module = self._module_of(units, structure, pruning)
        found = [tuple(out.shape) for out in example.run(module, meta=structure.device == "meta")]
        if found != expected:
            raise CheckError(f"the module check saw outputs of shapes {found} instead of {expected}")

    def misfit_in_training(self, units: Units, structure: Structure) -> str:
        """Run a smaller module in training mode, and describe an error in shapes; empty if there is none."""
        record = self.flow.record
        if not record.training:
            return ""
        rng = np.random.default_rng(self.seed)
        pruning = Pruning({group.name: some(group, rng) for group in units.groups})
        replay = Replay(self.flow, units, structure.keep(pruning))
        cut = Slicer(self.shapes).cut(structure.edit(pruning))
        try:
            found = self.example.run_in_training(cut, meta=record.device == "meta")
        except Exception as error:  # the user's forward may raise anything on a smaller module
            return f"a smaller model raised {type(error).__name__}: {error}".partition("\n")[0][:160]
        expected = [replay.shape(value) for value in record.trained]
        shapes = [tuple(out.shape) for out in found]
        return "" if shapes == expected else f"a smaller model returned shapes {shapes} instead of {expected}"


def _hollow(model: nn.Module) -> nn.Module:
    """Copy the modules of a model with parameters and buffers on the meta device; tied ones stay tied."""
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
    """Group names that differ only in numbers."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return list(kinds.values())


def _draws(groups: Sequence[Group], rng: np.random.Generator, dear: bool) -> list[Pruning]:
    """Draw prunings: one unit fewer of every group, which best shows misplaced units, and a random number of units.

    Where passes are dear, a single one: each group at random in one way or the other.
    """
    fewer = {group.name: some(group, rng, group.size - group.multiple) for group in groups}
    fewest = {group.name: some(group, rng) for group in groups}
    if not dear:
        return [Pruning(fewer), Pruning(fewest)]
    return [Pruning({name: (fewer if rng.integers(2) else fewest)[name] for name in fewer})]


def _apart(groups: Sequence[Group], rng: np.random.Generator) -> list[Pruning]:
    """Draw random units of the groups whose number has a bit set, for each bit.

    For any two groups there is a pruning of one without the other, which shows sizes that the code needs to be equal.
    """
    draws = []
    for bit in range(len(groups).bit_length()):
        chosen = [group for i, group in enumerate(groups, 1) if i >> bit & 1]
        draws.append(Pruning({group.name: some(group, rng) for group in chosen}))
    return draws
