"""SliceGPT: rotate the residual stream onto its principal directions and cut the least of them off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.peers.language.blocks import embedded, layers_of, linear
from benchmarks.peers.language.case import BATCH, Case, unit

Streams = list[Tensor]  # a batch each, shape (n, tokens, directions)
Rotation = Callable[[Streams, bool], Tensor]  # (streams in all directions, is it the last) -> basis (width, kept)


class SlicedNorm(nn.Module):
    """RMSNorm without weights that still divides by the number of directions before the cut."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width = width
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        squares = x.float().square().sum(-1, keepdim=True) / self.width
        return (x * (squares + self.eps).rsqrt()).to(x.dtype)


class SlicedBlock(nn.Module):
    """A block on a cut stream, with a linear map on each residual connection where the directions change."""

    def __init__(self, block: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.self_attn = block.self_attn
        self.mlp = block.mlp
        self.norm = norm
        self.turns = nn.ModuleList([nn.Identity(), nn.Identity()])

    def forward(self, hidden_states: Tensor, **call: Any) -> Tensor:
        x = self.turns[0](hidden_states) + self.self_attn(hidden_states=self.norm(hidden_states), **call)[0]
        out: Tensor = self.turns[1](x) + self.mlp(self.norm(x))
        return out


@torch.no_grad()
def slice_gpt(case: Case, share: float, rotations: Literal["each", "one"], normed: bool = True) -> nn.Module:
    """Keep as many principal directions as the budget holds, the maps between different rotations counted.

    Args:
        case: Model and statistics.
        share: Of the parameters that may stay.
        rotations: ``"each"`` norm its own, from streams of the network cut so far, with a map on every residual
            connection (the paper); ``"one"`` for all, from the dense model, without maps.
        normed: Take principal directions of what norms return (the paper), or of what they are given (its code).

    Reference:
        Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", ICLR 2024,
        arXiv:2401.15024, section 3. Widths are not rounded; with rotations of their own the output of the last block
        is not cut, as in its code. Input and output embeddings are no longer one matrix; neither is counted.
    """
    model = case.copy().to(case.dtype)
    kept = directions(case, share, own=rotations == "each")
    if rotations == "each":
        streams = [embedded(model, part)[0] for part in case.ids.split(BATCH)]
        every = torch.eye(model.config.hidden_size, dtype=torch.float64)
        return cut(model, lambda seen, last: every if last else principal(seen, normed)[:, :kept], streams, case.ids)
    basis = eigenvectors(case.statistics.streams.gram)[:, :kept]
    return cut(model, lambda seen, last: basis, [], case.ids)


def directions(case: Case, share: float, own: bool) -> int:
    """Return the number of directions that the parameters allow, with maps between rotations (`own`) or without."""
    width = case.model.config.hidden_size
    matrices = [p.numel() // width for layer in case.layers for p in layer.parameters() if p.ndim == 2]
    uncut = case.layers[-1].mlp.down_proj.in_features if own else 0  # rows of the last matrix, all of which stay

    def size(kept: int) -> int:
        maps = (2 * len(case.layers) - 1) * kept**2 + width * kept if own else 0
        return (sum(matrices) - uncut) * kept + uncut * width + maps

    return next(kept for kept in range(width, 0, -1) if size(kept) <= case.most(share))


def eigenvectors(gram: Tensor) -> Tensor:
    """Principal directions, the largest first, float64, shape (width, width)."""
    return torch.linalg.eigh(gram.double()).eigenvectors.flip(1)


def principal(streams: Streams, normed: bool) -> Tensor:
    rows = [(unit(x) if normed else x.float()).flatten(0, 1) for x in streams]
    return eigenvectors(sum((x.T @ x).double() for x in rows))


def cut(model: nn.Module, rotation: Rotation, streams: Streams, ids: Tensor) -> nn.Module:
    """Cut the embedding, every block and the output layer, in place, with the streams of what is cut so far.

    The streams are empty where the rotation does not need them.
    """
    stem = model.get_submodule("model")
    call = embedded(model, ids[:1])[1]
    basis = rotation(streams, False)
    head = model.lm_head.weight.double() * stem.norm.weight.double()
    rows = stem.embed_tokens.weight
    stem.embed_tokens.weight = nn.Parameter((rows.double() @ basis).to(rows.dtype))
    streams = project(streams, basis)
    norm = SlicedNorm(model.config.hidden_size, model.config.rms_norm_eps)
    count = len(layers_of(model))
    for i in range(count):
        block = layers_of(model)[i]
        sliced = SlicedBlock(block, norm)
        read(block.self_attn, ("q_proj", "k_proj", "v_proj"), block.input_layernorm.weight, basis)
        full = [back(x, basis) + block.self_attn(hidden_states=norm(x), **call)[0] for x in streams]
        basis = write(sliced, 0, block.self_attn.o_proj, basis, rotation(full, False))
        streams = project(full, basis)
        read(block.mlp, ("gate_proj", "up_proj"), block.post_attention_layernorm.weight, basis)
        full = [back(x, basis) + block.mlp(norm(x)) for x in streams]
        basis = write(sliced, 1, block.mlp.down_proj, basis, rotation(full, i == count - 1))
        streams = project(full, basis)
        stem.layers[i] = sliced
    model.lm_head = linear((head @ basis).to(rows.dtype))
    model.config.tie_word_embeddings = False
    stem.norm = norm
    return model


def read(part: nn.Module, names: tuple[str, ...], gain: Tensor, basis: Tensor) -> None:
    """Let these layers read the cut stream, with the weight of the norm before them merged."""
    for name in names:
        weight = getattr(part, name).weight
        setattr(part, name, linear(((weight.double() * gain.double()) @ basis).to(weight.dtype)))


def write(sliced: SlicedBlock, place: int, writer: nn.Linear, basis: Tensor, following: Tensor) -> Tensor:
    """Let this layer write in the following basis, and turn the residual connection into it; returns that basis."""
    dtype = writer.weight.dtype
    if following is not basis:
        sliced.turns[place] = linear((following.T @ basis).to(dtype))
    writer.weight = nn.Parameter((following.T @ writer.weight.double()).to(dtype))
    writer.out_features = following.shape[1]
    return following


def project(streams: Streams, basis: Tensor) -> Streams:
    return [(x.float() @ basis.float()).to(x.dtype) for x in streams]


def back(x: Tensor, basis: Tensor) -> Tensor:
    return (x.float() @ basis.float().T).to(x.dtype)
