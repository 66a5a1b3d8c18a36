"""The sparsity space: which weights it offers, exact numbers of zeros, and what is built from them."""

import copy
import json
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.costs import make_costs
from autoprune.errors import NothingToPruneError
from autoprune.protocols import OK, RACED, Pruning, SearchSpace
from autoprune.result.recipe import attach
from autoprune.search_spaces.sparsity import Sparsity, SparsitySpace
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import Edit, Slicer
from autoprune.structure.structure import Structure
from autoprune.testing.contracts import SpaceContract
from tests.candidates import outputs_of, random_pruning, state_of, storages
from zoo import ZOO

WORDS = 30


class TiedTransformer(nn.Module):
    """Its linear head owns the weight of its embedding."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.positions = nn.Parameter(torch.randn(1, 6, width))
        layer = nn.TransformerEncoderLayer(width, 2, 24, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, WORDS)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens) + self.positions))


def make_transformer() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TiedTransformer().eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "shared": (ZOO["shared"].build, ZOO["shared"].inputs),
    "mlp": (ZOO["mlp"].build, ZOO["mlp"].inputs),
    "transformer": (make_transformer, lambda: (torch.arange(12).reshape(2, 6),)),
}


@cache
def known(name: str) -> tuple[nn.Module, Structure]:
    """A network without any element that is zero, so that zeros in what is built are those set to zero."""
    make, inputs = NETWORKS[name]
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter == 0] = 0.1
    return model, analyse(Example(model, inputs()))


def space_of(name: str, **settings: Any) -> SparsitySpace:
    return Sparsity(**settings).bind(known(name)[1])


def draw(space: SearchSpace, count: int = 20) -> np.ndarray:
    return np.random.default_rng(1).integers(0, space.sizes, (count, len(space.sizes)))


def masked_copy(model: nn.Module, zeroed: dict[str, int]) -> nn.Module:
    """The dense model with the smallest elements of each weight set to zero, found by sorting in NumPy."""
    copied = copy.deepcopy(model)
    parameters = dict(copied.named_parameters())
    for name, count in zeroed.items():
        flat = parameters[name].detach().reshape(-1)  # shares the parameter's memory
        order = sorted(range(flat.numel()), key=lambda i: abs(flat[i].item()))
        flat[order[:count]] = 0
    return copied


@pytest.mark.parametrize("name", NETWORKS, scope="class")
class TestSparsitySpace(SpaceContract):
    @pytest.fixture(autouse=True)
    def _network(self, name: str):
        self.name = name

    def make_space(self) -> SearchSpace:
        return space_of(self.name, ignore=["*0.weight"] if self.name == "mlp" else [])

    def make_structure(self) -> Structure:
        return known(self.name)[1]


class Wiring(nn.Module):
    """Weights read as they are, through copies, and through weight norm; a table, a scale and learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.scale = nn.Parameter(torch.rand(3, 1))
        self.pairs = nn.Bilinear(8, 8, 4)
        self.unread = nn.Linear(8, 8)
        self.norm = nn.LayerNorm((3, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.recurrent(self.table(tokens))
        hidden, _ = self.attention(self.queries.expand(len(tokens), -1, -1), hidden, hidden, need_weights=False)
        hidden = torch.einsum("bqd,qde->bqe", self.normed(hidden), self.experts) * self.scale
        return self.norm(self.pairs(hidden, hidden))


class TestDimensions:
    def test_they_are_what_is_multiplied_shared_ones_once(self):
        model, structure = known("transformer")
        body = "body.layers.0."
        weights = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
        assert list(structure.weights) == [*(body + weight for weight in weights), "embed.weight"]
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert all(shapes[name] == shape for name, shape in structure.weights.items())

    @pytest.mark.slow
    def test_neither_tables_nor_scales_nor_norms_nor_what_is_not_read(self):
        structure = analyse(Example(Wiring().eval(), (torch.arange(10).reshape(2, 5),)))
        assert set(structure.weights) == {
            "recurrent.weight_ih_l0",
            "recurrent.weight_hh_l0",
            "attention.in_proj_weight",
            "attention.out_proj.weight",
            "normed.parametrizations.weight.original1",
            "experts",
            "pairs.weight",
        }

    @pytest.mark.parametrize(
        "pattern", ["body.layers.0.linear1.weight", "body.layers.0.linear1", "body.*.linear1*", "*linear1"]
    )
    def test_ignored_weights_are_left_out(self, pattern: str):
        names = {dimension.name for dimension in space_of("transformer", ignore=[pattern]).dimensions}
        assert names == known("transformer")[1].weights.keys() - {"body.layers.0.linear1.weight"}

    def test_levels_that_zero_equally_many_elements_of_a_small_weight_are_one_option(self):
        structure = analyse(
            Example(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 40)), (torch.ones(2, 3),))
        )
        options = [d.options for d in Sparsity(levels=(0, 0.1, 0.5, 0.6, 0.9)).bind(structure).dimensions]
        assert options == [(0, 0.5, 0.9), (0, 0.5, 0.9), (0, 0.1, 0.5, 0.6, 0.9)]

    def test_a_level_means_the_decimal_fraction_that_it_reads(self):
        structure = analyse(Example(nn.Linear(10, 10), (torch.ones(2, 10),)))
        space = Sparsity(levels=(0, 0.07, 0.29, 0.57, 0.58)).bind(structure)  # 100 * 0.29 is 28.999999999999996
        assert space.zeroed(np.arange(5)[:, None]).tolist() == [0, 7, 29, 57, 58]


