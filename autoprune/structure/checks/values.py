"""Checks of values on one example, with their tolerances."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.protocols import IntArray, Pruning
from autoprune.structure.branches.cut import Cut
from autoprune.structure.checks.replay import Replay
from autoprune.structure.checks.rounding import compare, native_tolerances, wide_tolerances
from autoprune.structure.containers import tensors_in
from autoprune.structure.example import Example
from autoprune.structure.labels import Propagation
from autoprune.structure.macs import dense_macs
from autoprune.structure.slicing.skeleton import skeleton
from autoprune.structure.slicing.slicing import Slicer
from autoprune.structure.structure import Structure
from autoprune.structure.units import Slot, Units, find_units

log = logging.getLogger(__name__)

DEAR_WORK = 2**33
"""Multiply-accumulates of a pass from which on few passes are made: some tenths of a second in float64."""

_COPY_WORK = 64  # for each parameter, which every pass slices and widens: as measured next to a product in float64


def cycle(size: int, rng: np.random.Generator) -> IntArray:
    """Draw a permutation that moves every unit, shape (size,): of few units, many permutations leave most in place."""
    order = rng.permutation(size)
    moved = np.empty_like(order)
    moved[order] = np.roll(order, 1)
    return moved


class Values:
    """Compares passes of one example with each other.

    Args:
        flow: Labels of a pass on the example.
        example: The model and its inputs.
    """

    def __init__(self, flow: Propagation, example: Example) -> None:
        self.flow = flow
        self.example = example
        named = (*example.model.named_parameters(), *example.model.named_buffers())
        self.tensors = {name: tensor.detach() for name, tensor in named}
        self.inputs = tensors_in([(a, dict(k)) for a, k in example.inputs], objects=True)

    @cached_property
    def dear(self) -> bool:
        """True if a pass takes long."""
        record = self.flow.record
        copied = sum(tensor.numel() for tensor in self.tensors.values())
        return sum(dense_macs(record, op) for op in record.ops) + _COPY_WORK * copied >= DEAR_WORK

    @cached_property
    def dense(self) -> list[Tensor]:
        """Outputs of the unchanged model, in its own type."""
        return self.example.run(skeleton(self.example.model))

    @property
    def exact(self) -> list[Tensor]:
        """Outputs of the record, in float64 where possible."""
        return self._exact[0]

    @property
    def wide(self) -> bool:
        """True if the record runs in float64."""
        return self._exact[1]

    @cached_property
    def _exact(self) -> tuple[list[Tensor], bool]:
        units = find_units(self.flow)
        for wide in (True, False):
            try:
                replay = Replay(self.flow, units, np.ones(len(units.group_of), dtype=bool), wide=wide)
                found = replay.prepared(self.tensors, self.inputs, lambda _, tensor: tensor)
            except Exception as error:  # the device or an operation may have no float64
                log.info("the record does not run %s: %s", "in float64" if wide else "again", error)
            else:
                return found, wide
        return self.dense, False  # a record that does not run fails every check, with its own message

    @cached_property
    def native(self) -> list[float]:
        """Tolerances between a smaller module in the model's own type and the exact outputs."""
        return native_tolerances(self.dense, self.exact)

    @cached_property
    def replayed(self) -> list[float]:
        """Tolerances between two passes of the record, for each output."""
        exact = self.exact
        return wide_tolerances(self.dense, exact) if self.wide else self.native

    @cached_property
    def module_is_wide(self) -> bool:
        """True if the model's own forward in float64 agrees with the record."""
        try:
            found = self.example.run(skeleton(self.example.model), wide=True)
            compare("float64", found, self.exact, self.replayed)
        except Exception as error:  # a forward may require a certain type
            log.info("the model does not run in float64 (%s); checking its forward in its own type", error)
            return False
        return True

    def permutation(self, flow: Propagation, units: Units, rng: np.random.Generator) -> None:
        """Check that units permuted inside every group, in all tensors, give the same outputs."""
        order = {group.name: cycle(group.size, rng) for group in units.groups}
        slots: dict[str, list[tuple[Slot, IntArray]]] = {}
        for group in units.groups:
            for slot in group.slots:
                slots.setdefault(slot.tensor, []).append((slot, order[group.name]))

        def permuted(value: int, tensor: Tensor) -> Tensor:
            for slot, moved in slots.get(flow.record.values[value].name, ()):
                target = torch.from_numpy(slot.indices.reshape(-1)).to(tensor.device)
                source = torch.from_numpy(slot.indices[moved].reshape(-1)).to(tensor.device)
                tensor = tensor.index_copy(slot.dim, target, tensor.index_select(slot.dim, source))
            return tensor

        exact = self.exact
        replay = Replay(flow, units, np.ones(len(units.group_of), dtype=bool), wide=self.wide)
        compare("permutation", replay.prepared(self.tensors, self.inputs, permuted), exact, self.replayed)

    def agree(self, flow: Propagation, units: Units, structure: Structure, pruning: Pruning) -> None:
        """Run the replay and the module check."""
        replay = Replay(flow, units, structure.keep(pruning), wide=self.wide)
        sliced = replay.sliced(self.tensors, self.inputs)
        compare("replay", sliced, replay.masked(self.tensors, self.inputs), self.replayed)
        self._module(lambda: Slicer(self.example.model).cut(structure.edit(pruning)), sliced)

    def without(
        self, flow: Propagation, units: Units, structure: Structure, pruning: Pruning, cuts: Collection[Cut]
    ) -> None:
        """Check that the user's forward without branches agrees with the record without them."""
        replay = Replay(flow, units, structure.keep(pruning), wide=self.wide, cuts=cuts)
        shorter = replay.sliced(self.tensors, self.inputs)
        self._module(lambda: Slicer(self.example.model).cut(structure.edit(pruning)), shorter)

    def _module(self, cut: Callable[[], nn.Module], sliced: list[Tensor]) -> None:
        """Check that the user's forward agrees in float64, or, if it does not run so, in its own type."""
        if self.wide and self.__dict__.get("module_is_wide", True):
            try:
                compare("module", self.example.run(cut(), wide=True), sliced, self.replayed)
            except Exception:  # an error, or a forward that requires a type: the dense model decides
                if self.module_is_wide:
                    raise
            else:
                return
        compare("module", self.example.run(cut()), sliced, self.native)
