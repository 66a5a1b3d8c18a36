"""Tensors that the calibration of a candidate left in its modules, kept for the candidates after it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set

from torch import Tensor, nn

from autoprune.evaluators.activation_cache.store import State
from autoprune.structure.owners import owners

_REMEMBERED = 64  # candidates whose calibration is remembered: further chunks of data need none, nor tests of a front

Before = dict[tuple[str, str], tuple[Tensor, int]]
"""Tensors by their place, with the number of writes to each."""


class Calibrated:
    """Reads and sets the tensors of a model, and remembers those of the candidates calibrated last.

    Args:
        module: The skeleton that candidates are cut from.
    """

    def __init__(self, module: nn.Module) -> None:
        self._holders = [(owner.module, owner.key, owner.holder) for owner in owners(module)]
        self._known: OrderedDict[bytes, State] = OrderedDict()

    def known(self, digest: bytes) -> State | None:
        """Result of an earlier calibration of a candidate, by its digest."""
        return self._known.get(digest)

    def remember(self, digest: bytes, state: State) -> None:
        """Keep the result of a calibration; the oldest is forgotten."""
        self._known[digest] = state
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def before(self) -> Before:
        """The tensors that the model holds now."""
        return {(module, key): (holder[key], holder[key]._version) for module, key, holder in self._holders}

    def restore(self, state: State) -> None:
        """Put in the tensors that an earlier calibration of the candidate left."""
        for module, key, holder in self._holders:
            holder[key] = state.get((module, key), holder[key])

    def changed(self, before: Before, hidden: Set[str], inherited: State) -> State:
        """Collect what a calibration changed; modules that did not run get what an earlier one left in them.

        Args:
            before: The tensors before the calibration.
            hidden: Modules that did not run.
            inherited: Their tensors.
        """
        found = dict(inherited)
        for module, key, holder in self._holders:
            if module in hidden:
                if (module, key) in found:
                    holder[key] = found[module, key]
            else:
                old, version = before[module, key]
                if holder[key] is not old or old._version != version:
                    found[module, key] = holder[key]
        return found
