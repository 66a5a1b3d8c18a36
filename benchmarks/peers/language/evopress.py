"""EvoPress: one network evolves by switching levels between parts, each made by optimal brain surgeon."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.peers.language.case import Case
from benchmarks.peers.language.levels import Scorer, Stitched, divergence
from benchmarks.peers.language.surgeon import surgeon_of

SEQUENCES = 8  # of the calibration sequences; a whole evaluation passes over these 2,048 tokens
FIRST = 1  # sequences that all children are scored on
CHILDREN, SURVIVORS = 8, 2
SWITCHES = 3  # at most


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
    stitched = Stitched(case, surgeon_of(case, damping))
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