class TestZeros:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", NETWORKS)
    def test_their_number_is_exact_for_each_weight_and_level(self, name: str):
        model, structure = known(name)
        space = space_of(name)
        for level in range(int(space.sizes.max())):
            candidate = np.minimum(level, space.sizes - 1).tolist()
            built = dict(structure.build(model, space.pruning(candidate)).named_parameters())
            for weight, fraction in space.decode(candidate).items():
                expected = math.floor(Fraction(str(fraction)) * built[weight].numel())
                assert (built[weight] == 0).sum().item() == expected, (weight, fraction)

    @pytest.mark.parametrize("name", NETWORKS)
    def test_the_cost_counts_the_nonzero_parameters_of_what_is_built(self, name: str):
        model, structure = known(name)
        space = space_of(name)
        costs = make_costs(structure, space)
        for candidate in draw(space):
            built = structure.build(model, space.pruning(candidate.tolist()))
            nonzero = sum(parameter.count_nonzero().item() for parameter in built.parameters())
            assert costs["nonzero_params"](candidate[None]).tolist() == [nonzero]
            assert costs["params"](candidate[None]).tolist() == [sum(p.numel() for p in built.parameters())]

    @pytest.mark.parametrize("name", NETWORKS)
    def test_outputs_are_those_of_a_masked_copy(self, name: str):
        model, structure = known(name)
        space, inputs = space_of(name), NETWORKS[name][1]()
        slicer = Slicer(model)
        before = state_of(model)
        for candidate in draw(space, 4):
            pruning = space.pruning(candidate.tolist())
            (expected,) = outputs_of(masked_copy(model, dict(pruning.zeroed)), inputs)
            built = structure.build(model, pruning)
            assert torch.equal(outputs_of(built, inputs)[0], expected)
            assert torch.equal(outputs_of(slicer.cut(structure.edit(pruning)), inputs)[0], expected)
            assert not storages(built) & storages(model)
        (dense,) = outputs_of(slicer.cut(structure.edit(Pruning())), inputs)
        assert torch.equal(dense, outputs_of(model, inputs)[0])
        assert state_of(model) == before

    def test_ties_go_in_the_order_of_memory_and_untouched_weights_are_shared(self):
        model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, -1.0, 1.0], [-0.5, 1.0, 2.0]]))
        cut = Slicer(model).cut(Edit({}, {}, {"0.weight": 3}))
        assert cut[0].weight.tolist() == [[0, 0, 1], [0, 1, 2]]
        assert cut[1].weight is model[1].weight

    @pytest.mark.slow
    def test_recurrent_layers_compute_with_the_zeros(self):
        model, inputs = Wiring().eval(), (torch.arange(10).reshape(2, 5),)
        structure = analyse(Example(model, inputs))
        slicer = Slicer(model)
        for count in (40, 0, 90):  # the flat list of weights that a GRU keeps must follow every time
            pruning = Pruning(zeroed={"recurrent.weight_ih_l0": count})
            (expected,) = outputs_of(masked_copy(model, dict(pruning.zeroed)), inputs)
            assert torch.equal(outputs_of(slicer.cut(structure.edit(pruning)), inputs)[0], expected)

    def test_where_units_go_too_elements_are_ranked_among_those_that_stay(self):
        model, structure = known("shared")
        units = random_pruning(structure, np.random.default_rng(0))
        small = structure.build(model, units)
        left = {name: small.get_parameter(name).numel() // 2 for name in structure.weights}
        both = structure.build(model, Pruning(units.kept, left))
        expected = masked_copy(small, left).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in both.state_dict().items())

    def test_a_built_network_is_saved_and_loaded_into_a_fresh_one(self, tmp_path):
        model, structure = known("shared")
        pruning = space_of("shared").pruning([5] * len(structure.weights))
        built = attach(structure.build(model, pruning), structure.edit(pruning), model)
        fresh = ZOO["shared"].build()
        with torch.no_grad():
            for tensor in fresh.parameters():
                tensor.uniform_(0.5, 2.0)
        autoprune.save(built, tmp_path / "sparse.safetensors")
        loaded = autoprune.load(tmp_path / "sparse.safetensors", fresh)
        plain = ZOO["shared"].build()
        plain.load_state_dict(built.state_dict())
        inputs = ZOO["shared"].inputs()
        for other in (loaded, plain, pickle.loads(pickle.dumps(built))):
            assert torch.equal(outputs_of(other, inputs)[0], outputs_of(built, inputs)[0])


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"levels": ()}, r"levels must be fractions rising from 0 to below 1, got \(\)"),
            ({"levels": (0.5, 0.9)}, r"rising from 0"),
            ({"levels": (0, 0.9, 0.5)}, r"rising from 0"),
            ({"levels": (0, 0.5, 0.5)}, r"rising from 0"),
            ({"levels": (0, 0.5, 1.0)}, r"below 1"),
            ({"ignore": (name for name in ["head"])}, "ignore must be a list of names or globs, got <generator"),
            ({"levels": (x for x in (0, 0.5))}, "rising from 0 to below 1, got <generator"),
            ({"ignore": "head"}, "ignore must be a list of names or globs, got the string 'head'"),
        ],
    )
    def test_settings_out_of_range(self, settings: dict[str, Any], message: str):
        with pytest.raises(ValueError, match=message):
            Sparsity(**settings)

    def test_a_pattern_that_matches_nothing(self):
        with pytest.raises(ValueError, match=r"ignore has 'haed\*', which matches no weight; there are 0.weight"):
            space_of("mlp", ignore=["haed*"])

    @pytest.mark.parametrize("settings", [{"ignore": ["*"]}, {"levels": (0,)}])
    def test_nothing_left_to_search(self, settings: dict[str, Any]):
        with pytest.raises(NothingToPruneError, match=r"none of 4 weights has a second option .* loosen ignore="):
            space_of("mlp", **settings)

    @pytest.mark.parametrize(
        ("zeroed", "message"),
        [
            ({"0.wieght": 1}, r"must name weights of the model, got '0.wieght'; see structure.weights"),
            ({"0.bias": 1}, r"must name weights of the model, got '0.bias'"),
            ({"0.weight": 48 * 64 + 1}, r"pruning.zeroed\['0.weight'\] must be .* 0 to 3072, got 3073"),
            ({"0.weight": -1}, "0 to 3072, got -1"),
        ],
    )
    def test_prunings_that_the_model_does_not_have(self, zeroed: dict[str, int], message: str):
        with pytest.raises(ValueError, match=message):
            known("mlp")[1].edit(Pruning(zeroed=zeroed))


