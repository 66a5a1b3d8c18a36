"""Residual branches found from the record: which are offered, what is left without them, and what that costs."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.costs.structural import StructuralCosts
from autoprune.protocols import Pruning
from autoprune.result.recipe import attach
from autoprune.structure.analysis import analyse
from autoprune.structure.checks import values
from autoprune.structure.checks.values import Values
from autoprune.structure.example import Example
from autoprune.structure.slicing.dropped import Dropped
from autoprune.structure.structure import Structure
from tests.counting import counted_macs
from tests.small_transformer import TOKENS, transformer
from zoo import ZOO, Entry
from zoo.hf import HF_ZOO


def linear(inputs: int = 4, outputs: int = 4) -> nn.Linear:
    return nn.Linear(inputs, outputs)


class Net(nn.Module):
    """Runs a function on layers between a first and a last one, whose width is fixed."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.first = linear()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.last = linear()
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, self.first(x))


def halves_multiplied(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


def structure_of(model: nn.Module, *inputs: Tensor) -> Structure:
    return analyse(Example(model, inputs or (torch.randn(3, 4),)))


def names(model: nn.Module, *inputs: Tensor) -> list[str]:
    return [branch.name for branch in structure_of(model, *inputs).branches]


def mlp() -> nn.Sequential:
    return nn.Sequential(linear(4, 6), nn.ReLU(), linear(6, 4))


class TestWhatIsOffered:
    def test_blocks_of_a_transformer_with_their_attention_and_feed_forward(self) -> None:
        found = structure_of(transformer("plain"), torch.randn(2, *TOKENS)).branches
        parents = {branch.name: branch.parent for branch in found}
        assert parents == {
            "1": None, "1.attention": "1", "1.up": "1", "2": None, "2.attention": "2", "2.up": "2",
        }  # fmt: skip
        assert [branch.members for branch in found if branch.parent is None] == [
            ("1.attention", "1.up"),
            ("2.attention", "2.up"),
        ]
        by_name = {branch.name: branch for branch in found}
        assert set(by_name["1.up"].groups) == {"1.up"}
        assert "1.n1.weight" in by_name["1.attention"].parameters

    def test_a_branch_written_in_the_code_of_the_model_itself(self) -> None:
        model = Net(lambda net, x: net.last(x + net.f(x)), f=mlp())
        assert names(model) == ["f"]

    def test_a_projected_shortcut_is_no_branch(self) -> None:
        assert names(Net(lambda net, x: net.last(net.a(x) + net.b(x)), a=linear(), b=mlp())) == []

    def test_a_branch_whose_inner_values_are_read_elsewhere_stays(self) -> None:
        def run(net: nn.Module, x: Tensor) -> Tensor:
            inner = net.a(x).relu()
            return net.last(x + net.b(inner)) * inner.mean()

        assert names(Net(run, a=linear(), b=linear())) == []

    def test_a_branch_of_bare_parameters_stays_and_says_why(self) -> None:
        model = Net(lambda net, x: net.last(x + nn.functional.linear(x, net.f.weight)), f=linear())
        found = structure_of(model)
        assert not found.branches
        assert "computed outside of modules" in next(iter(found.undropped.values()))

    def test_parallel_branches_alone_and_together(self) -> None:
        class Parallel(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.a, self.b = nn.LayerNorm(4), mlp(), mlp()

            def forward(self, x: Tensor) -> Tensor:
                y = self.norm(x)
                return self.a(y) + self.b(y) + x

        model = Net(lambda net, x: net.last(net.block(x)), block=Parallel())
        found = structure_of(model)
        assert [(branch.name, branch.parent) for branch in found.branches] == [
            ("block", None), ("block.a", "block"), ("block.b", "block"),
        ]  # fmt: skip
        x = torch.randn(3, 4)
        expected = model.last(model.first(x))
        both = found.build(model, Pruning(dropped=("block.a", "block.b")))
        assert isinstance(both.block, Dropped)  # the norm goes with them
        torch.testing.assert_close(both(x), expected)

    def test_norms_after_the_additions_stay_without_the_branches_and_go_with_the_block(self) -> None:
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ).eval()
        x = torch.randn(2, 5, 8)
        found = structure_of(model, x)
        inner = [branch.name for branch in found.branches if branch.parent == "layers.0"]
        with torch.no_grad():
            alone = found.build(model, Pruning(dropped=tuple(inner)))(x)
            first: Any = model.layers[0]
            torch.testing.assert_close(alone, model.layers[1](first.norm2(first.norm1(x))))
            block = found.build(model, Pruning(dropped=("layers.0",)))(x)
            torch.testing.assert_close(block, model.layers[1](x))

    def test_an_activation_that_runs_elsewhere_too_does_not_stop_a_branch(self) -> None:
        def run(net: nn.Module, x: Tensor) -> Tensor:
            y = net.act(net.a(x))
            y = net.b(y)
            y += x
            return net.last(net.act(y))

        model = Net(run, act=nn.ReLU(inplace=True), a=linear(4, 5), b=linear(5, 4))
        found = structure_of(model)
        (branch,) = found.branches
        x = torch.randn(3, 4)
        with torch.no_grad():
            built = found.build(model, Pruning(dropped=(branch.name,)))
            torch.testing.assert_close(built(x), model.last(model.first(x).relu()))

    def test_padding_before_layers_that_go_is_made_up_for(self) -> None:
        class Causal(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv1d(4, 6, 3), nn.Conv1d(6, 4, 3)

            def forward(self, x: Tensor) -> Tensor:
                y = self.a(nn.functional.pad(x, (2, 0))).relu()
                out: Tensor = self.b(nn.functional.pad(y, (2, 0))) + x
                return out.relu()

        model = nn.Sequential(nn.Conv1d(2, 4, 1), Causal(), nn.Conv1d(4, 2, 1))
        found = structure_of(model, torch.randn(2, 2, 9))
        (branch,) = found.branches
        x = torch.randn(2, 2, 12)  # of another length
        built = found.build(model, Pruning(dropped=(branch.name,)))
        torch.testing.assert_close(built(x), model[2](model[0](x).relu()))

    @pytest.mark.parametrize("gate", [partial(nn.functional.glu, dim=1), halves_multiplied])
    @pytest.mark.parametrize("joins", [False, True])
    def test_layers_go_before_a_gate_that_halves_what_they_give(self, gate: Any, joins: bool) -> None:
        def run(net: nn.Module, x: Tensor) -> Tensor:
            y = torch.cat([x, x], 1) if joins else x
            return net.last(x + gate(net.f(y)))

        model = Net(run, f=linear(8 if joins else 4, 8))
        found = structure_of(model)
        assert [branch.name for branch in found.branches] == ["f"]
        widths = {group.name: tuple(range(3)) for group in found.groups}
        small = found.build(model, Pruning(widths, dropped=("f",)))
        x = torch.randn(3, 4)
        torch.testing.assert_close(small(x), small.last(small.first(x)))
        assert small.first.out_features == 3

    def test_layers_that_many_blocks_share_go_from_all_of_them(self) -> None:
        def run(net: nn.Module, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + net.g(x)
            return net.last(x)

        model = Net(run, g=mlp())
        found = structure_of(model)
        assert [branch.name for branch in found.branches] == ["g"]
        x = torch.randn(3, 4)
        torch.testing.assert_close(found.build(model, Pruning(dropped=("g",)))(x), model.last(model.first(x)))


NETWORKS: list[Entry] = [
    *(ZOO[name] for name in ("resnet20", "bottleneck_resnet", "preactivation_resnet", "mobilenet_v2", "convnext")),
    *(
        HF_ZOO[name]
        for name in (
            "BertForSequenceClassification",
            "GPT2LMHeadModel",
            "GPTNeoXForCausalLM",
            "BloomForCausalLM",
            "LlamaForCausalLM",
            "T5ForConditionalGeneration",
            "SwinForImageClassification",
            "MambaForCausalLM",
        )
    ),
]


def draw(structure: Structure, seed: int) -> tuple[Pruning, np.ndarray[Any, Any]]:
    """Random branches and units to drop, with their widths."""
    rng = np.random.default_rng(seed)
    widths = structure.dense.astype(np.float64)
    kept = {}
    for i, group in enumerate(structure.groups):
        units = group.multiple * int(rng.integers(1, group.size // group.multiple + 1))
        kept[group.name] = tuple(range(units))
        widths[i] = units
    dropped = rng.random(len(structure.branches)) < 0.4
    dropped[int(rng.integers(len(dropped)))] = True
    widths[len(structure.groups) :] = ~dropped
    lost = tuple(b.name for b, gone in zip(structure.branches, dropped, strict=True) if gone)
    return Pruning({name: units for name, units in kept.items() if seed % 2}, dropped=lost), widths


@pytest.mark.parametrize("entry", NETWORKS, ids=lambda entry: entry.name)
class TestNetworksOfTheZoo:
    def test_costs_are_those_counted_and_the_rest_runs_forward_and_backward(self, entry: Any) -> None:
        model = entry.build()
        inputs = entry.inputs()
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        structure = analyse(Example(model, args, kwargs))
        costs = StructuralCosts(structure)
        assert structure.branches

        def run(net: nn.Module, rows: int = 2) -> Any:
            return net(*(x[:rows] for x in args), **{name: x[:rows] for name, x in kwargs.items()})

        dense = structure.build(model, Pruning())
        with torch.no_grad():
            assert torch.equal(_first(run(dense)), _first(run(copy.deepcopy(model))))
        for seed in range(2):
            pruning, widths = draw(structure, seed)
            if not pruning.kept:
                widths[: len(structure.groups)] = structure.sizes
            built = structure.build(model, pruning)
            assert sum(p.numel() for p in built.parameters()) == costs.params(widths[None])[0]
            macs = counted_macs(built, run)
            assert macs == round(costs.flops(widths[None])[0] * structure.terms.batch)
            gone = structure.presence.outermost(pruning.dropped)
            assert not {name for branch in gone for name in (*branch.parameters, *branch.buffers)} & set(
                built.state_dict()
            )
            _first(run(built, rows=1)).square().mean().backward()


def _first(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    first = outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))
    assert isinstance(first, Tensor)
    return first


@pytest.mark.parametrize("name", ["preactivation_resnet", "LlamaForCausalLM"])
def test_costs_without_whole_blocks_are_those_of_the_model_that_is_left(name: str) -> None:
    entry: Any = {**ZOO, **HF_ZOO}[name]
    model = entry.build()
    inputs = entry.inputs()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    structure = analyse(Example(model, args, kwargs))
    blocks = [i for i, branch in enumerate(structure.branches) if branch.whole]
    widths = structure.dense.astype(np.float64)
    widths[len(structure.groups) + blocks[0]] = 0
    left = structure.build(model, Pruning(dropped=(structure.branches[blocks[0]].name,)))
    again = analyse(Example(left, args, kwargs))
    for cost in ("flops", "params", "memory_bytes"):
        expected = getattr(StructuralCosts(again), cost)(again.dense[None].astype(np.float64))
        assert getattr(StructuralCosts(structure), cost)(widths[None]) == expected, cost


def test_a_model_without_branches_computes_what_it_does_with_their_results_zeroed() -> None:
    model = HF_ZOO["LlamaForCausalLM"].build()
    inputs = HF_ZOO["LlamaForCausalLM"].inputs()
    structure = analyse(Example(model, (), inputs))
    lost = ("model.layers.0.mlp", "model.layers.1.self_attn")
    with torch.no_grad():
        found = structure.build(model, Pruning(dropped=lost))(**inputs).logits
        model.model.layers[0].mlp.register_forward_hook(lambda module, given, out: 0 * out)
        model.model.layers[1].self_attn.register_forward_hook(lambda module, given, out: (0 * out[0], None))
        torch.testing.assert_close(found, model(**inputs).logits)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_a_cache_holds_the_layers_that_are_left_and_generates_the_same_text(name: str) -> None:
    entry = HF_ZOO[name]
    model: Any = entry.build()
    inputs: Any = entry.inputs()
    structure = analyse(Example(model, (), inputs))
    attention = next(branch for branch in structure.branches if branch.parent and "attn" in branch.name)
    for dropped in (structure.branches[0].name, attention.name):
        built: Any = structure.build(model, Pruning(dropped=(dropped,)))
        settings: Any = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        ids = inputs["input_ids"]
        texts = [built.generate(ids, use_cache=use_cache, **settings) for use_cache in (True, False)]
        assert torch.equal(*texts)
        cache = built(ids, use_cache=True).past_key_values
        assert sum(layer.keys is not None for layer in cache.layers) == 1


class TestSaving:
    def test_a_model_without_branches_loads_into_the_dense_class(self, tmp_path: Any) -> None:
        model = transformer("plain", 3)
        x = torch.randn(2, *TOKENS)
        structure = structure_of(model, x)
        pruning = Pruning({"2.up": tuple(range(7))}, dropped=("1.attention", "3"))
        edit = structure.edit(pruning)
        built = attach(structure.build(model, pruning), edit, model)
        autoprune.save(built, tmp_path / "small.safetensors")
        loaded = autoprune.load(tmp_path / "small.safetensors", transformer("plain", 3))
        assert torch.equal(loaded(x), built(x))
        assert list(loaded.state_dict()) == list(built.state_dict())
        assert sum(p.numel() for p in copy.deepcopy(loaded).parameters()) == sum(p.numel() for p in built.parameters())

    def test_a_model_pruned_twice_loads_too(self, tmp_path: Any) -> None:
        model = transformer("plain", 3)
        x = torch.randn(2, *TOKENS)
        first = Pruning(dropped=("1.attention",))
        structure = structure_of(model, x)
        once = attach(structure.build(model, first), structure.edit(first), model)
        again = structure_of(once, x)
        assert "1.attention" not in {branch.name for branch in again.branches}
        second = Pruning({"2.up": tuple(range(9))}, dropped=("1", "3.up"))
        twice = attach(again.build(once, second), again.edit(second), once)
        autoprune.save(twice, tmp_path / "small.safetensors")
        loaded = autoprune.load(tmp_path / "small.safetensors", transformer("plain", 3))
        assert torch.equal(loaded(x), twice(x))


def test_of_a_large_model_branches_of_all_depths_are_left_out_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = transformer("plain", 3), torch.randn(2, *TOKENS)
    runs: list[tuple[str, ...]] = []
    without = Values.without
    monkeypatch.setattr(Values, "without", lambda self, *a: (runs.append(a[3].dropped), without(self, *a))[1])
    expected = structure_of(model, x).branches
    usual = len(runs)
    monkeypatch.setattr(values, "DEAR_WORK", 1)
    runs.clear()
    assert structure_of(model, x).branches == expected
    assert len(runs) == 3 < usual
    left_out = [name for each in runs for name in each]
    assert sorted(left_out) == sorted(branch.name for branch in expected)
    parents = {branch.name: branch.parent for branch in expected}
    assert not any(parents[name] in each for each in runs for name in each)


def test_a_width_inside_a_dropped_branch_costs_nothing_whatever_it_is() -> None:
    structure = structure_of(transformer("plain"), torch.randn(2, *TOKENS))
    costs = StructuralCosts(structure)
    widths = np.tile(structure.dense.astype(np.float64), (2, 1))
    at = [branch.name for branch in structure.branches].index("1")
    widths[:, len(structure.groups) + at] = 0
    inside = [group.name for group in structure.groups].index("1.up")
    widths[1, inside] = 3
    for cost in (costs.flops, costs.params, costs.memory_bytes):
        assert np.ptp(cost(widths)) == 0
    without = costs.params(structure.sizes[None].astype(np.float64))  # no columns of branches: all are kept
    assert without == costs.params(structure.dense[None].astype(np.float64))


def test_an_unknown_branch_is_refused_by_name() -> None:
    structure = structure_of(transformer("plain"), torch.randn(2, *TOKENS))
    with pytest.raises(ValueError, match="must name branches of the model, got 'nothing'"):
        structure.edit(Pruning(dropped=("nothing",)))


def test_the_inspection_lists_what_may_be_dropped() -> None:
    found = autoprune.inspect(transformer("plain"), torch.randn(2, *TOKENS))
    assert [branch.name for branch in found.branches][:3] == ["1", "1.attention", "1.up"]
    block, attention, feed = found.branches[:3]
    assert block.params_share == pytest.approx(attention.params_share + feed.params_share)
    assert "1.attention" in str(found)
    assert "1.attention" in found.to_html()
    assert found.to_dict()["branches"][1]["parent"] == "1"


class TestDropped:
    def test_it_keeps_plain_attributes_and_no_parameters(self) -> None:
        module = nn.MultiheadAttention(4, 2)
        stand_in = Dropped(module, {"tuple": [{"zeros": ["query", 0, []]}, {"value": None}]})
        assert stand_in.num_heads == 2
        assert not isinstance(stand_in.in_proj_weight, Tensor)
        assert stand_in.out_proj.in_features == 4
        assert not list(stand_in.parameters())
        assert not stand_in.state_dict()

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_encoder_layers_of_pytorch_do_not_fuse_what_is_left(self, padded: bool) -> None:
        torch.manual_seed(0)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
        x = torch.randn(2, 5, 8)
        mask = torch.arange(5) > torch.tensor([[2], [4]]) if padded else None
        found = analyse(Example(encoder, (x,)))
        for branch in found.branches:
            small = found.build(encoder, Pruning(dropped=(branch.name,)))
            slow = small(x, src_key_padding_mask=mask).detach()  # with gradients nothing is fused
            with torch.no_grad():
                fast = small(x, src_key_padding_mask=mask)
            real = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
            torch.testing.assert_close(fast[real], slow[real])

    def test_it_finds_arguments_by_name_and_by_position(self) -> None:
        stand_in = Dropped(linear(), {"same": ["input", 0]})
        x = torch.randn(2, 4)
        assert stand_in(x) is x
        assert stand_in(input=x) is x

    def test_zeros_may_be_longer_than_the_argument(self) -> None:
        stand_in = Dropped(linear(), {"list": [{"zeros": ["input", 0, [0, 2]]}, {"zeros": ["input", 0, [0, 0]]}]})
        assert [tuple(zeros.shape) for zeros in stand_in(torch.randn(3, 4))] == [(3, 6), (3, 4)]

    def test_zeros_may_have_a_multiple_of_a_size(self) -> None:
        stand_in = Dropped(linear(), {"zeros": ["input", 0, [0, [3, 2, 1]]]})
        assert tuple(stand_in(torch.randn(5, 4)).shape) == (5, 7)

    @pytest.mark.parametrize(
        "returns",
        [
            None,
            {"same": "x"},
            {"zeros": ["x", 0]},
            {"run": ["x", 0]},
            {"tuple": [3]},
            {"value": [1]},
            {"zeros": ["x", 0, [[1, 0, 2]]]},
        ],
    )
    def test_it_refuses_other_descriptions(self, returns: Any) -> None:
        with pytest.raises(ValueError, match="a dropped module must"):
            Dropped(linear(), returns)


class TiedWidths(nn.Module):
    """Residual branches on the model's own input, whose widths are all fixed by it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x).relu()
        return x + self.second(x).relu()


def test_branches_are_found_where_no_width_can_shrink() -> None:
    structure = analyse(Example(TiedWidths(), (torch.ones(2, 8),)))
    assert not structure.groups
    assert [branch.name for branch in structure.branches] == ["first", "second"]
