"""Small models whose groups are known by hand, odd ones that must come out right or frozen, and what is refused."""

import dataclasses
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.costs import StructuralCosts
from autoprune.errors import NothingToPruneError, StructureCheckError, UnsupportedModelError
from autoprune.protocols import Pruning
from autoprune.structure import analysis
from autoprune.structure.analysis import analyse, best_choices, require_prunable
from autoprune.structure.propagate import INNER, OUTER, Propagation, propagate
from autoprune.structure.slicing import Slicer
from autoprune.structure.structure import Structure
from autoprune.structure.trace import Record, trace
from autoprune.structure.units import Units, find_units
from tests.candidates import gap, oracle_outputs, outputs_of, random_pruning, state_of, widths_of
from tests.zoo import draw, settled

IMAGE = (3, 8, 8)
Forward = Callable[..., Any]


class Net(nn.Module):
    """Modules, parameters and other attributes by name, and a forward that reads them."""

    def __init__(self, run: Forward, **attributes: Any):
        super().__init__()
        self.run = run
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


def known(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> tuple[nn.Module, tuple[Tensor, ...], Structure]:
    model, args = settled(make, shapes or (IMAGE,)), draw(shapes or (IMAGE,))
    return model, args, analyse(model, args)


def assert_right(model: nn.Module, args: tuple[Any, ...], structure: Structure, seed: int = 0) -> None:
    """What is built from any units of any group equals the masked dense model."""
    rng = np.random.default_rng(seed)
    for _ in range(10):
        pruning = random_pruning(structure, rng)
        found = outputs_of(structure.build(model, pruning), args)
        assert gap(found, oracle_outputs(model, structure.edit(pruning), args)) <= 1e-5


def slots_of(structure: Structure) -> dict[str, tuple[int, str]]:
    """For each group its size and the parameter dimensions that it touches, for example ``"stem.weight:0"``."""
    return {
        group.name: (group.size, " ".join(sorted(f"{slot.tensor}:{slot.dim}" for slot in group.slots)))
        for group in structure.groups
    }


def indices(structure: Structure, group: str, tensor: str) -> list[list[int]]:
    (slot,) = [s for g in structure.groups if g.name == group for s in g.slots if s.tensor == tensor]
    return slot.indices.tolist()


def reasons(structure: Structure, tensor: str) -> str:
    return "; ".join(frozen.reason for frozen in structure.frozen if frozen.tensor == tensor)


def residual() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.stem(x)
        return s.head(F.relu(y + s.body(y)))

    return Net(forward, stem=conv(3, 8, padding=1), body=conv(8, 8, padding=1), head=conv(8, 2, 1, bias=False))


def concatenation() -> nn.Module:
    return Net(lambda s, x: s.head(torch.cat((s.a(x), s.b(x)), 1)), a=conv(3, 4), b=conv(3, 6), head=conv(10, 2, 1))


def flattened() -> nn.Module:
    return nn.Sequential(conv(3, 5), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(20, 3))


def depthwise() -> nn.Module:
    multiplied = (conv(3, 6), conv(6, 12, groups=6), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 2, 1))
    return nn.Sequential(*multiplied)


def halves(width: int = 8) -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        left, right = s.a(x).chunk(2, dim=1)
        return s.head(left * right.sigmoid())

    return Net(forward, a=conv(3, 2 * width), head=conv(width, 2, 1))


def pixel_shuffled() -> nn.Module:
    return nn.Sequential(conv(3, 16), nn.PixelShuffle(2), conv(4, 6), nn.PixelUnshuffle(2), nn.ReLU(), conv(24, 2, 1))


def padded() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.head(F.relu(F.pad(s.a(x), (0, 0, 0, 0, 1, 2))))

    return Net(forward, a=conv(3, 6), head=conv(9, 2, 1))


def functional() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, s.kernel, s.shift).relu_(), s.weights[0]).add_(1)

    weights = nn.ParameterList([nn.Parameter(torch.randn(2, 8, 1, 1))])
    kernel, shift = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8))
    return Net(forward, kernel=kernel, shift=shift, weights=weights)