@pytest.fixture(scope="module")
def found(digits, digits_model):
    data = autoprune.Data(calibration=digits.train, validation=digits.validation, test=digits.test)
    budget = "nonzero_params <= 20%"
    return autoprune.search(digits_model, budget, data, space="sparsity", optimizer="random", trials=24, seed=0)


@pytest.mark.slow
class TestSearch:
    def test_every_trial_is_within_the_budget(self, found):
        assert len(found.trials) == 24
        for trial in found.trials:
            assert trial.status in (OK, RACED)
            assert trial.costs["nonzero_params"] <= found.limits["nonzero_params"]
            assert trial.costs["params"] == found.dense.costs["params"]
            assert trial.costs["flops"] == found.dense.costs["flops"]

    def test_what_is_built_scores_what_the_trial_scored(self, found, digits, digits_model):
        built = found.build()
        best = found.best()
        images, labels = digits.validation
        with torch.no_grad():
            assert (built(images).argmax(1) == labels).double().mean().item() == pytest.approx(best.score)
        for name, level in best.decoded.items():
            weight = built.get_parameter(name)
            assert (weight == 0).sum() >= math.floor(level * weight.numel()), name
        assert not torch.equal(built.stem[1].running_mean, digits_model.stem[1].running_mean)

    def test_the_result_comes_back_from_disk(self, found, digits, digits_model, tmp_path):
        found.save(tmp_path / "result", weights="best")
        loaded = autoprune.SearchResult.load(tmp_path / "result", model=copy.deepcopy(digits_model))
        assert loaded.space == found.space
        assert pickle.loads(pickle.dumps(found.space)) == found.space
        json.dumps(found.to_json())
        images = digits.test[0]
        assert torch.equal(loaded.build()(images), found.build()(images))

    def test_a_model_without_units_to_remove_can_still_be_sparse(self):
        model = nn.Linear(8, 4)
        data = torch.randn(40, 8), torch.randint(0, 4, (40,))
        with pytest.raises(NothingToPruneError, match="nothing to prune"):
            autoprune.search(model, "params <= 50%", data)
        result = autoprune.search(model, "nonzero_params <= 50%", data, space=autoprune.Sparsity(levels=(0, 0.6)))
        assert [trial.decoded for trial in result.trials] == [{"weight": 0.6}]
        assert (result.build().weight == 0).sum() == 19
