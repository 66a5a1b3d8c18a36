"""Every part of a network by optimal brain surgeon: which units stay at a width, and their re-fitted weights.

ZipLM at uniform widths and EvoPress read the same orders and weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.language.case import Case
from benchmarks.peers.language.obs import Layer, refitted, removal_order

AT_ONCE = 16  # neurons between two updates


class Surgeon:
    """Orders of removal and re-fitted weights of every part, from moments of the dense network."""

    def __init__(self, case: Case, damping: float) -> None:
        size = case.layers[0].self_attn.head_dim * case.layers[0].self_attn.num_key_value_groups
        pairs = list(zip(case.layers, case.statistics.heads, case.statistics.neurons, strict=True))
        self.heads = [Layer.of(each.self_attn.o_proj.weight, m, size, damping) for each, m, _ in pairs]
        self.mlps = [Layer.of(each.mlp.down_proj.weight, m, 1, damping) for each, _, m in pairs]
        self.orders: dict[tuple[int, bool], Tensor] = {}

    def groups(self, block: int, kept: int) -> tuple[Tensor, Tensor]:
        return self._kept(block, self.heads[block], kept)

    def neurons(self, block: int, kept: int) -> tuple[Tensor, Tensor]:
        return self._kept(block, self.mlps[block], kept)

    def _kept(self, block: int, layer: Layer, kept: int) -> tuple[Tensor, Tensor]:
        key = (block, layer.block == 1)
        if key not in self.orders:
            units = len(layer.gram) // layer.block
            self.orders[key] = removal_order(layer, units, AT_ONCE if layer.block == 1 else 1)
        units = self.orders[key][len(self.orders[key]) - kept :].sort().values
        return units, refitted(layer, units) if kept else torch.empty(0)


def surgeon_of(case: Case, damping: float) -> Surgeon:
    """The surgeon of a case, whose orders are the same for all shares and methods."""
    name = f"surgeon {damping}"
    if name not in case.kept:
        case.kept[name] = Surgeon(case, damping)
    found = case.kept[name]
    assert isinstance(found, Surgeon)
    return found
