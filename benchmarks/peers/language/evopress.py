"""EvoPress: one network evolves by switching levels between parts, each made by optimal brain surgeon."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.peers.language.case import Case
from benchmarks.peers.language.levels import Scorer, Stitched, divergence
from benchmarks.peers.language.obs import Layer, refitted, removal_order

SEQUENCES = 8  # of the calibration sequences; a whole evaluation passes over these 2,048 tokens
FIRST = 1  # sequences that all children are scored on
CHILDREN, SURVIVORS = 8, 2
SWITCHES = 3  # at most
AT_ONCE = 16  # neurons between two updates of the surgeon


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


def evo_press(case: Case, share: float, damping: float) -> nn.Module:
    """Evolve levels under a fixed number of steps gone, by the divergence from the dense network.

    A generation: `CHILDREN` of the best so far, by up to three switches (one part a step down, another up), scored on a
    few sequences; the best `SURVIVORS` and their parent on all of them. The first generation is drawn around uniform
    widths. Ends when `case.evaluations` passes over all sequences are spent.

    Reference:
        Sieberling, Kuznedelev, Kurtic and Alistarh, "EvoPress: Accurate Dynamic Model Compression via Evolutionary
        Search", ICML 2025, arXiv:2410.14649, algorithm 1 (level-switch mutation, elitism in the last selection).
        Sequences of the last selection stay the same here, so that the parent keeps its score.
    """
    stitched = case.kept.setdefault(f"surgeon {damping}", Stitched(case, Surgeon(case, damping)))
    ids = case.ids[:SEQUENCES]
    with torch.no_grad():
        dense = torch.cat([case.fast(input_ids=part, use_cache=False).logits for part in ids.split(4)])
    scorer = Scorer(stitched, ids, divergence(dense))
    generator = torch.Generator().manual_seed(case.seed)
    steps = stitched.steps(share)
    best = select(scorer, [first(stitched.most, steps, generator) for _ in range(CHILDREN)], None, generator)
    while scorer.evaluations < case.evaluations:
        scorer.rebase(best[0])
        children = [switched(best[0], stitched.most, generator) for _ in range(CHILDREN)]
        best = select(scorer, children, best, generator)
    case.kept["evaluations"] = scorer.evaluations
    return stitched.network(best[0])


Scored = tuple[Tensor, float]


def first(most: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Levels of feed-forward parts as equal as the steps allow, the rest drawn, then switched a few times."""
    places = torch.arange(1, len(most), 2)
    levels = torch.zeros_like(most)
    levels[places] = steps // len(places)
    rest = steps - int(levels.sum())
    levels[places[torch.randperm(len(places), generator=generator)[:rest]]] += 1
    for _ in range(SWITCHES):
        levels = switched(levels, most, generator)
    return levels


def switched(levels: Tensor, most: Tensor, generator: torch.Generator) -> Tensor:
    """Raise some parts by a level and lower as many others, min(U{1..3}, U{1..3}) of each."""
    new = levels.clone()
    count = int(torch.randint(1, SWITCHES + 1, (2,), generator=generator).min())
    for _ in range(count):
        up = drawn(new < most, generator)
        can_fall = new > 0
        can_fall[up] = False
        down = drawn(can_fall, generator)
        new[up] += 1
        new[down] -= 1
    return new


def drawn(allowed: Tensor, generator: torch.Generator) -> int:
    places = allowed.nonzero()[:, 0]
    return int(places[torch.randint(len(places), (1,), generator=generator)])


def select(scorer: Scorer, children: list[Tensor], parent: Scored | None, generator: torch.Generator) -> Scored:
    """The best by all sequences among the parent and the children that do best on a few."""
    rows = torch.randperm(len(scorer.start), generator=generator)[:FIRST]
    early = [scorer.score(child, rows) for child in children]
    ahead = sorted(range(len(children)), key=early.__getitem__)[:SURVIVORS]
    finals = [(children[i], scorer.score(children[i])) for i in ahead]
    return min([*finals, *([parent] if parent else [])], key=lambda scored: scored[1])
