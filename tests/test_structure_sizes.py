"""Sizes that Python holds in any form, counts that code ties, and rounding that is no error."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.inspection import inspect
from autoprune.protocols import Pruning
from autoprune.structure.analysis import analyse
from autoprune.structure.checks.replay import require_consistent
from autoprune.structure.checks.rounding import compare, gap, wide_tolerances
from autoprune.structure.example import Example
from autoprune.structure.sizes.held import hold_size, size_held, sizes_held
from autoprune.structure.tracing.trace import trace
from tests.small_networks import IMAGE, Net, assert_right, conv
from tests.small_transformer import TOKENS, WIDTH, Attention, Sizes, transformer
from zoo import draw, settled


def found_in(model: nn.Module, *shapes: tuple[int, ...]) -> float:
    """FLOPs that can go, after what is built was compared with the masked dense model."""
    model, args = settled(lambda: model, shapes), draw(shapes)
    assert_right(model, args, analyse(Example(model, args)))
    return inspect(model, args).removable["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("held", ["plain", "tuple", "list", "dataclass", "nested"])
def test_a_number_of_heads_is_found_wherever_python_holds_it(held):
    model, args = settled(lambda: transformer(held), (TOKENS,)), draw((TOKENS,))
    structure = analyse(Example(model, args))
    assert_right(model, args, structure)
    assert sorted(group.size for group in structure.groups) == [4, 4, 32, 48, 48]


@pytest.mark.slow
def test_heads_are_tied_to_their_residual_channels_where_the_code_needs_it():
    model, args = settled(lambda: transformer("tied", blocks=2), (TOKENS,)), draw((TOKENS,))
    structure = analyse(Example(model, args), rewrite="off")
    assert_right(model, args, structure)
    assert sorted(group.size for group in structure.groups) == [4, 48, 48]


@pytest.mark.slow
def test_watching_what_is_read_leaves_no_trace_on_what_copies_share():
    class Own:
        def __deepcopy__(self, memo: dict[int, Any]) -> "Own":
            return self

    class Logging(Attention):
        def __init__(self, own: Own):
            super().__init__("plain")
            self.own, self.log = own, logging.getLogger("tests.watched")

    own, kinds = Own(), (type(logging.getLogger("tests.watched")), type(logging.getLogger()))
    analyse(Example(nn.Sequential(nn.Linear(6, WIDTH), Logging(own), nn.Linear(WIDTH, 3)), draw((TOKENS,))))
    assert type(own) is Own
    assert (type(logging.getLogger("tests.watched")), type(logging.getLogger())) == kinds


@pytest.mark.slow
def test_what_is_found_in_one_block_is_not_searched_for_in_the_next(monkeypatch: pytest.MonkeyPatch):
    from autoprune.structure.sizes import attributes

    trials = []
    reach = attributes.Search.reach
    monkeypatch.setattr(attributes.Search, "reach", lambda self, known: trials.append(1) or reach(self, known))

    def number(blocks: int) -> int:
        trials.clear()
        analyse(Example(transformer("tied", blocks), draw((TOKENS,))), rewrite="off")
        return len(trials)

    assert number(6) < 1.5 * number(3)


class Partial(nn.Module):
    """A convolution of the first quarter of the channels: two sizes that must change at once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.some, self.rest = width // 4, width - width // 4
        self.part, self.up = conv(self.some, self.some, padding=1), conv(width, 2 * width, 1)
        self.norm, self.down = nn.BatchNorm2d(2 * width), conv(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, [self.some, self.rest], dim=1)
        return x + self.down(self.norm(self.up(torch.cat([self.part(a), b], 1))).relu())


