"""ZipLM and SlimGPT at uniform widths: the same number of neurons and of key-value groups in every block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peers.language.blocks import attended, embedded, fed, keep_groups, keep_neurons, layers_of
from benchmarks.peers.language.case import BATCH, Case, Moments
from benchmarks.peers.language.flap import unit_sizes
from benchmarks.peers.language.obs import Layer, refitted, removal_order
from benchmarks.peers.language.surgeon import AT_ONCE, surgeon_of


def uniform_neurons(case: Case, share: float, groups: int, blocks: int | None = None) -> int:
    """Return the neurons that each of `blocks` blocks may keep next to `groups` groups, all other blocks dense."""
    group, neuron = unit_sizes(case.layers[0])
    mlp = case.layers[0].mlp.down_proj.in_features
    pruned = len(case.layers) if blocks is None else blocks
    removed = case.parameters - case.most(share)
    from_groups = (case.model.config.num_key_value_heads - groups) * group * pruned
    return mlp - max(0, -(-(removed - from_groups) // (neuron * pruned)))


@torch.no_grad()
def zip_lm(case: Case, share: float, groups: int, damping: float, sequential: bool) -> nn.Module:
    """Remove units by optimal brain surgeon, block after block.

    Args:
        case: Model and statistics.
        share: Of the parameters that may stay.
        groups: Key-value groups kept in every block; neurons make up the rest.
        damping: Added to the diagonal of the moments, as a share of its mean.
        sequential: Take the moments of each layer from the network pruned so far (SlimGPT), or all from the dense one.

    Reference:
        Kurtic et al., "ZipLM", arXiv:2302.04089; Ling et al., "SlimGPT", arXiv:2412.18110.
    """
    model = case.copy()
    neurons = uniform_neurons(case, share, groups)
    if not sequential:
        surgeon = surgeon_of(case, damping)
        for i, layer in enumerate(layers_of(model)):
            keep_groups(layer, *surgeon.groups(i, groups))
            keep_neurons(layer, *surgeon.neurons(i, neurons))
        return model
    streams = [embedded(case.fast, part)[0] for part in case.ids.split(BATCH)]
    call = embedded(case.fast, case.ids[:1])[1]
    for layer, dense in zip(layers_of(model.to(case.dtype)), case.layers, strict=True):
        inputs = moments_of(layer.self_attn.o_proj, streams, partial(attended, layer, call=call))
        prune_groups(layer, dense, groups, inputs, damping)
        streams = [attended(layer, x, call) for x in streams]
        inputs = moments_of(layer.mlp.down_proj, streams, partial(fed, layer))
        prune_neurons(layer, dense, neurons, inputs, damping)
        streams = [fed(layer, x) for x in streams]
    return model


def prune_groups(layer: nn.Module, dense: nn.Module, groups: int, moments: Moments, damping: float) -> None:
    attention = dense.self_attn
    each = Layer.of(attention.o_proj.weight, moments, attention.head_dim * attention.num_key_value_groups, damping)
    total = len(each.gram) // each.block
    kept = remaining(each, total, total - groups)
    keep_groups(layer, kept, refitted(each, kept))


def prune_neurons(layer: nn.Module, dense: nn.Module, neurons: int, moments: Moments, damping: float) -> None:
    each = Layer.of(dense.mlp.down_proj.weight, moments, 1, damping)
    kept = remaining(each, len(each.gram), len(each.gram) - neurons)
    keep_neurons(layer, kept, refitted(each, kept))


def remaining(layer: Layer, total: int, removed: int) -> Tensor:
    """Indices of the units left after `removed` have gone, ascending, int64, shape (total - removed,)."""
    stays = torch.ones(total, dtype=torch.bool)
    if removed:
        stays[removal_order(layer, removed, AT_ONCE if layer.block == 1 else 1)] = False
    return stays.nonzero()[:, 0]


def moments_of(inside: nn.Linear, streams: list[Tensor], run: Callable[[Tensor], Tensor]) -> Moments:
    """Moments of the inputs of a linear layer inside a block while `run` takes the streams through that part."""
    moments = Moments.of(inside.in_features)
    hook = inside.register_forward_pre_hook(lambda _, args: moments.add(args[0]))
    for x in streams:
        run(x)
    hook.remove()
    return moments