def tied() -> nn.Module:
    first, second = conv(8, 8, bias=False), conv(8, 8, bias=False)
    second.weight = first.weight
    return nn.Sequential(conv(3, 8), nn.ReLU(), first, nn.ReLU(), second, conv(8, 2, 1))


def masked() -> nn.Module:
    net = Net(lambda s, x: s.head(s.a(x) * s.mask.view(1, -1, 1, 1)), a=conv(3, 8), head=conv(8, 2, 1))
    net.register_buffer("mask", torch.rand(8))
    return net


def assigned() -> nn.Module:
    def forward(s: Net, x: Tensor) -> Tensor:
        a, b = s.a(x), s.b(x)
        out = x.new_zeros(len(x), a.shape[1] + b.shape[1], *a.shape[2:])
        out[:, : a.shape[1]] = a
        out[:, a.shape[1] :] = b
        return s.head(out)

    return Net(forward, a=conv(3, 8), b=conv(3, 6), head=conv(14, 2, 1))


def attentive() -> nn.Module:
    """Spatial attention from the mean and the maximum over channels (CBAM)."""

    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.a(x).relu()
        return s.head(y * s.gate(torch.cat((y.sum(1, keepdim=True), y.max(1, keepdim=True)[0]), 1)).sigmoid())

    return Net(forward, a=conv(3, 8), gate=conv(2, 1, padding=1), head=conv(8, 2, 1))


def transposed_in_place() -> nn.Module:
    return Net(lambda s, x: s.head(s.a(x).transpose_(1, 2).sum(2)), a=nn.Linear(4, 4), head=nn.Linear(4, 2))


NORM = ("bias", "running_mean", "running_var", "weight")
BY_HAND = {
    "residual": (
        residual,
        {"stem": (8, "body.bias:0 body.weight:0 body.weight:1 head.weight:1 stem.bias:0 stem.weight:0")},
    ),
    "concatenation": (
        concatenation,
        {"a": (4, "a.bias:0 a.weight:0 head.weight:1"), "b": (6, "b.bias:0 b.weight:0 head.weight:1")},
    ),
    "flatten": (flattened, {"0": (5, "0.bias:0 0.weight:0 4.weight:1")}),
    "depthwise": (
        depthwise,
        {"0": (6, f"0.bias:0 0.weight:0 1.bias:0 1.weight:0 {' '.join(f'2.{name}:0' for name in NORM)} 4.weight:1")},
    ),
    "chunk": (halves, {"a": (8, "a.bias:0 a.weight:0 head.weight:1")}),
    "glu": (lambda: nn.Sequential(conv(3, 16), nn.GLU(1), conv(8, 2, 1)), {"0": (8, "0.bias:0 0.weight:0 2.weight:1")}),
    "pixel shuffle": (
        pixel_shuffled,
        {"0": (4, "0.bias:0 0.weight:0 2.weight:1"), "2": (6, "2.bias:0 2.weight:0 5.weight:1")},
    ),
    "padded channels": (padded, {"a": (6, "a.bias:0 a.weight:0 head.weight:1")}),
    "functions of parameters": (functional, {"kernel": (8, "kernel:0 shift:0 weights.0:1")}),
    "tied weights": (tied, {"0": (8, "0.bias:0 0.weight:0 2.weight:0 2.weight:1 5.weight:1")}),
    "buffer": (masked, {"a": (8, "a.bias:0 a.weight:0 head.weight:1 mask:0")}),
    "slice assignment": (
        assigned,
        {"a": (8, "a.bias:0 a.weight:0 head.weight:1"), "b": (6, "b.bias:0 b.weight:0 head.weight:1")},
    ),
    "maximum over channels": (attentive, {"a": (8, "a.bias:0 a.weight:0 head.weight:1")}),
}


@pytest.mark.parametrize(("make", "groups"), BY_HAND.values(), ids=BY_HAND)
def test_groups_are_those_known_by_hand(make: Callable[[], nn.Module], groups: dict[str, tuple[int, str]]):
    model, args, structure = known(make)
    assert slots_of(structure) == groups
    assert structure.device == "meta"
    assert_right(model, args, structure)


