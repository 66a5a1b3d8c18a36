"""Small models whose groups are known by hand, and what is built from them."""

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.costs import StructuralCosts
from autoprune.protocols import Pruning
from autoprune.structure import analysis
from autoprune.structure.labels import INNER, OUTER, Propagation
from autoprune.structure.propagate import propagate
from autoprune.structure.slicing.slicing import Slicer
from autoprune.structure.structure import Structure
from autoprune.structure.tracing.record import Record
from autoprune.structure.units import Units, find_units
from tests.candidates import gap, outputs_of, random_pruning, widths_of
from tests.small_networks import Net, assert_right, branches, conv, flattened, grouped, known, residual, slots_of


def indices(structure: Structure, group: str, tensor: str) -> list[list[int]]:
    (slot,) = [s for g in structure.groups if g.name == group for s in g.slots if s.tensor == tensor]
    return slot.indices.tolist()


def concatenation() -> nn.Module:
    return Net(lambda s, x: s.head(torch.cat((s.a(x), s.b(x)), 1)), a=conv(3, 4), b=conv(3, 6), head=conv(10, 2, 1))


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
    @pytest.mark.slow
    def test_concatenated_channels_lie_behind_each_other(self):
        _, _, structure = known(concatenation)
        assert indices(structure, "a", "head.weight") == [[0], [1], [2], [3]]
        assert indices(structure, "b", "head.weight") == [[4], [5], [6], [7], [8], [9]]

    @pytest.mark.slow
    def test_a_flattened_channel_is_as_many_columns_as_it_has_pixels(self):
        _, _, structure = known(flattened)
        assert indices(structure, "0", "4.weight") == [[4 * c + pixel for pixel in range(4)] for c in range(5)]

    def test_the_halves_of_a_gate_go_together(self):
        _, _, structure = known(halves)
        assert indices(structure, "a", "a.weight") == [[i, i + 8] for i in range(8)]

    @pytest.mark.slow
    def test_pixel_shuffle_takes_runs_of_four(self):
        _, _, structure = known(pixel_shuffled)
        assert indices(structure, "0", "0.weight") == [[4 * i + j for j in range(4)] for i in range(4)]
        assert indices(structure, "2", "5.weight") == [[4 * i + j for j in range(4)] for i in range(6)]

    def test_padded_channels_stay(self):
        _, _, structure = known(padded)
        assert indices(structure, "a", "head.weight") == [[i] for i in range(1, 7)]
        (frozen,) = [f for f in structure.frozen if (f.tensor, f.dim) == ("head.weight", 1)]
        assert (frozen.size, frozen.reason) == (3, "tied to a part of constant size by convolution in head")


def grouped_transposed() -> nn.Module:
    layers = (nn.ConvTranspose2d(12, 8, 2, stride=2, groups=4), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2, 1))
    return nn.Sequential(conv(3, 12), nn.ReLU(), *layers)


def group_normed() -> nn.Module:
    return nn.Sequential(conv(3, 12), nn.GroupNorm(4, 12), nn.ReLU(), conv(12, 2, 1))


def shuffled() -> nn.Module:
    return nn.Sequential(conv(3, 12), nn.ChannelShuffle(3), nn.ReLU(), conv(12, 12, groups=3), conv(12, 2, 1))


@pytest.mark.slow
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


@pytest.mark.parametrize("groups", [2, 3, 4, 6])
@pytest.mark.parametrize(
    "layer",
    [lambda groups: nn.GroupNorm(groups, 12), lambda groups: conv(12, 12, 1, groups=groups)],
    ids=["norm", "conv"],
)
def test_a_grouped_layer_has_as_many_units_as_it_can_where_no_other_choice_is_tried(
    layer: Callable[[int], nn.Module], groups: int, monkeypatch: pytest.MonkeyPatch
):
    def first(record: Record) -> tuple[Propagation, Units]:
        flow = propagate(record)
        return flow, find_units(flow)

    monkeypatch.setattr(analysis, "best_choices", first)
    _, _, structure = known(lambda: nn.Sequential(conv(3, 12), layer(groups), nn.ReLU(), conv(12, 2, 1)))
    assert structure.groups[0].size == max(groups, 12 // groups)


@pytest.mark.slow
def test_the_better_choice_for_a_grouped_layer_is_found():
    for make in (grouped, grouped_transposed, group_normed, shuffled):
        model, args, structure = known(make)
        assert structure.groups
        assert_right(model, args, structure)


@pytest.mark.slow
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


@pytest.mark.slow
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
