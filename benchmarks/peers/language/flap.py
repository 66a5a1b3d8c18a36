"""FLAP: units whose input fluctuates least go first, over all layers at once, and biases carry their means."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.peers.language.blocks import columns_of, keep_groups, keep_neurons, layers_of, parameters
from benchmarks.peers.language.case import Case, Moments


def fluctuation(moments: Moments, weight: Tensor) -> Tensor:
    """Variance of each input times the squared norm of its column of weights, float64, shape (inputs,).

    Reference:
        An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024,
        arXiv:2312.11983, equation 5 (WIFV).
    """
    return moments.variance * weight.detach().double().square().sum(0)


def standardised(scores: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 within each layer, shape (layers, units)."""
    return (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-9)


def flap(case: Case, share: float, squared: bool) -> nn.Module:
    """Prune key-value groups and neurons by one threshold on their standardised fluctuation.

    Every layer keeps one of each. A unit counts with its parameters where the budget is filled, and the biases that
    compensate for the units removed are counted, too.

    Args:
        case: Model and statistics.
        share: Of the parameters that may stay.
        squared: Square the scores of attention before they are standardised, as the authors' code does and the paper
            does not.
    """
    layers = case.layers
    heads = torch.stack(
        [fluctuation(m, each.self_attn.o_proj.weight) for m, each in zip(case.statistics.heads, layers, strict=True)]
    )
    neurons = torch.stack(
        [fluctuation(m, each.mlp.down_proj.weight) for m, each in zip(case.statistics.neurons, layers, strict=True)]
    )
    groups = case.model.config.num_key_value_heads
    by_group = standardised(heads.square() if squared else heads).unflatten(1, (groups, -1)).mean(2)
    by_neuron = standardised(neurons)
    sizes = unit_sizes(layers[0])
    removed = removal(by_group, by_neuron, sizes, case, share)
    return compensated(case, *removed)


def unit_sizes(layer: nn.Module) -> tuple[int, int]:
    """Parameters of a key-value group with its heads, and of a neuron."""
    attention = sum(p.numel() for p in layer.self_attn.parameters())
    groups = layer.self_attn.k_proj.out_features // layer.self_attn.head_dim
    feed_forward = sum(p.numel() for p in layer.mlp.parameters())
    return attention // groups, feed_forward // layer.mlp.down_proj.in_features


def removal(
    by_group: Tensor, by_neuron: Tensor, sizes: tuple[int, int], case: Case, share: float
) -> tuple[Tensor, Tensor]:
    """Units that go, in rising order of score until the budget is met, bool, shapes as those of the scores."""
    protected = [scores.clone() for scores in (by_group, by_neuron)]
    for scores in protected:
        scores.scatter_(1, scores.argmax(1, keepdim=True), torch.inf)  # one unit of each kind stays in every layer
    order = torch.cat([scores.flatten() for scores in protected]).argsort()
    each = torch.cat([torch.full((s.numel(),), size) for s, size in zip(protected, sizes, strict=True)])
    biases = 2 * len(by_group) * case.model.config.hidden_size
    over = case.parameters + biases - case.most(share)
    count = int(torch.searchsorted(each[order].cumsum(0), over)) + 1
    gone = torch.zeros(len(each), dtype=torch.bool)
    gone[order[:count]] = True
    split = by_group.numel()
    return gone[:split].view_as(by_group), gone[split:].view_as(by_neuron)


def compensated(case: Case, groups: Tensor, neurons: Tensor) -> nn.Module:
    """The model without these units; the mean of what they contributed becomes a bias."""
    model = case.copy()
    for i, layer in enumerate(layers_of(model)):
        attention = layer.self_attn
        gone = columns_of(groups[i].nonzero()[:, 0], attention.head_dim * attention.num_key_value_groups)
        bias = attention.o_proj.weight[:, gone].double() @ case.statistics.heads[i].mean[gone]
        keep_groups(layer, (~groups[i]).nonzero()[:, 0], bias=bias)
        gone = neurons[i].nonzero()[:, 0]
        bias = layer.mlp.down_proj.weight[:, gone].double() @ case.statistics.neurons[i].mean[gone]
        keep_neurons(layer, (~neurons[i]).nonzero()[:, 0], bias=bias)
    assert parameters(model) <= case.parameters + 2 * len(groups) * model.config.hidden_size
    return model
