"""Networks given by levels: how much of each attention and feed-forward part is gone, in steps of equal parameters.

A step takes one key-value group with its heads, or as many neurons as have the same parameters. At its highest level a
part is gone. Levels are int64 of shape (2 * blocks,): attention and feed-forward part of each block in turn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peers.language.blocks import attended, embedded, fed, keep_groups, keep_neurons, layers_of
from benchmarks.peers.language.case import Case
from benchmarks.peers.language.flap import unit_sizes

Scores = dict[tuple[tuple[int, ...], tuple[int, ...]], float]  # by levels and rows
Fitness = Callable[[Tensor, Tensor], float]  # (logits of the rows, indices of the rows) -> lower is better


class Parts(Protocol):
    """Says which units of a part stay at a level, and with which weights."""

    def groups(self, block: int, kept: int) -> tuple[Tensor, Tensor | None]:
        """The groups kept, ascending, and the columns of `o_proj` for them, None for its own."""
        ...

    def neurons(self, block: int, kept: int) -> tuple[Tensor, Tensor | None]:
        """The neurons kept, ascending, and the columns of `down_proj` for them, None for its own."""
        ...


class Stitched:
    """Networks of given levels, from parts that are made once."""

    def __init__(self, case: Case, parts: Parts) -> None:
        self.case = case
        self.parts = parts
        self.made: dict[tuple[int, int], nn.Module] = {}
        group, neuron = unit_sizes(case.layers[0])
        width = case.layers[0].mlp.down_proj.in_features
        self.step = group
        self.most = torch.tensor([case.model.config.num_key_value_heads, round(width * neuron / group)])
        self.most = self.most.repeat(len(case.layers))
        self.width = width

    def kept(self, place: int, level: int) -> int:
        """Groups or neurons left of a part."""
        most = int(self.most[place])
        return most - level if place % 2 == 0 else round(self.width * (most - level) / most)

    def steps(self, share: float) -> int:
        """Steps that must go for a share of the parameters."""
        over = self.case.parameters - self.case.most(share)
        return -(-over // self.step)

    def part(self, place: int, level: int) -> nn.Module:
        """A block of which only the attention (even places) or the feed-forward part is at this level, as a shell."""
        if (place, level) not in self.made:
            self.made[place, level] = self._make(place, level)
        return self.made[place, level]

    def _make(self, place: int, level: int) -> nn.Module:
        block = shell(layers_of(self.case.fast)[place // 2])
        if level == 0:
            return block
        block.self_attn = shell(block.self_attn)
        block.mlp = shell(block.mlp)
        kept = self.kept(place, level)
        if place % 2 == 0:
            units, weight = self.parts.groups(place // 2, kept)
            keep_groups(block, units, weight)
        else:
            units, weight = self.parts.neurons(place // 2, kept)
            keep_neurons(block, units, weight)
        return block

    def network(self, levels: Tensor) -> nn.Module:
        model = self.case.fast
        whole = shell(model)
        whole.model = shell(model.get_submodule("model"))
        blocks = []
        for i in range(0, len(levels), 2):
            block = shell(self.part(i, int(levels[i])))
            other = self.part(i + 1, int(levels[i + 1]))
            block.mlp = other.mlp
            block.post_attention_layernorm = other.post_attention_layernorm
            blocks.append(block)
        whole.model.layers = nn.ModuleList(blocks)
        return copy.deepcopy(whole)


def shell(module: nn.Module) -> nn.Module:
    """A module that shares everything with another but may be given other children."""
    new = copy.copy(module)
    new._modules = dict(module._modules)
    return new


class Scorer:
    """Scores levels on a few sequences; what agrees with the current base up to some block is not computed again."""

    def __init__(self, stitched: Stitched, ids: Tensor, fitness: Fitness, known: Scores | None = None) -> None:
        self.stitched = stitched
        self.known: Scores = {} if known is None else known
        self.fitness = fitness
        self.start, self.call = embedded(stitched.case.fast, ids)
        self.evaluations = 0.0  # in passes over all sequences, whatever was saved
        self.base = torch.full_like(stitched.most, -1)
        self.states: list[Tensor] = [self.start]

    @torch.no_grad()
    def score(self, levels: Tensor, rows: Tensor | None = None) -> float:
        """Fitness of the network, on some of the sequences or on all."""
        chosen = torch.arange(len(self.start)) if rows is None else rows
        self.evaluations += len(chosen) / len(self.start)
        name = (tuple(levels.tolist()), tuple(chosen.tolist()))
        if name not in self.known:
            self.known[name] = self._score(levels, chosen)
        return self.known[name]

    def _score(self, levels: Tensor, chosen: Tensor) -> float:
        same = (levels == self.base).long().cumprod(0).sum() // 2
        x = self.states[int(same)][chosen]
        for i in range(2 * int(same), len(levels), 2):
            x = self.advance(x, levels, i)
        model = self.stitched.case.fast
        return self.fitness(model.lm_head(model.get_submodule("model.norm")(x)), chosen)

    @torch.no_grad()
    def rebase(self, levels: Tensor) -> None:
        """Keep the streams of this network for those to come."""
        self.states = [self.start]
        for i in range(0, len(levels), 2):
            self.states.append(self.advance(self.states[-1], levels, i))
        self.base = levels.clone()

    def advance(self, x: Tensor, levels: Tensor, place: int) -> Tensor:
        x = attended(self.stitched.part(place, int(levels[place])), x, self.call)
        return fed(self.stitched.part(place + 1, int(levels[place + 1])), x)


def remember(case: Case, method: str) -> Scores:
    """Scores that a method may use again for another share of the same case."""
    found = case.kept.setdefault(f"scores of {method}", {})
    assert isinstance(found, dict)
    return found


def next_token(ids: Tensor) -> Fitness:
    """Mean cross-entropy of the next token, in nats."""

    def loss(logits: Tensor, rows: Tensor) -> float:
        each = [F.cross_entropy(x[:-1].float(), ids[row, 1:]) for x, row in zip(logits, rows, strict=True)]
        return float(torch.stack(each).mean())

    return loss


def divergence(dense: Tensor) -> Fitness:
    """Mean Kullback-Leibler divergence from the dense model, in nats; `dense` are its logits on all sequences."""

    def loss(logits: Tensor, rows: Tensor) -> float:
        each = [
            F.kl_div(x.float().log_softmax(-1), dense[row].float().log_softmax(-1), log_target=True, reduction="sum")
            for x, row in zip(logits, rows, strict=True)
        ]
        return float(torch.stack(each).mean()) / logits.shape[1]

    return loss
