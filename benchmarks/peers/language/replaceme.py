"""ReplaceMe: a run of blocks replaced by a linear map, which is merged into the layer before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.peers.language.blocks import attended, drop_blocks, embedded, fed, layers_of
from benchmarks.peers.language.case import BATCH, Case
from benchmarks.peers.language.depth import blocks_for


def replace_me(case: Case, share: float, ridge: float) -> nn.Module:
    """Leave out the run of blocks of least cosine distance, and correct the feed-forward part before it.

    With M what that part adds, Y what it adds to, and L the stream after the run, T minimises ``|M T + Y - L|^2`` over
    the calibration tokens; ``T^T W`` takes the place of its last layer's weights W.

    Args:
        case: Model and statistics.
        share: Of the parameters that may stay.
        ridge: Added to the diagonal of ``M^T M``, as a share of its mean; the map is drawn to none at all.

    Reference:
        Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
        2025, arXiv:2505.02819: the least-squares form, equations 4 to 7. Its form by cosine distance, which it finds
        by training the map and which is slightly ahead there, is not repeated.
    """
    blocks = blocks_for(case, share)
    before = best_cut(case.statistics.cosines, blocks)
    model = case.copy()
    last = layers_of(model)[before].mlp.down_proj
    fitted = solve(*products(case.fast, case.ids, before, blocks), ridge)
    last.weight = nn.Parameter((fitted.T @ last.weight.double()).to(last.weight.dtype))
    return drop_blocks(model, set(range(before + 1, before + 1 + blocks)))


def best_cut(cosines: Tensor, blocks: int) -> int:
    """Index of the block before the run whose removal turns the stream least; the first block always stays."""
    return int((1 - cosines.diagonal(blocks)[1:]).argmin())


@torch.no_grad()
def products(model: nn.Module, ids: Tensor, before: int, blocks: int) -> tuple[Tensor, Tensor]:
    """``M^T M`` and ``M^T (L - Y)`` over all tokens, float64, each shape (width, width)."""
    layers = layers_of(model)
    width = layers[0].mlp.down_proj.out_features
    gram = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros_like(gram)
    for part in ids.split(BATCH):
        x, call = embedded(model, part)
        for layer in layers[:before]:
            x = fed(layer, attended(layer, x, call))
        y = attended(layers[before], x, call)
        x = fed(layers[before], y)
        m = (x - y).flatten(0, 1).float()
        for layer in layers[before + 1 : before + 1 + blocks]:
            x = fed(layer, attended(layer, x, call))
        gram += m.T @ m
        cross += m.T @ (x - y).flatten(0, 1).float()
    return gram, cross


def solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The map T, shape (width, width); directions that no token takes stay out of it."""
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.lstsq(damped, cross).solution
