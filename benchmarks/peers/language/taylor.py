"""LLM-Pruner: coupled structures of least first-order effect on the loss, the same share of every pruned block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.language.blocks import keep_groups, keep_neurons, layers_of
from benchmarks.peers.language.case import Case
from benchmarks.peers.language.ziplm import uniform_neurons

FIRST, LAST = 4 / 32, 2 / 32  # of the blocks stay dense at the ends, as its authors keep 4 and 2 of 32


def salience(case: Case) -> list[dict[str, Tensor]]:
    """Weight times gradient of the mean loss of the calibration sequences, by layer, in `case.dtype`."""
    found = case.kept.get("salience")
    if found is None:
        found = case.kept["salience"] = _salience(case)
    return found  # type: ignore[return-value]  # `kept` holds values of many kinds


def _salience(case: Case) -> list[dict[str, Tensor]]:
    model = case.copy().to(case.dtype)
    for part in case.ids.split(2):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits.float(), part[:, 1:].flatten(), reduction="sum")
        (loss / (case.ids.numel() - len(case.ids))).backward()
    products = []
    for layer in layers_of(model):
        named = {name: p for name, p in layer.named_parameters() if p.ndim == 2}
        products.append({name.split(".")[1]: (p * p.grad).detach() for name, p in named.items()})
    return products


def importances(product: dict[str, Tensor], groups: int, element: bool) -> tuple[Tensor, Tensor]:
    """Importance of the key-value groups and of the neurons of a block, float32, shapes (groups,) and (neurons,).

    Args:
        product: Weight times gradient of each matrix of the block.
        groups: Key-value groups.
        element: Sum absolute values of single weights, or take the absolute value of each vector's sum.
    """

    def of(name: str, outputs: bool) -> Tensor:
        rows = product[name].float() if outputs else product[name].float().T
        return rows.abs().sum(1) if element else rows.sum(1).abs()

    by_head = [of(name, True) for name in ("q_proj", "k_proj", "v_proj")] + [of("o_proj", False)]
    by_group = torch.stack([each.view(groups, -1).sum(1) for each in by_head]).sum(0)
    return by_group, of("gate_proj", True) + of("up_proj", True) + of("down_proj", False)


def llm_pruner(case: Case, share: float, groups: int, element: bool, ends: bool) -> nn.Module:
    """Remove the key-value groups and neurons of least importance; nothing is re-fitted.

    Args:
        case: Model and statistics.
        share: Of the parameters that may stay.
        groups: Key-value groups kept in every pruned block; neurons make up the rest.
        element: See `importances`.
        ends: Prune the blocks at both ends, too.

    Reference:
        Ma, Fang and Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023,
        arXiv:2305.11627, equations 3 and 5 (element) or 3 and 4 (vector), with sums over a group, before its recovery
        by training.
    """
    model = case.copy()
    count = len(case.layers)
    blocks = range(count) if ends else range(round(FIRST * count), count - round(LAST * count))
    neurons = uniform_neurons(case, share, groups, len(blocks))
    for i in blocks:
        by_group, by_neuron = importances(salience(case)[i], case.model.config.num_key_value_heads, element)
        layer = layers_of(model)[i]
        keep_groups(layer, by_group.topk(groups).indices.sort().values)
        keep_neurons(layer, by_neuron.topk(neurons).indices.sort().values)
    return model
