"""Odd models that must stay prunable, come out right, or be frozen with the reason."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.candidates import outputs_of, random_pruning
from tests.small_networks import Net, assert_right, conv, known, picks, reasons


def blurred() -> nn.Module:
    net = picks(lambda s, x: s.head(F.conv2d(s.a(x), s.blur, groups=len(s.blur))))()
    net.register_buffer("blur", torch.rand(8, 1, 3, 3))
    return net


def sknet() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        u, v = s.a(x), s.b(x)
        gates = s.up(F.relu(s.down((u + v).mean((2, 3))))).view(len(x), 2, -1).softmax(1)
        return s.head(u * gates[:, 0, :, None, None] + v * gates[:, 1, :, None, None])

    layers = {"a": conv(3, 8), "b": conv(3, 8), "down": nn.Linear(8, 4), "up": nn.Linear(4, 16)}
    return Net(forward, **layers, head=conv(8, 2, 1))


def nonlocal_block() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.a(x)
        q, k, v = (m(y).flatten(2) for m in (s.q, s.k, s.v))
        mixed = v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)
        return s.head(y + s.out(mixed.view(len(y), -1, *y.shape[2:])))

    parts = {"q": conv(8, 6, 1), "k": conv(8, 6, 1), "v": conv(8, 5, 1), "out": conv(5, 8, 1)}
    return Net(forward, a=conv(3, 8), **parts, head=conv(8, 2, 1))


def quarters_apart() -> nn.Module:
    """Two readers of one half each: code that needs both halves to keep equally many channels."""

    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.a(x)
        half = y.shape[1] // 2
        return s.head(y[:, :half]) + s.other(y[:, half:])

    return Net(forward, a=conv(3, 4), head=conv(2, 2, 1), other=conv(2, 2, 1))


def film() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        scale, shift = s.g(x.mean((2, 3))).chunk(2, 1)
        return s.head(F.relu(s.a(x) * (1 + scale[..., None, None]) + shift[..., None, None]))

    return Net(forward, a=conv(3, 8), g=nn.Linear(3, 16), head=conv(8, 2, 1))


def einsum() -> nn.Module:
    weight = nn.Parameter(torch.randn(8, 10))
    return picks(lambda s, x: s.head(torch.einsum("bchw,cd->bdhw", s.a(x), s.w)), w=weight, head=conv(10, 2, 1))()


def tokens() -> nn.Module:
    """An odd use of a per-sample kernel: a convolution grouped by sample, as dynamic convolutions do."""

    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.a(x)
        kernels = (s.mix(y.mean((2, 3))) @ s.bank.flatten(1)).view(-1, *s.bank.shape[2:])
        out = F.conv2d(y.reshape(1, -1, *y.shape[2:]), kernels, groups=len(y))
        return s.head(out.view(len(y), -1, *out.shape[2:]).relu())

    bank = nn.Parameter(torch.randn(4, 6, 8, 3, 3) / 8)
    return Net(forward, a=conv(3, 8), mix=nn.Linear(8, 4), bank=bank, head=conv(6, 2, 1))


def recurrent() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.head(s.rnn(s.a(x).flatten(2).transpose(1, 2))[0][:, -1])

    return Net(forward, a=conv(3, 8), rnn=nn.LSTM(8, 6, batch_first=True), head=nn.Linear(6, 2))


def weight_normed() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(conv(8, 8, groups=8))
    return nn.Sequential(conv(3, 8), nn.ReLU(), normed, conv(8, 2, 1))


def multi_head() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.a(x).flatten(2).transpose(1, 2)
        return s.head(s.attention(y, y, y, need_weights=False)[0].mean(1))

    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    return Net(forward, a=conv(3, 8), attention=attention, head=nn.Linear(8, 2))


ODD = {
    "PReLU": lambda: nn.Sequential(conv(3, 8), nn.PReLU(8), conv(8, 2, 1)),
    "instance norm": lambda: nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv(8, 2, 1)),
    "batch norm without anything": picks(lambda s, x: s.head(F.batch_norm(s.a(x), None, None, training=True))),
    "selective kernels": sknet,
    "non-local attention": nonlocal_block,
    "feature-wise modulation": film,
    "einsum": einsum,
    "upsampled": lambda: nn.Sequential(conv(3, 8), nn.Upsample(scale_factor=1.5, mode="bilinear"), conv(8, 2, 1)),
    "concatenated along the batch": picks(lambda s, x: s.head(torch.cat((s.a(x), s.a(x.flip(3))), 0).relu())),
    "stacked and summed": picks(lambda s, x: s.head(torch.stack((s.a(x), s.b(x)), 1).sum(1)), b=conv(3, 8)),
    "interleaved": picks(lambda s, x: s.head(s.a(x).repeat_interleave(2, 1)), head=conv(16, 2, 1)),
    "repeated": picks(
        lambda s, x: s.head(s.a(x) + s.one.repeat(1, s.a.weight.shape[0], 1, 1)),
        one=nn.Parameter(torch.ones(1, 1, 1, 1)),
    ),
    "number read from a tensor": picks(lambda s, x: s.head(s.a(x) * (1 + s.a.bias.sum().item() * 0))),
    "layer norm over a map": lambda: nn.Sequential(conv(3, 8), nn.LayerNorm((8, 6, 6)), nn.ReLU(), conv(8, 2, 1)),
    "cosine classifier": lambda: Net(
        lambda s, x: F.linear(F.normalize(s.a(x).relu().mean((2, 3))), F.normalize(s.w)),
        a=conv(3, 8),
        w=nn.Parameter(torch.randn(4, 8)),
    ),
    "depthwise kernel in a buffer": blurred,
    "view of nothing": picks(lambda s, x: s.head(s.a(x)) + s.a(x)[:, :0].reshape(len(x), -1).sum()),
}
"""Models without an example in the zoo that must stay prunable."""


FROZEN = {
    "every second channel": (
        picks(lambda s, x: s.head(s.a(x)[:, ::2]), head=conv(4, 2, 1)),
        "a.weight",
        "steps of 2",
    ),
    "rotated": (picks(lambda s, x: s.head(s.a(x).roll(1, 1))), "a.weight", "rotated"),
    "running sum": (picks(lambda s, x: s.head(s.a(x).cumsum(1))), "a.weight", "check"),
    "positions of maxima": (picks(lambda s, x: s.head(s.a(x)) + s.a(x).max(1, True)[1]), "a.weight", "positions"),
    "unpacked": (picks(lambda s, x: s.head(torch.stack(s.a(x).unbind(1), 1))), "a.weight", "one by one"),
    "Fourier transform": (picks(lambda s, x: s.head(torch.fft.fft(s.a(x), dim=1).abs())), "a.weight", "fft"),
    "bit pattern": (picks(lambda s, x: s.head(s.a(x)) + s.a(x).view(torch.uint8).sum() * 0), "a.weight", "view"),
    "tensor attribute": (picks(lambda s, x: s.head(s.a(x) * s.t), t=torch.rand(8, 1, 1)), "a.weight", "fixed"),
    "fixed depthwise kernel": (
        picks(lambda s, x: s.head(F.conv2d(s.a(x), s.blur, groups=8)), blur=torch.ones(8, 1, 3, 3)),
        "a.weight",
        "fixed",
    ),
    "through NumPy": (
        picks(lambda s, x: s.head(torch.from_numpy(s.a(x).numpy(force=True) * 2))),
        "a.weight",
        "",
    ),
    "order read from values": (
        picks(lambda s, x: s.head(s.a(x)[:, np.argsort(s.a.bias.tolist()).tolist()])),
        "a.weight",
        "",
    ),
    "branch on a value": (
        picks(lambda s, x: s.head(s.a(x) if torch.ones_like(s.a.bias).sum() > 7 else -s.a(x))),
        "a.weight",
        "",
    ),
    "split by numbers": (
        picks(lambda s, x: s.head(torch.cat(torch.split(s.a(x), [5, 3], 1), 1))),
        "a.weight",
        "split",
    ),
    "noise that does not repeat": (picks(lambda s, x: s.head(F.dropout(s.a(x), 0.5, True))), "a.weight", "check"),
}
"""Models in which removing channels of ``a`` would be wrong, and a word of the reason."""


EITHER = {
    "number in a view": picks(
        lambda s, x: s.head(s.a(x).view(len(x), s.channels, -1).mean(2)), head=nn.Linear(8, 2), channels=8
    ),
    "slice by number": picks(lambda s, x: s.head(s.a(x)[:, :6]), head=conv(6, 2, 1)),
    "halves that must stay equal": quarters_apart,
    "dynamic convolution": tokens,
    "LSTM after a convolution": recurrent,
    "weight norm on a depthwise convolution": weight_normed,
    "multi-head attention": multi_head,
    "spectral norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(conv(3, 8)), conv(8, 2)),
    "bilinear": lambda: Net(
        lambda s, x: s.b(s.a(x).mean((2, 3)), s.c(x).mean((2, 3))), a=conv(3, 6), c=conv(3, 5), b=nn.Bilinear(6, 5, 2)
    ),
    "sum of outer products": lambda: Net(
        lambda s, x: s.head(torch.addbmm(s.z, s.a(x)[..., 0], s.b(x)[..., 0].transpose(1, 2))).relu(),
        a=conv(3, 6),
        b=conv(3, 5),
        z=nn.Parameter(torch.randn(6, 5)),
        head=nn.Linear(5, 2),
    ),
}
"""Models for which more rules may one day prune more; whatever is pruned must be right."""


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_odd_models_are_pruned_rightly(make: Callable[[], nn.Module]):
    model, args, structure = known(make)
    assert structure.groups
    assert_right(model, args, structure)


@pytest.mark.parametrize(("make", "tensor", "word"), FROZEN.values(), ids=FROZEN)
def test_what_would_go_wrong_is_frozen_with_the_reason(make: Callable[[], nn.Module], tensor: str, word: str):
    structure = known(make)[2]
    assert tensor not in structure.units_of
    assert reasons(structure, tensor)
    assert word in reasons(structure, tensor)
    assert all(frozen.reason for frozen in structure.frozen)


@pytest.mark.slow
@pytest.mark.parametrize("make", EITHER.values(), ids=EITHER)
def test_hard_models_come_out_right_or_frozen(make: Callable[[], nn.Module]):
    model, args, structure = known(make)
    for seed in range(3):
        for pruning in [random_pruning(structure, np.random.default_rng(seed)) for _ in range(5)]:
            found = outputs_of(structure.build(model, pruning), args)
            dense = outputs_of(model, args)
            assert [out.shape for out in found] == [out.shape for out in dense]
            assert all(out.isfinite().all() for out in found)
    assert all(frozen.reason for frozen in structure.frozen)
    assert structure.groups or structure.frozen
