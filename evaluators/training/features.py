"""Inner features: outputs of modules of a pruned network, compared with those of the dense one on the units kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.data.batch import tensors
from autoprune.protocols import IntArray

Slices = Mapping[str, Mapping[int, IntArray]]
"""Indices of the dense model that stay, of each tensor by name along each dimension that shrinks."""

Seen = dict[str, list[Tensor]]
"""Outputs of modules in one forward pass, by name, one for each call."""


class Features:
    """Places where a pruned network is compared with the dense one.

    They are the outputs of all normalisation layers, in transformers the hidden states; without any, of convolutions
    and linear layers. Units of the dense model that were removed are left out.

    Args:
        dense: The dense model.
        small: The pruned one, with modules of the same names.
        slices: Units of the dense model that stay.

    Reference:
        Aflalo et al., "Knapsack Pruning with Inner Distillation", 2020, arXiv:2002.08258. There features are those of
        blocks; here also those inside blocks, whose kept units are known.
    """

    def __init__(self, dense: nn.Module, small: nn.Module, slices: Slices) -> None:
        inside = dict(small.named_modules())
        there: dict[str, nn.Module] = dict(dense.named_modules())
        there = {name: module for name, module in there.items() if type(inside.get(name)) is type(module)}
        norms = [name for name, module in there.items() if _is_norm(module)]
        self.names = norms or [name for name, m in there.items() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
        self._kept = {name: _kept(slices, name) for name in self.names}

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[Seen]:
        """Gather the outputs of one forward pass in the dictionary that it gives; clear it before the next."""
        seen: Seen = {}

        def watch(name: str) -> Any:
            def hook(_: nn.Module, args: Any, made: Any) -> None:
                first = next(tensors(made), None)
                if first is not None and first.is_floating_point():
                    seen.setdefault(name, []).append(first)

            return hook

        hooks = [module.get_submodule(name).register_forward_hook(watch(name)) for name in self.names]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def distance(self, ours: Seen, theirs: Seen) -> Tensor | None:
        """Squared difference over the mean square of the dense feature, averaged over all that can be compared.

        Args:
            ours: Of the pruned network, with gradients.
            theirs: Of the dense one, for the same batch.

        Returns:
            A scalar; None where nothing can be compared.
        """
        found = []
        for name, own in ours.items():
            others = theirs.get(name, [])
            pairs = zip(own, others, strict=True) if len(own) == len(others) else ()
            for one, other in pairs:
                wanted = self._on_kept(name, one, other)
                if wanted is not None:
                    error = (one.float() - wanted.float()).square().mean()
                    found.append(error / wanted.float().square().mean().clamp(min=1e-12))
        return torch.stack(found).mean() if found else None

    def _on_kept(self, name: str, one: Tensor, other: Tensor) -> Tensor | None:
        """The dense feature on the units kept; None if the two differ in anything else."""
        if one.ndim != other.ndim:
            return None
        shrunk = [dim for dim in range(one.ndim) if one.shape[dim] != other.shape[dim]]
        if not shrunk:
            return other
        kept = self._kept[name]
        if len(shrunk) > 1 or kept is None or one.shape[shrunk[0]] != len(kept) or other.shape[shrunk[0]] <= kept.max():
            return None
        return other.index_select(shrunk[0], torch.from_numpy(kept).to(other.device))


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module has a weight for each unit, as normalisation layers do, whatever their class."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and not any(module.children())


def _kept(slices: Slices, name: str) -> IntArray | None:
    """Units that a layer keeps: those of the first dimension of its bias or weight, where that is cut."""
    for tensor in (f"{name}.bias", f"{name}.weight"):
        if 0 in slices.get(tensor, {}):
            return slices[tensor][0]
    return None