class TestWhatAUnitOwns:
    def test_concatenated_channels_lie_behind_each_other(self):
        _, _, structure = known(concatenation)
        assert indices(structure, "a", "head.weight") == [[0], [1], [2], [3]]
        assert indices(structure, "b", "head.weight") == [[4], [5], [6], [7], [8], [9]]

    def test_a_flattened_channel_is_as_many_columns_as_it_has_pixels(self):
        _, _, structure = known(flattened)
        assert indices(structure, "0", "4.weight") == [[4 * c + pixel for pixel in range(4)] for c in range(5)]

    def test_the_halves_of_a_gate_go_together(self):
        _, _, structure = known(halves)
        assert indices(structure, "a", "a.weight") == [[i, i + 8] for i in range(8)]

    def test_pixel_shuffle_takes_runs_of_four(self):
        _, _, structure = known(pixel_shuffled)
        assert indices(structure, "0", "0.weight") == [[4 * i + j for j in range(4)] for i in range(4)]
        assert indices(structure, "2", "5.weight") == [[4 * i + j for j in range(4)] for i in range(6)]

    def test_padded_channels_stay(self):
        _, _, structure = known(padded)
        assert indices(structure, "a", "head.weight") == [[i] for i in range(1, 7)]
        (frozen,) = [f for f in structure.frozen if (f.tensor, f.dim) == ("head.weight", 1)]
        assert (frozen.size, frozen.reason) == (3, "tied to a part of constant size by convolution in head")


def grouped() -> nn.Module:
    return nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 24, groups=4, padding=1), nn.BatchNorm2d(24), conv(24, 2, 1))


def grouped_transposed() -> nn.Module:
    layers = (nn.ConvTranspose2d(12, 8, 2, stride=2, groups=4), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2, 1))
    return nn.Sequential(conv(3, 12), nn.ReLU(), *layers)


def group_normed() -> nn.Module:
    return nn.Sequential(conv(3, 12), nn.GroupNorm(4, 12), nn.ReLU(), conv(12, 2, 1))


def shuffled() -> nn.Module:
    return nn.Sequential(conv(3, 12), nn.ChannelShuffle(3), nn.ReLU(), conv(12, 12, groups=3), conv(12, 2, 1))


@pytest.mark.parametrize("make", [grouped, grouped_transposed, group_normed], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("choice", "size"), [(OUTER, 4), (INNER, 3)])
def test_grouped_layers_lose_whole_groups_or_as_much_of_each(
    make: Callable[[], nn.Module], choice: str, size: int, monkeypatch: pytest.MonkeyPatch
):
    def chosen(record: Record) -> tuple[Propagation, Units]:
        flow = propagate(record, dict.fromkeys(propagate(record).sites, choice))
        return flow, find_units(flow)

    monkeypatch.setattr(analysis, "best_choices", chosen)
    model, args, structure = known(make)
    assert structure.groups[0].size == size
    assert_right(model, args, structure)


def test_the_better_choice_for_a_grouped_layer_is_found():
    for make in (grouped, grouped_transposed, group_normed, shuffled):
        model, args, structure = known(make)
        assert structure.groups
        assert_right(model, args, structure)


def test_cutting_again_restores_every_attribute():
    layers = (conv(3, 8), conv(8, 16, groups=8), nn.GroupNorm(8, 16), conv(16, 16, groups=4), nn.BatchNorm2d(16))
    model, args, structure = known(lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)))
    slicer = Slicer(model)
    for seed in range(3):
        pruning = random_pruning(structure, np.random.default_rng(seed))
        cut = slicer.cut(structure.edit(pruning))
        assert repr(cut) == repr(structure.build(model, pruning))
        assert repr(cut) != repr(model)
        assert gap(outputs_of(cut, args), outputs_of(structure.build(model, pruning), args)) == 0
        dense = slicer.cut(structure.edit(Pruning()))
        assert repr(dense) == repr(model)
        assert gap(outputs_of(dense, args), outputs_of(model, args)) == 0


def test_attributes_follow_the_weights_of_tied_layers_too():
    model, _, structure = known(tied)
    built = structure.build(model, Pruning({"0": (1, 4, 5)}))
    assert built[4].weight is built[2].weight
    sizes = [(layer.in_channels, layer.out_channels) for layer in built if isinstance(layer, nn.Conv2d)]
    assert sizes == [(3, 3), (3, 3), (3, 3), (3, 2)]