@pytest.mark.slow
def test_two_sizes_that_only_help_together_are_found():
    layers = [conv(3, 16), Partial(16), Partial(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    assert found_in(nn.Sequential(*layers), IMAGE) > 0.95


class Shared(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.inner, self.activation = Attention("plain"), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.inner(x))


@pytest.mark.slow
def test_a_module_registered_in_two_places_is_no_obstacle():
    activation = nn.Tanh()
    parts = {"activation": activation, "a": Shared(activation), "b": Shared(activation)}
    layers = {"stem": nn.Linear(6, WIDTH), **parts, "head": nn.Linear(WIDTH, 3)}
    assert found_in(Net(lambda s, x: s.head(s.b(s.a(s.stem(x)))), **layers), TOKENS) > 0.9


class Standardised(nn.Conv2d):
    """Standardises its weight over its inputs, through batch norm as NFNets do."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


@pytest.mark.slow
def test_weights_standardised_by_batch_norm_are_prunable():
    layers = [Standardised(3, 16, 3), nn.SiLU(), Standardised(16, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model, (x,) = settled(lambda: nn.Sequential(*layers), (IMAGE,)), draw((IMAGE,))
    model = nn.Sequential(*model, nn.Linear(32, 5)).eval()
    structure = analyse(Example(model, (x,)))
    assert [group.size for group in structure.groups] == [16, 32]
    first, second = list(range(3, 12)), list(range(0, 32, 2))
    by_hand = nn.Sequential(Standardised(3, 9, 3), nn.SiLU(), Standardised(9, 16, 3), *layers[3:], nn.Linear(16, 5))
    state = model.state_dict()
    by_hand[0].weight.data, by_hand[0].bias.data = state["0.weight"][first], state["0.bias"][first]
    by_hand[2].weight.data, by_hand[2].bias.data = state["2.weight"][second][:, first], state["2.bias"][second]
    by_hand[5].weight.data, by_hand[5].bias.data = state["5.weight"][:, second], state["5.bias"]
    pruning = Pruning({structure.groups[0].name: tuple(first), structure.groups[1].name: tuple(second)})
    torch.testing.assert_close(structure.build(model, pruning)(x), by_hand(x))


class Split(nn.Module):
    """Split attention: a grouped convolution makes `radix` versions of the channels, which a softmax mixes."""

    def __init__(self, width: int, radix: int = 2) -> None:
        super().__init__()
        self.radix, self.conv = radix, conv(width, width * radix, padding=1, groups=radix)
        self.down, self.up = conv(width, width // 2, 1), conv(width // 2, width * radix, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        b, channels, h, w = y.shape
        y = y.reshape(b, self.radix, channels // self.radix, h, w)
        a = self.up(self.down(y.sum(1).mean((2, 3), keepdim=True)).relu())
        a = a.view(b, 1, self.radix, -1).transpose(1, 2).softmax(1).reshape(b, -1)
        return (y * a.reshape(b, self.radix, channels // self.radix, 1, 1)).sum(1)


@pytest.mark.slow
def test_ambiguous_sites_that_only_help_together_flip_together():
    layers = [conv(3, 16), nn.ReLU(), Split(16), conv(16, 32, 1), nn.ReLU(), Split(32), nn.AdaptiveAvgPool2d(1)]
    model, args = settled(lambda: nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5)), (IMAGE,)), draw((IMAGE,))
    structure = analyse(Example(model, args))
    assert_right(model, args, structure)
    assert 2 not in [group.size for group in structure.groups], "the versions themselves stay"
    assert inspect(model, args).removable["flops"] > 0.95


def test_sizes_held_in_tuples_dicts_and_objects_are_set_in_copies():
    shared = Sizes(4, {"deep": [7, {"heads": 5}]})
    one, other = Net(lambda s, x: x, sizes=shared, shape=torch.Size([2, 9])), Net(lambda s, x: x, sizes=shared)
    held = sizes_held(one)
    assert {path: held[path] for path in held if path.startswith(("sizes", "shape"))} == {
        "sizes.heads": 4,
        "sizes.inner.deep.0": 7,
        "shape.0": 2,
        "shape.1": 9,
    }
    hold_size(one, "sizes.inner.deep.0", 3)
    hold_size(one, "shape.1", 5)
    assert size_held(one, "sizes.inner.deep.0") == 3
    assert size_held(other, "sizes.inner.deep.0") == 7
    assert one.shape == torch.Size([2, 5])


class TestRounding:
    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_a_network_that_amplifies_rounding_loses_nothing(self, dtype):
        """Large offsets that cancel leave float32 with few digits, as massive activations do."""
        layers = [nn.Linear(6, 16), *[m for _ in range(4) for m in (nn.Tanh(), nn.Linear(16, 16))], nn.Linear(16, 3)]
        model, (x,) = settled(lambda: nn.Sequential(*layers), (TOKENS,)), draw((TOKENS,))
        offset = 1e4 if dtype == torch.float32 else 8.0
        net = Net(lambda s, x: (s.layers(x) + offset) - offset, layers=model).to(dtype)
        structure = analyse(Example(net, (x.to(dtype),)))
        assert [group.size for group in structure.groups] == [16] * 5

    @pytest.mark.slow
    def test_autocast_freezes_nothing(self):
        model, args = settled(lambda: transformer("plain", 2), (TOKENS,)), draw((TOKENS,))

        def forward(model: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out: Tensor = model(x).float()
            return out

        found = analyse(Example(model, args, forward=forward))
        assert [group.size for group in found.groups] == [group.size for group in analyse(Example(model, args)).groups]

    def test_an_error_behind_a_nearly_closed_gate_is_still_seen(self):
        """A layer scale of 1e-4 hides in float32 what the branch does wrong."""

        def forward(s: Net, x: Tensor) -> Tensor:
            x = s.stem(x)
            return s.head(x + 1e-4 * s.b(torch.from_numpy(s.a(x).sort(-1).values.detach().numpy())))

        layers = {"stem": nn.Linear(6, 8), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
        model, args = settled(lambda: Net(forward, **layers), ((6,),)), draw(((6,),))
        assert "a" not in [group.name for group in analyse(Example(model, args)).groups]

    def test_the_allowance_follows_what_the_network_loses(self):
        exact = [torch.tensor([1.0, 2.0], dtype=torch.float64)]
        calm = wide_tolerances([torch.tensor([1.0, 2.0])], exact)
        wild = wide_tolerances([torch.tensor([1.0, 2.2])], exact)
        assert calm == [1e-9]
        assert wild[0] == pytest.approx(1000 * 0.1 * 2.0**-29, rel=1e-3)
        compare("replay", exact, exact, calm)
        assert gap(exact[0] + 1e-3, exact[0]) == pytest.approx(5e-4)


def test_a_fused_attention_never_sees_heads_that_do_not_fit():
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 4, 5, 8)
    net = Net(lambda s, q, k: F.scaled_dot_product_attention(q, k, k))
    record = trace(Example(net, (q, k)), values=True)
    op = next(op for op in record.ops if op.name.startswith("_scaled_dot_product"))
    query, key = op.args["query"].id, op.args["key"].id
    require_consistent(op, {query: q, key: k})
    with pytest.raises(ValueError, match="got a query of shape"):
        require_consistent(op, {query: q, key: k[:, :3]})
