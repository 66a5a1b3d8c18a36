"""MultiPruner: greedily whole parts first, then neurons, then heads, by the perplexity of the network without them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.peers.language.blocks import columns_of
from benchmarks.peers.language.case import Case
from benchmarks.peers.language.levels import Scorer, Stitched, next_token, remember

DISTRIBUTION = (0.44, 0.52, 0.04)  # of what is removed: whole parts, neurons, heads; the default of its code
SEQUENCES = 4  # of the calibration sequences; each evaluation passes over these 1,024 tokens
Move = tuple[int, int]  # place and new level


class Magnitudes:
    """Units in falling order of the sum of absolute weights of the layers that make them; nothing is re-fitted."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def neurons(self, block: int, kept: int) -> tuple[Tensor, None]:
        mlp = self.case.layers[block].mlp
        size = mlp.gate_proj.weight.abs().sum(1) + mlp.up_proj.weight.abs().sum(1)
        return size.topk(kept).indices.sort().values, None

    def groups(self, block: int, kept: int) -> tuple[Tensor, None]:
        attention = self.case.layers[block].self_attn
        groups = attention.k_proj.out_features // attention.head_dim
        repeated = columns_of(
            torch.arange(groups).repeat_interleave(attention.num_key_value_groups), attention.head_dim
        )
        size = attention.q_proj.weight.abs().sum(1)
        for layer in (attention.k_proj, attention.v_proj):
            size = size + layer.weight.abs().sum(1)[repeated]
        return size.view(groups, -1).mean(1).topk(kept).indices.sort().values, None


def multi_pruner(case: Case, share: float, lazy: bool = True) -> nn.Module:
    """Remove the part, then the step of neurons, then the group, without which the loss is least, until each quota.

    Args:
        case: Model and calibration sequences.
        share: Of the parameters that may stay.
        lazy: Score again only what can still be the best by its increase of the loss at an earlier step, where the
            paper scores all that is left at every step.

    Reference:
        Munoz, Yuan and Jain, "MultiPruner: Balanced Structure Removal in Foundation Models", 2025, arXiv:2501.09949.
        A step of neurons is a ninth of a layer, as a key-value group has as many parameters; its default is an 11th.
    """
    stitched = Stitched(case, Magnitudes(case))
    ids = case.ids[:SEQUENCES]
    scorer = Scorer(stitched, ids, next_token(ids), remember(case, "MultiPruner"))
    levels = torch.zeros_like(stitched.most)
    quota = stitched.steps(share)
    until = 0.0
    for portion, moves in zip(DISTRIBUTION, (whole_parts, narrower, fewer_groups), strict=True):
        until += portion * quota
        levels = greedy(scorer, levels, partial(moves, most=stitched.most), min(until, quota), lazy)
    case.kept["evaluations"] = scorer.evaluations
    return stitched.network(levels)


def whole_parts(levels: Tensor, most: Tensor) -> list[Move]:
    return [(i, int(most[i])) for i in range(len(levels)) if levels[i] < most[i]]


def narrower(levels: Tensor, most: Tensor) -> list[Move]:
    return [(i, int(levels[i]) + 1) for i in range(1, len(levels), 2) if levels[i] + 1 < most[i]]


def fewer_groups(levels: Tensor, most: Tensor) -> list[Move]:
    return [(i, int(levels[i]) + 1) for i in range(0, len(levels), 2) if levels[i] + 1 < most[i]]


def greedy(scorer: Scorer, levels: Tensor, moves: Callable[[Tensor], list[Move]], until: float, lazy: bool) -> Tensor:
    """Take the best move, one after another, until `until` steps have gone."""
    increases: dict[Move, float] = {}
    scorer.rebase(levels)
    now = scorer.score(levels)
    while levels.sum() < until - 1e-9:
        open_moves = moves(levels)
        if not lazy:
            increases = {}
        best = least(open_moves, increases, partial(_increase, scorer, levels, now))
        levels = moved(levels, best)
        now += increases.pop(best)
        scorer.rebase(levels)
    return levels


def _increase(scorer: Scorer, levels: Tensor, now: float, move: Move) -> float:
    return scorer.score(moved(levels, move)) - now


def least(moves: list[Move], known: dict[Move, float], increase: Callable[[Move], float]) -> Move:
    """The move of least increase; those never scored are scored first, others while they may be the best."""
    fresh: set[Move] = set()
    while True:
        best = min(moves, key=lambda move: known.get(move, -torch.inf))
        if best in fresh:
            return best
        known[best] = increase(best)
        fresh.add(best)


def moved(levels: Tensor, move: Move) -> Tensor:
    new = levels.clone()
    new[move[0]] = move[1]
    return new