class TestHowAModelIsCalled:
    def test_keyword_and_nested_inputs(self):
        def forward(s: Net, batch: dict[str, Any], *, scale: Tensor) -> dict[str, Any]:
            return {"scores": [s.head(F.relu(s.a(batch["image"][0])) * scale), None], "name": "x"}

        model = settled(residual, (IMAGE,))
        net = Net(forward, a=model.stem, head=model.head).eval()
        (x,) = draw((IMAGE,))
        structure = analyse(net, ({"image": (x, "label")},), {"scale": torch.tensor(2.0)})
        assert slots_of(structure) == {"a": (8, "a.bias:0 a.weight:0 head.weight:1")}

    def test_a_callable_says_which_outputs_matter(self):
        model = settled(lambda: Net(lambda s, x: (s.b(s.a(x)), s.a(x)), a=conv(3, 8), b=conv(8, 2)), (IMAGE,))
        args = draw((IMAGE,))
        assert analyse(model, args).groups == ()
        structure = analyse(model, args, forward=lambda m, x: m(x)[0])
        assert [group.name for group in structure.groups] == ["a"]

    def test_a_model_in_training_mode_with_dropout_comes_back_training(self):
        model = settled(lambda: nn.Sequential(conv(3, 8), nn.Dropout2d(), nn.BatchNorm2d(8), conv(8, 2)), (IMAGE,))
        structure = analyse(model.train(), draw((IMAGE,)))
        assert model.training
        assert structure.build(model, Pruning({"0": (0, 1)})).training
        assert_right(model.eval(), draw((IMAGE,)), structure)

    def test_modules_in_a_plain_list_and_several_calls(self):
        net = Net(lambda s, x: s.head(s.hidden[0](s.hidden[0](s.stem(x)))), stem=conv(3, 8), head=conv(8, 2, 1))
        net.shared = nn.ModuleDict({"block": conv(8, 8, padding=1)})
        net.hidden = [net.shared["block"]]
        model, args, structure = known(lambda: net)
        assert [(group.name, group.size) for group in structure.groups] == [("stem", 8)]
        assert_right(model, args, structure)

    @pytest.mark.parametrize("batch", [1, 3])
    def test_any_batch_size(self, batch: int):
        model, args = settled(flattened, (IMAGE,)), draw((IMAGE,), batch)
        assert_right(model, args, analyse(model, args))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_any_floating_point_type(self, dtype: torch.dtype):
        model, (x,) = settled(residual, (IMAGE,)).to(dtype), draw((IMAGE,))
        structure = analyse(model, (x.to(dtype),))
        assert [group.size for group in structure.groups] == [8]
        assert structure.build(model, Pruning({"stem": (0, 5)})).stem.weight.dtype == dtype

    def test_inference_mode_around_the_call_changes_nothing(self):
        model, args = settled(residual, (IMAGE,)), draw((IMAGE,))
        with torch.inference_mode():
            structure = analyse(model, args)
        assert slots_of(structure) == slots_of(analyse(model, args))

    def test_an_activation_kept_from_an_earlier_pass_is_no_obstacle(self):
        def forward(s: Net, x: Tensor) -> Tensor:
            s.last = s.a(x)
            return s.head(s.last.relu())

        model, args, _ = known(lambda: Net(forward, a=conv(3, 8), head=conv(8, 2)))
        model(*args)
        kept = model.last
        assert not kept.is_leaf
        assert_right(model, args, analyse(model, args))
        assert analyse(model, args).groups

    def test_parameters_that_no_operation_reads_are_reported_and_stay(self):
        net = residual()
        net.unused = nn.Linear(4, 6)
        net.register_buffer("idle", torch.ones(5))
        model, _, structure = known(lambda: net)
        assert structure.untouched == ("unused.weight", "unused.bias")
        assert [group.name for group in structure.groups] == ["stem"]
        assert structure.build(model, Pruning({"stem": (1,)})).unused.weight.shape == (6, 4)
        built = structure.build(model, Pruning({"stem": (1,)}))
        predicted = StructuralCosts(structure).params(widths_of(structure, [Pruning({"stem": (1,)})]))
        assert predicted[0] == sum(p.numel() for p in built.parameters())

    def test_a_forward_that_writes_to_its_inputs_and_buffers_changes_neither(self, global_rng_untouched):
        def forward(s: Net, x: Tensor) -> Tensor:
            s.calls += 1
            s.seen.mul_(0.5)
            x += torch.rand(()).item() * 0
            return s.head(s.a(x))

        net = Net(forward, a=conv(3, 8), head=conv(8, 2))
        net.register_buffer("calls", torch.zeros(()))
        net.seen = torch.ones(2)
        args, before = draw((IMAGE,)), state_of(net)
        with global_rng_untouched():
            structure = analyse(net, args)
        assert structure.groups
        assert state_of(net) == before
        assert net.seen.tolist() == [1, 1]
        assert torch.equal(args[0], draw((IMAGE,))[0])


