"""Products of spaces: costs of what is built, one canonical candidate of each pruning, and clear refusals."""

import itertools
import json
import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune import Data
from autoprune.costs import make_costs
from autoprune.evaluators import Compensated
from autoprune.protocols import SearchSpace
from autoprune.search_spaces import Channels, Choice, Choices, Product, ProductSpace, Sparsity, space_from_json
from autoprune.search_spaces.sparsity import SparsitySpace
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.testing.contexts import context_of
from autoprune.testing.contracts import SpaceContract
from tests import own_space
from tests.candidates import outputs_of, uniform_order
from tests.oracle import count_macs, count_params
from tests.searching import quick
from tests.silencing import Gates
from zoo import ZOO

INPUT = (torch.ones(2, 4),)


@cache
def network() -> nn.Module:
    """Groups 0 (6 units), 2 (5) and 4 (4)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
        return nn.Sequential(*layers).eval()


@cache
def structure() -> Structure:
    return analyse(Example(network(), INPUT))


ORDER = {"0": (5, 1, 0, 2, 4, 3), "2": (1, 0, 2, 4, 3), "4": (3, 1, 0, 2)}
COARSE = Sparsity(levels=(0.0, 0.3, 0.5, 0.9))


def joined(*members: SearchSpace) -> ProductSpace:
    return ProductSpace(tuple(members), tuple((group.name, group.size) for group in structure().groups))


def overlapping() -> ProductSpace:
    """Both members decide on group 0, and the second on group 2 with it."""
    both = Choices(ORDER, {"both": Choice([{"0": 6, "2": 5}, {"0": 4, "2": 3}, {"0": 2, "2": 3}, {"0": 2, "2": 1}])})
    return joined(Channels(step=2, ignore=["4"]).bind(structure(), ORDER), both)


def gated() -> ProductSpace:
    """Gates silence groups 0 and 2, or 4, whose widths and weights other members decide on."""
    gates = Gates.of(ORDER, {"front": ("0", "2"), "back": ("4",)})
    return joined(Channels(step=2).bind(structure(), ORDER), gates, COARSE.bind(structure()))


def everything(space: SearchSpace) -> np.ndarray:
    return np.array(list(itertools.product(*map(range, space.sizes.tolist()))), dtype=np.int64)


class OfTheNetwork(SpaceContract):
    def make_structure(self) -> Structure:
        return structure()


class TestChannelsAndSparsity(OfTheNetwork):
    def make_space(self) -> SearchSpace:
        return Product(Channels(step=2), COARSE).bind(structure(), ORDER)


class TestTwoThatDecideOnOneGroup(OfTheNetwork):
    def make_space(self) -> SearchSpace:
        return overlapping()


class TestGates(OfTheNetwork):
    def make_space(self) -> SearchSpace:
        return gated()


class TestASpaceOfAThirdParty(OfTheNetwork):
    def make_space(self) -> SearchSpace:
        own_space.register()
        return Product(own_space.OwnUniform((1.0, 0.5)), COARSE).bind(structure(), ORDER)


class TestAResNet(SpaceContract):
    def make_space(self) -> SearchSpace:
        found = self.make_structure()
        return Product(Channels(step=0.5), Sparsity(levels=(0, 0.37, 0.8))).bind(found, uniform_order(found))

    @staticmethod
    @cache
    def make_structure() -> Structure:
        return analyse(Example(ZOO["resnet20"].build(), ZOO["resnet20"].inputs()))


class TestCosts:
    @pytest.mark.parametrize(
        "name",
        [
            "shared",
            "two_inputs",
            "resnet20",
            *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet_v2", "densenet", "resnext")),
        ],
    )
    def test_flops_and_nonzero_parameters_are_those_of_what_is_built(self, name):
        model, inputs = ZOO[name].build(), ZOO[name].inputs()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[parameter == 0] = 0.1  # so that zeros are those set to zero
        found = analyse(Example(model, inputs))
        space = Product(Channels(), Sparsity(levels=(0, 0.37, 0.8))).bind(found, uniform_order(found))
        costs = make_costs(found, space)
        for candidate in np.random.default_rng(0).integers(0, space.sizes, (2, len(space.sizes))):
            built = found.build(model, space.pruning(candidate.tolist()))
            nonzero = sum(parameter.count_nonzero().item() for parameter in built.parameters())
            assert costs["flops"](candidate[None]).tolist() == [count_macs(built, tuple(x[:1] for x in inputs))]
            assert costs["params"](candidate[None]).tolist() == [count_params(built)]
            assert costs["nonzero_params"](candidate[None]).tolist() == [nonzero]

    def test_levels_are_shares_of_what_other_spaces_leave(self):
        space = Product(Channels(step=1), COARSE).bind(structure(), ORDER)
        candidate = space.sizes - 1
        candidate[:3] = (3, 2, 1)  # widths 3, 3 and 3
        zeroed = space.pruning(candidate.tolist()).zeroed
        shapes = {"0.weight": (3, 4), "2.weight": (3, 3), "4.weight": (3, 3), "6.weight": (3, 3)}
        assert zeroed == {name: math.floor(Fraction(9, 10) * math.prod(shape)) for name, shape in shapes.items()}

    def test_the_dense_candidate_is_the_model_bit_for_bit(self):
        space = gated()
        built = structure().build(network(), space.pruning([0] * len(space.sizes)))
        assert torch.equal(outputs_of(built, INPUT)[0], outputs_of(network(), INPUT)[0])


def two_widths() -> ProductSpace:
    """Both members decide on group 0 alone; the second on others, too."""
    half = {"half": Choice([{"0": 6}, {"0": 4}, {"0": 2}]), "rest": Choice([{"2": 5, "4": 4}, {"2": 3, "4": 3}])}
    return joined(Channels(step=1, ignore=["4"]).bind(structure(), ORDER), Choices(ORDER, half))


def meaning_of(space: ProductSpace, candidate: list[int]) -> str:
    return repr((sorted(space.pruning(candidate).kept.items()), space.silenced(np.array([candidate])).tolist()))


@pytest.mark.parametrize("make", [two_widths, lambda: joined(*gated().members[:2])], ids=["overlapping", "gated"])
def test_equal_prunings_have_one_canonical_candidate(make):
    space = make()
    candidates = everything(space)
    canonical = space.canonical(candidates)
    found: dict[str, set[tuple[int, ...]]] = {}
    for given, short in zip(candidates.tolist(), canonical.tolist(), strict=True):
        meaning = meaning_of(space, given)
        assert meaning == meaning_of(space, short)
        found.setdefault(meaning, set()).add(tuple(short))
    assert {len(names) for names in found.values()} == {1}


def test_levels_that_set_as_many_elements_to_zero_are_one():
    space = Product(Channels(options=(1.0, 0.25)), Sparsity(levels=(0.0, 0.3, 0.4))).bind(structure(), ORDER)
    candidate = np.zeros((1, len(space.sizes)), dtype=np.int64)
    candidate[0, :3] = 1
    names = [dimension.name for dimension in space.dimensions]
    for weight in ("2.weight", "4.weight"):  # (1, 2) and (1, 1) elements are left: no level sets one to zero
        candidate[0, names.index(weight)] = 2
    canonical = space.canonical(candidate)[0]
    assert canonical.tolist() == [1, 1, 1, *[0] * (len(names) - 3)]


def test_silenced_dimensions_are_dense_and_their_groups_follow_the_gate():
    space = gated()
    candidate = np.ones((1, len(space.sizes)), dtype=np.int64)
    names = [dimension.name for dimension in space.dimensions]
    canonical = dict(zip(names, space.canonical(candidate)[0].tolist(), strict=True))
    assert canonical["front"] == canonical["back"] == 1
    assert canonical["0"] == canonical["2"] == canonical["4"] == 0
    assert space.widths(candidate).tolist() == [[1, 1, 1]]
    assert space.silenced(candidate).tolist() == [[True, True, True]]


class TestNames:
    def test_they_are_those_of_the_members_where_no_two_agree(self):
        space = Product(Channels(), COARSE).bind(structure(), ORDER)
        assert [d.name for d in space.dimensions] == ["0", "2", "4", "0.weight", "2.weight", "4.weight", "6.weight"]

    def test_where_two_agree_both_get_the_type_as_prefix(self):
        first = Choices(ORDER, {"a": Choice([{"0": 6}, {"0": 3}]), "b": Choice([{"2": 5}, {"2": 1}])})
        space = joined(first, Choices(ORDER, {"a": Choice([{"4": 4}, {"4": 2}])}))
        assert [dimension.name for dimension in space.dimensions] == ["choices 1: a", "b", "choices 2: a"]
        assert list(space.decode([1, 0, 1])) == ["choices 1: a", "b", "choices 2: a"]


class TestSettings:
    def test_products_are_unfolded_and_names_are_taken(self):
        made = Product(Product("channels", Sparsity()), "sparsity")
        assert [type(each) for each in made.settings] == [Channels, Sparsity, Sparsity]

    @pytest.mark.parametrize(
        ("criteria", "expected"), [(("auto", "l2"), "l2"), (("taylor", "taylor"), "taylor"), (("auto", "auto"), "auto")]
    )
    def test_the_criterion_is_the_one_that_is_named(self, criteria, expected):
        made = Product(Sparsity(), *(Channels(criterion=criterion) for criterion in criteria))
        assert made.criterion == expected

    def test_none_where_none_removes_units(self):
        assert Product(Sparsity()).criterion is None

    def test_criteria_that_differ_are_refused(self):
        with pytest.raises(ValueError, match="criterion must be the same in every space of a product, got 'l1' and"):
            Product(Channels(criterion="l1"), Channels(criterion="l2"))

    def test_an_empty_product_is_refused(self):
        with pytest.raises(ValueError, match="settings must hold at least one space"):
            Product()

    def test_what_stops_names_every_member(self):
        said = Product(Channels(min_width=3), Channels(round_to=8)).why_no_less()
        assert "min_width=3" in said
        assert "round_to=8" in said


class TestRefusals:
    def test_one_weight_set_to_zero_twice(self):
        with pytest.raises(ValueError, match=r"members 0 and 1 both do in '0\.weight'"):
            Product(Sparsity(), Sparsity()).bind(structure(), ORDER)

    def test_units_kept_by_other_orders(self):
        other = {name: units[::-1] for name, units in ORDER.items()}
        half = Choices(other, {"x": Choice([{"0": 6}, {"0": 3}])})
        with pytest.raises(ValueError, match="must keep its units by the same order, but two keep other units of '0'"):
            joined(Channels(step=2).bind(structure(), ORDER), half)

    def test_zeros_that_do_not_follow_widths(self):
        class Fixed:
            """The sparsity space without what lets it follow others."""

            def __init__(self, inner: SparsitySpace) -> None:
                self.sizes, self.dimensions, self.pruning = inner.sizes, inner.dimensions, inner.pruning
                self.widths, self.zeroed, self.canonical = inner.widths, inner.zeroed, inner.canonical
                self.decode, self.to_json, self.describe = inner.decode, inner.to_json, inner.describe

        fixed = Fixed(COARSE.bind(structure()))
        with pytest.raises(ValueError, match="Fixed has no zeroed_weights and zeros_among"):
            joined(Channels().bind(structure(), ORDER), fixed)
        assert joined(fixed).zeroed(fixed.sizes[None] - 1) == fixed.zeroed(fixed.sizes[None] - 1)

    def test_a_member_of_a_file_that_is_damaged(self):
        data = json.loads(json.dumps(gated().to_json()))
        data["members"][2]["dimensions"][0]["extents"][0]["fixed"] = 3
        with pytest.raises(ValueError, match=r"'0\.weight'\] must have extents that multiply to its elements"):
            space_from_json(data)


def test_sparsity_of_an_older_file_takes_sizes_as_constant():
    data = COARSE.bind(structure()).to_json()
    for dimension in data["dimensions"]:
        del dimension["extents"]
    space = space_from_json(json.loads(json.dumps(data)))
    assert isinstance(space, SparsitySpace)
    assert space.to_json() == data
    last = space.sizes[None] - 1
    assert space.zeros_among(last, space.widths(last)).sum() == space.zeroed(last)


@pytest.mark.parametrize("optimizer", ["auto", "knapsack", "milp", "level_switch", "nsga2", "bayes", "random"])
def test_every_optimizer_searches_a_product_within_both_limits(optimizer):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    data = (x, (x.sum(1) > 0).long())
    budget = ["flops <= 70%", "nonzero_params <= 40%"]
    result = quick(network(), budget, data, space=Product(Channels(), COARSE), optimizer=optimizer, trials=8)
    assert result.front
    for trial in result.front:
        built = result.build(trial).eval()
        nonzero = sum(parameter.count_nonzero().item() for parameter in built.parameters())
        assert trial.costs["flops"] == count_macs(built, (x[:1],))
        # Elements of the dense model that are zero count, too, but this one has none.
        assert trial.costs["nonzero_params"] == nonzero
        assert trial.costs["flops"] <= result.limits["flops"]
        assert trial.costs["nonzero_params"] <= result.limits["nonzero_params"]


def test_where_units_and_elements_go_biases_keep_the_mean_output_of_a_layer():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    context = context_of(network(), Data(calibration=x, validation=x), Product(Channels(step=2), COARSE))
    evaluator = Compensated(least_squares=False)
    evaluator.prepare(context)
    candidate = np.minimum(1, context.space.sizes - 1)
    pruning = context.space.pruning(candidate.tolist())
    kept = list(pruning.kept["0"])
    dense, built = context.model, evaluator.build(candidate)
    inputs = dense[1](dense[0](torch.cat(context.subsets.calibration)))
    assert (built[2].weight == 0).sum() == pruning.zeroed["2.weight"] > 0
    expected = dense[2](inputs).mean(0)[list(pruning.kept["2"])]
    torch.testing.assert_close(built[2](inputs[:, kept]).mean(0), expected, rtol=1e-4, atol=1e-5)


def test_a_result_of_a_product_is_saved_and_loaded(tmp_path):
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    result = quick(network(), "nonzero_params <= 50%", (x, (x.sum(1) > 0).long()), space=Product(Channels(), COARSE))
    result.save(tmp_path / "result")
    loaded = autoprune.SearchResult.load(tmp_path / "result", network())
    assert [trial.decoded for trial in loaded.front] == [trial.decoded for trial in result.front]
