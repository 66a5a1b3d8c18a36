"""Products of depth, widths and sparsity: exact costs, and networks that run and train."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.costs import make_costs
from autoprune.errors import NothingToPruneError
from autoprune.protocols import SearchSpace
from autoprune.search_spaces import Blocks, Channels, Depth, Product, Settings, Sparsity
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.testing.contracts import SpaceContract
from tests.candidates import outputs_of, uniform_order
from tests.oracle import count_macs, count_params
from tests.small_transformer import TOKENS, transformer
from zoo import ZOO

LEVELS = Sparsity(levels=(0, 0.37, 0.8))
FAST = ("resnet20", "preactivation_resnet")


@cache
def network() -> nn.Module:
    torch.manual_seed(0)
    model = transformer("plain", 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter == 0] = 0.1  # so that zeros are those set to zero
    return model


@cache
def structure() -> Structure:
    return analyse(Example(network(), (torch.randn(2, *TOKENS),)))


def bound(*settings: Settings) -> SearchSpace:
    return Product(*settings).bind(structure(), uniform_order(structure()))


class OfTheTransformer(SpaceContract):
    def make_structure(self) -> Structure:
        return structure()


class TestDepthWidthsAndSparsity(OfTheTransformer):
    def make_space(self) -> SearchSpace:
        return bound(Depth("both", min_kept=0), Channels(step=0.5), LEVELS)


class TestDepthAfterTheOthers(OfTheTransformer):
    def make_space(self) -> SearchSpace:
        return bound(LEVELS, Channels(step=0.5), Depth())


class TestDepthWithWidthsCommonToAllBlocks(OfTheTransformer):
    def make_space(self) -> SearchSpace:
        return bound(Depth(), Blocks(Channels(step=0.5)))


def test_costs_are_those_of_what_is_built_and_dense_is_bit_identical():
    space = bound(Depth("both", min_kept=0), Channels(step=0.25), LEVELS)
    costs = make_costs(structure(), space)
    x = torch.randn(2, *TOKENS)
    for candidate in np.random.default_rng(0).integers(0, space.sizes, (12, len(space.sizes))):
        built = structure().build(network(), space.pruning(candidate.tolist()))
        nonzero = sum(int(parameter.count_nonzero()) for parameter in built.parameters())
        assert costs["flops"](candidate[None]).tolist() == [count_macs(built, (x[:1],))]
        assert costs["params"](candidate[None]).tolist() == [count_params(built)]
        assert costs["nonzero_params"](candidate[None]).tolist() == [nonzero]
    dense = structure().build(network(), space.pruning([0] * len(space.sizes)))
    assert torch.equal(outputs_of(dense, (x,))[0], outputs_of(network(), (x,))[0])


def test_in_dropped_branches_neither_widths_nor_zeros_matter():
    space = bound(Depth("blocks", min_kept=0), Channels(step=0.5), LEVELS)
    names = [dimension.name for dimension in space.dimensions]
    candidate = space.sizes[None] - 1
    candidate[0, names.index("2")] = 0
    short = dict(zip(names, space.canonical(candidate)[0].tolist(), strict=True))
    inside = [name for name in names if name.startswith("1.")]
    assert len(inside) > 4
    assert short["1"] == 1
    assert all(short[name] == 0 for name in inside)
    assert all(short[name] > 0 for name in names if name.startswith("2."))
    assert not [name for name in space.pruning(candidate[0].tolist()).zeroed if name.startswith("1.")]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in ZOO])
def test_random_candidates_of_networks_run_and_train(name):
    model, inputs = ZOO[name].build(), ZOO[name].inputs()
    found = analyse(Example(model, inputs))
    settings = [Channels(step=0.25), LEVELS]
    try:
        Depth().bind(found)
        settings.append(Depth())
    except NothingToPruneError:
        assert name not in FAST
    space = Product(*settings).bind(found, uniform_order(found))
    rng = np.random.default_rng(0)
    for candidate in space.canonical(rng.integers(0, space.sizes, (2, len(space.sizes)))):
        built = found.build(model, space.pruning(candidate.tolist())).train()
        outputs = [leaf for leaf in tree_leaves(built(*inputs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        sum(leaf.float().square().mean() for leaf in outputs).backward()
        gradients = [parameter.grad for parameter in built.parameters() if parameter.grad is not None]
        assert gradients
        assert all(gradient.isfinite().all() for gradient in gradients)
