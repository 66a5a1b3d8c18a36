"""Products of what layers read with the gradients there, unit by unit: what a sensitivity adds up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.importance.calibration import Calibration, affordable
from autoprune.importance.criteria import readers
from autoprune.importance.reconstruction import reads

FEWEST_SAMPLES = 8
MOST_SAMPLES = 32
DRAWS = 1024
"""Number of independent draws from the outputs that is enough: one a token of a language model, else one a sample."""

KEPT_BYTES = 2**26
"""Memory for products that later estimates may need; a quarter of the model where that is more."""

_KEY = "unit products"


@dataclass(frozen=True)
class Part:
    """Products of one backward pass.

    Attributes:
        rows: For each group, tensors of shape (positions, units), one for each number of positions that its layers
            read: the values of a unit's members times the gradients there, summed over members and layers.
        draws: Number of independent draws in the loss.
    """

    rows: Mapping[str, Sequence[Tensor]]
    draws: int


class UnitProducts:
    """Observes backward passes of the loss of `autoprune.metrics.scorers.sampled_loss`, part by part.

    Args:
        calibration: Its model runs inside `observing`.
    """

    def __init__(self, calibration: Calibration) -> None:
        self._model = calibration.model
        self._axes = readers(calibration.model, calibration.structure)
        self._read = reads(calibration.model, calibration.structure)
        self._most_samples = affordable(calibration.structure, FEWEST_SAMPLES, MOST_SAMPLES, passes=2)
        own = sum(parameter.nbytes for parameter in calibration.model.parameters())
        self._room = max(KEPT_BYTES, own // 4)
        self._products: dict[tuple[str, torch.Size], Tensor] = {}
        self._parts: list[Part] = []
        self._samples = 0
        self._draws = 0

    @property
    def enough(self) -> bool:
        """True if an estimate needs no more parts."""
        enough = self._samples >= FEWEST_SAMPLES and self._draws >= DRAWS
        return enough or self._samples >= self._most_samples

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Observe passes until there are enough."""
        modules = ((name, self._model.get_submodule(name)) for name in self._read)
        handles = [module.register_forward_pre_hook(self._watch(name), with_kwargs=True) for name, module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self, samples: int, draws: int, factor: float = 1.0) -> Part:
        """End a part.

        Args:
            samples: Number of its samples.
            draws: Number of independent draws in its loss.
            factor: Of the gradients, to those of the loss of `sampled_loss`.
        """
        rows: dict[str, list[Tensor]] = defaultdict(list)
        for (group, _), each in self._products.items():
            rows[group].append(each if factor == 1 else each * factor)
        self._products = {}
        part = Part(dict(rows), draws)
        self._samples += samples
        self._draws += draws
        self._room -= sum(each.nbytes for tensors in rows.values() for each in tensors)
        self._parts = [*self._parts, part] if self._room >= 0 else []
        return part

    def keep(self, calibration: Calibration) -> None:
        """Keep the parts for later estimates with the same samples, if there are enough and they fit into memory."""
        if self.enough and self._room >= 0:
            calibration.derived[_KEY] = self._parts

    @staticmethod
    def kept(calibration: Calibration) -> Sequence[Part]:
        """Return the parts of an earlier pass; empty without one."""
        parts: Sequence[Part] = calibration.derived.get(_KEY, ())
        return parts

    def _watch(self, layer: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.enough:
                return None
            x = next(iter((*args, *kwargs.values())))
            branch = x.view_as(x) if x.requires_grad else x.detach().requires_grad_().view_as(x)
            seen = x.detach().clone()  # later operations may write to it

            def receive(gradient: Tensor) -> None:
                rows = (gradient * seen).movedim(self._axes[layer], -1)
                for group, inputs in self._read[layer].items():
                    each = rows[..., torch.from_numpy(inputs).to(rows.device)].sum(-1).flatten(0, -2)
                    key = group, each.shape
                    self._products[key] = self._products[key] + each if key in self._products else each

            branch.register_hook(receive)
            return ((branch, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): branch})

        return hook