def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


def picks(forward: Forward, **extra: Any) -> Callable[[], nn.Module]:
    """A convolution of 8 channels, a function of it, and a 1x1 convolution that reads 8."""
    return lambda: Net(forward, **{"a": conv(3, 8), "head": conv(8, 2, 1), **extra})


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
    "Fourier transform": (picks(lambda s, x: s.head(torch.fft.rfft2(s.a(x)).abs())), "a.weight", "fft"),
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


def test_transposing_in_place_gives_other_dimensions():
    model, args, structure = known(transposed_in_place, (4, 4))
    assert slots_of(structure) == {"a": (4, "a.bias:0 a.weight:0 head.weight:1")}
    assert_right(model, args, structure)


def test_statistics_over_channels_are_those_of_the_smaller_model():
    def make(width: int) -> nn.Module:
        return Net(lambda s, x: s.head(s.a(x) * s.a(x).mean(1, True).sigmoid()), a=conv(3, width), head=conv(width, 2))

    model, args, structure = known(lambda: make(8))
    built = structure.build(model, Pruning({"a": (0, 2, 5)}))
    small = make(3).eval()
    small.load_state_dict(built.state_dict())
    assert torch.equal(built.a.weight, model.a.weight[[0, 2, 5]])
    assert torch.equal(built.head.weight, model.head.weight[:, [0, 2, 5]])
    assert gap(outputs_of(built, args), outputs_of(small, args)) == 0


def branches() -> nn.Module:
    """A residual block, a depthwise convolution, a concatenation and a flattened map."""

    def forward(s: Net, x: Tensor) -> Tensor:
        x = s.stem(x)
        x = F.relu(x + s.body(x))
        x = torch.cat((s.depth(x), s.side(x)), 1)
        return s.head(F.max_pool2d(s.norm(x), 3).flatten(1))

    layers = {"stem": conv(3, 4, padding=1), "body": conv(4, 4, padding=1), "depth": conv(4, 4, groups=4)}
    return Net(forward, **layers, side=conv(4, 3), norm=nn.BatchNorm2d(7), head=nn.Linear(28, 3))


def gates() -> nn.Module:
    """A gate from two halves, a shuffle before a grouped convolution, and a tied layer."""

    def forward(s: Net, x: Tensor) -> Tensor:
        left, right = s.a(x).chunk(2, 1)
        x = F.channel_shuffle(left * right.sigmoid(), 2)
        return s.head(s.tied(s.tied(s.grouped(x))).sum((2, 3)))

    layers = {"a": conv(3, 16), "grouped": conv(8, 8, groups=2), "tied": conv(8, 8, 1), "head": nn.Linear(8, 3)}
    return Net(forward, **layers)


def analysed_without_an_edge(
    model: nn.Module, args: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Structure]]:
    """For each coupling the operation that makes it, and the structure found by an analysis that forgets it."""
    flow, _ = best_choices(trace(model, args, {}, call))
    for i, edge in enumerate(flow.edges):
        broken = dataclasses.replace(flow, edges=flow.edges[:i] + flow.edges[i + 1 :])
        monkeypatch.setattr(analysis, "best_choices", lambda record, flow=broken: (flow, find_units(flow)))
        yield flow.record.ops[edge.op].where(), analyse(model, args)


