"""Leaving out whole blocks: the last ones, those that change the stream least, or the run that turns it least."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.peers.language.blocks import drop_blocks
from benchmarks.peers.language.case import Case


def blocks_for(case: Case, share: float) -> int:
    """The fewest blocks whose removal leaves at most this share of the parameters."""
    each = sum(p.numel() for p in case.layers[0].parameters())
    return -(-(case.parameters - case.most(share)) // each)


def last_blocks(case: Case, share: float, spared: int) -> nn.Module:
    """Leave out the last blocks but for the final `spared` ones.

    Reference:
        The baselines of Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        2024, arXiv:2403.03853 (the very last), and of Gromov et al., "The Unreasonable Ineffectiveness of the Deeper
        Layers", ICLR 2025, arXiv:2403.17887 (all but the final block).
    """
    end = len(case.layers) - spared
    return drop_blocks(case.copy(), set(range(end - blocks_for(case, share), end)))


def influences(cosines: Tensor) -> Tensor:
    """Block influence: 1 minus the mean cosine between what a block reads and what it leaves, shape (layers,).

    Reference:
        Men et al., arXiv:2403.03853, equation 1.
    """
    return 1 - cosines.diagonal(1)


def short_gpt(case: Case, share: float) -> nn.Module:
    """Leave out the blocks of least influence, scored once on the dense model (ShortGPT)."""
    least = influences(case.statistics.cosines).argsort()[: blocks_for(case, share)]
    return drop_blocks(case.copy(), set(least.tolist()))


def distances(angles: Tensor, blocks: int) -> Tensor:
    """Angle over pi between the streams before block i and before block i + `blocks`, shape (runs,)."""
    return angles.diagonal(blocks) / torch.pi


def angular(case: Case, share: float, last_token: bool) -> nn.Module:
    """Leave out the run of blocks across which the stream turns least.

    Args:
        case: Model and statistics.
        share: Of the parameters that may stay.
        last_token: Measure at the last token of each sequence, as the paper does, or over all tokens.

    Reference:
        Gromov et al., arXiv:2403.17887, equation 7 and steps 1 to 4 of its section 3.2, without healing.
    """
    blocks = blocks_for(case, share)
    found = case.statistics.angles if last_token else case.statistics.cosines.clamp(-1, 1).arccos()
    first = int(distances(found, blocks).argmin())
    return drop_blocks(case.copy(), set(range(first, first + blocks)))