@pytest.mark.parametrize("make", [branches, gates], ids=lambda make: make.__name__)
def test_the_checks_catch_every_coupling_that_is_forgotten_and_matters(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
):
    model, args, whole = known(make)
    assert_right(model, args, whole)
    forgotten = list(analysed_without_an_edge(model, args, monkeypatch))
    for _, structure in forgotten:
        assert_right(model, args, structure)
    changed = [where for where, structure in forgotten if slots_of(structure) != slots_of(whole)]
    assert len(changed) > 5, "a coupling that does not matter cannot be caught"


def test_the_checks_catch_forgotten_couplings_in_16_bits_too(monkeypatch: pytest.MonkeyPatch):
    model, (x,) = settled(residual, (IMAGE,)).bfloat16(), draw((IMAGE,))
    args = (x.bfloat16(),)
    whole = analyse(model, args)
    assert [group.size for group in whole.groups] == [8]
    for where, structure in analysed_without_an_edge(model, args, monkeypatch):  # frozen, or tied again
        assert structure.groups == () or slots_of(structure) == slots_of(whole), where


def test_several_examples_cover_the_branches_of_a_forward():
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.a(x)
        return s.head(y + s.b(x) if x.mean() > 0 else s.c(y) + y)

    model = settled(lambda: Net(forward, a=conv(3, 8), b=conv(3, 8), c=conv(8, 8, 1), head=conv(8, 2, 1)), (IMAGE,))
    bright, dark = torch.rand(2, *IMAGE), -torch.rand(2, *IMAGE)
    one = analyse(model, (bright,))
    both = analyse(model, (bright,), further=[((dark,), {})])
    assert one.untouched == ("c.weight", "c.bias")
    assert both.untouched == ()
    assert slots_of(both) == {
        "a": (8, "a.bias:0 a.weight:0 b.bias:0 b.weight:0 c.bias:0 c.weight:0 c.weight:1 head.weight:1")
    }
    for x in (bright, dark):
        assert_right(model, (x,), both)
    dense = np.array([[8.0]])
    for cost in ("flops", "memory_bytes"):
        assert getattr(StructuralCosts(both), cost)(dense) == getattr(StructuralCosts(one), cost)(dense)


def test_groups_not_checked_in_time_are_frozen_and_say_so():
    model, args = settled(picks(lambda s, x: s.head(s.a(x).cumsum(1))), (IMAGE,)), draw((IMAGE,))
    structure = analyse(model, args, max_check_seconds=0)
    assert structure.groups == ()
    assert "not checked within 0 s" in reasons(structure, "a.weight")


class TestWhatIsRefused:
    def test_scripted_modules(self):
        with pytest.warns(DeprecationWarning, match="deprecated"):
            scripted = torch.jit.trace(conv(3, 4), torch.zeros(1, *IMAGE))
        with pytest.raises(UnsupportedModelError, match=r"module '1' is a ScriptModule .* pass the module that was"):
            analyse(nn.Sequential(conv(3, 3), scripted), draw((IMAGE,)))

    def test_quantised_modules(self):
        class Packed(nn.Linear):
            _packed_params = None

        with pytest.raises(UnsupportedModelError, match="must not be quantised, but module '0' is Packed; prune first"):
            analyse(nn.Sequential(Packed(4, 4)), (torch.zeros(1, 4),))

    def test_several_devices(self):
        model = nn.Sequential(conv(3, 4), conv(4, 2).to("meta"))
        with pytest.raises(UnsupportedModelError, match=r"one device, got \['cpu', 'meta'\]; call model.to\(device\)"):
            analyse(model, draw((IMAGE,)))

    def test_a_model_without_values(self):
        with pytest.raises(UnsupportedModelError, match="on the meta device; load its weights first"):
            analyse(conv(3, 4).to("meta"), draw((IMAGE,)))

    def test_uninitialised_parameters(self):
        with pytest.raises(UnsupportedModelError, match=r"uninitialised parameter '0.weight'; run it once"):
            analyse(nn.Sequential(nn.LazyLinear(3)), (torch.zeros(1, 4),))

    def test_what_python_cannot_copy(self):
        net = Net(lambda s, x: x, stream=(i for i in range(3)))
        with pytest.raises(
            UnsupportedModelError, match=r"copyable with copy.deepcopy, but Net raised .* move the attr"
        ):
            analyse(net, draw((IMAGE,)))

    def test_outputs_without_a_tensor(self):
        with pytest.raises(UnsupportedModelError, match="at least one tensor, got int; pass forward="):
            analyse(Net(lambda s, x: len(x)), draw((IMAGE,)))

    def test_weights_that_are_not_numbers(self):
        model = settled(flattened, (IMAGE,))
        model[0].weight.data[0, 0, 0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"finite outputs for the example inputs, got NaN .* pass example_inputs="):
            analyse(model, draw((IMAGE,)))

    def test_unknown_checks(self):
        with pytest.raises(ValueError, match="checks must be 'on', 'strict' or 'isolated', got 'off'"):
            analyse(flattened(), draw((IMAGE,)), checks="off")

    def test_a_failed_check_when_checks_are_strict(self):
        with pytest.raises(StructureCheckError, match=r"1 groups failed: a: the permutation check saw"):
            analyse(picks(lambda s, x: s.head(s.a(x).cumsum(1)))(), draw((IMAGE,)), checks="strict")

    def test_the_error_of_the_model_itself_is_shown(self):
        with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels, but got 2"):
            analyse(flattened(), (torch.zeros(1, 2, 8, 8),))

    def test_nothing_to_prune_says_why(self):
        structure = analyse(conv(3, 4), draw((IMAGE,)))
        with pytest.raises(
            NothingToPruneError, match=r"nothing to prune: .*returned by the model .*reads the model's in"
        ):
            require_prunable(structure)
        with pytest.raises(NothingToPruneError, match="no parameters that its forward reads"):
            require_prunable(analyse(nn.ReLU(), draw((IMAGE,))))
        require_prunable(analyse(flattened(), draw((IMAGE,))))

    @pytest.mark.parametrize(
        ("kept", "message"),
        [
            ({"stm": (0,)}, "got 'stm'; see"),
            ({"stem": ()}, "one or more units"),
            ({"stem": (0, 8)}, r"in \[0, 8\), got"),
        ],
    )
    def test_prunings_of_other_models(self, kept: dict[str, tuple[int, ...]], message: str):
        model, _, structure = known(residual)
        with pytest.raises(ValueError, match=message):
            structure.build(model, Pruning(kept))


def test_a_structure_pickles_and_holds_no_tensor():
    model, args, structure = known(branches)
    data = pickle.dumps(structure)
    assert b"torch" not in data
    restored = pickle.loads(data)
    rng = np.random.default_rng(0)
    prunings = [random_pruning(structure, rng) for _ in range(3)]
    for pruning in prunings:
        assert (
            gap(outputs_of(restored.build(model, pruning), args), outputs_of(structure.build(model, pruning), args))
            == 0
        )
    widths = widths_of(structure, prunings)
    for cost in ("flops", "params", "memory_bytes"):
        expected = getattr(StructuralCosts(structure), cost)(widths)
        np.testing.assert_array_equal(getattr(StructuralCosts(restored), cost)(widths), expected)
    assert (restored.frozen, restored.untouched, restored.device) == (structure.frozen, structure.untouched, "meta")


class Deadly(nn.Module):
    """Ends the process when it is narrower than it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.a.weight.shape[0] < 6:
            os._exit(3)
        out: Tensor = self.b(self.a(x).relu())
        return out


@pytest.mark.slow
def test_isolated_checks_find_the_same_and_survive_a_model_that_kills_its_process():
    model, args = known(grouped)[:2]
    alone = analyse(model, args, checks="isolated")
    assert [(group.name, group.size) for group in alone.groups] == [
        (group.name, group.size) for group in analyse(model, args).groups
    ]
    with pytest.raises(StructureCheckError, match="killed its process"):
        analyse(Deadly(), (torch.randn(2, 4),), checks="isolated")


def test_tracing_leaves_no_hooks_behind():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    analyse(model, (torch.randn(2, 4),))
    assert not torch.nn.modules.module._has_any_global_hook()
    assert not any(module._forward_hooks_with_kwargs for module in model.modules())
