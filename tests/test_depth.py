"""The space of depth: branches kept or dropped, alone and with other spaces, in searches with every part."""

import itertools
import json
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.costs import Latency, make_costs
from autoprune.costs.structural import predicted_widths
from autoprune.errors import NothingToPruneError
from autoprune.evaluators import AdaptiveBN, Compensated, Evaluator, FineTune, Supernet
from autoprune.evaluators.protocol import Context
from autoprune.protocols import SearchSpace
from autoprune.search_spaces import Channels, Depth, DepthSpace, Product, space_from_json
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.testing.contexts import context_of, image_context, sequence_context
from autoprune.testing.contracts import EvaluatorContract, SpaceContract
from tests.small_transformer import TOKENS, transformer
from zoo import ZOO


@cache
def structure() -> Structure:
    torch.manual_seed(0)
    return analyse(Example(transformer("plain", 2), (torch.randn(2, *TOKENS),)))


@cache
def post_norm() -> Structure:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return analyse(Example(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), (torch.randn(2, 5, 8),)))


class TestBranches(SpaceContract):
    def make_space(self) -> DepthSpace:
        return Depth().bind(structure())

    def make_structure(self) -> Structure:
        return structure()


class TestBlocks(TestBranches):
    def make_space(self) -> DepthSpace:
        return Depth("blocks").bind(structure())


class TestBoth(TestBranches):
    def make_space(self) -> DepthSpace:
        return Depth("both").bind(structure())


class TestNormsBetween(TestBranches):
    def make_space(self) -> DepthSpace:
        return Depth("both", min_kept=2).bind(post_norm())

    def make_structure(self) -> Structure:
        return post_norm()


class TestWithChannels(SpaceContract):
    def make_space(self) -> SearchSpace:
        order = {group.name: range(group.size) for group in structure().groups}
        return Product(Depth("both"), Channels(step=0.5)).bind(structure(), order)

    def make_structure(self) -> Structure:
        return structure()


def everything(space: SearchSpace) -> Any:
    return np.array(list(itertools.product(*(range(size) for size in space.sizes))), dtype=np.int64)


class TestMeaning:
    def test_the_names_are_those_of_the_granularity(self) -> None:
        inner = ["1.attention", "1.up", "2.attention", "2.up"]
        assert [d.name for d in Depth("branches").bind(structure()).dimensions] == inner
        assert [d.name for d in Depth("blocks").bind(structure()).dimensions] == ["1", "2"]
        assert len(Depth("both").bind(structure()).dimensions) == 6

    def test_prunings_are_equal_where_canonical_candidates_are(self) -> None:
        space = Depth("both", min_kept=0).bind(structure())
        candidates = everything(space)
        named: dict[tuple[int, ...], set[tuple[str, ...]]] = {}
        for raw, canonical in zip(candidates, space.canonical(candidates), strict=True):
            named.setdefault(tuple(canonical.tolist()), set()).add(space.pruning(raw.tolist()).dropped)
        assert all(len(prunings) == 1 for prunings in named.values())
        assert len({next(iter(prunings)) for prunings in named.values()}) == len(named) == 16

    @pytest.mark.parametrize("least", [0, 1, 2, 3])
    def test_at_least_so_many_parts_stay(self, least: int) -> None:
        space = Depth("branches", min_kept=least).bind(structure())
        left = space.widths(everything(space))[:, len(structure().groups) :]
        inner = [i for i, branch in enumerate(structure().branches) if branch.parent]
        assert left[:, inner].sum(axis=1).min() == least

    def test_groups_inside_dropped_parts_are_silent(self) -> None:
        space = Depth("blocks").bind(structure())
        silent = space.silenced(np.array([[1, 0]]))[0]
        names = [group.name for group in structure().groups]
        assert {name for name, off in zip(names, silent, strict=True) if off} == {"1.attention.qkv", "1.up"}

    def test_what_is_ignored_stays_with_the_blocks_around_it(self) -> None:
        space = Depth("both", ignore=["1.attention"]).bind(structure())
        assert [d.name for d in space.dimensions] == ["1.up", "2", "2.attention", "2.up"]
        with pytest.raises(ValueError, match=r"ignore has 'layer9\*', which matches no branch"):
            Depth(ignore=["layer9*"]).bind(structure())

    def test_a_model_without_branches_is_refused(self) -> None:
        plain = analyse(Example(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.ones(2, 4),)))
        with pytest.raises(NothingToPruneError, match="nothing to drop: no branch is added to its own input"):
            Depth().bind(plain)
        with pytest.raises(NothingToPruneError, match="lower min_kept="):
            Depth(min_kept=9).bind(structure())

    @pytest.mark.parametrize("settings", [{"granularity": "layers"}, {"min_kept": 1.5}, {"min_kept": -1}])
    def test_settings_out_of_range_are_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(settings))):
            Depth(**settings)

    @pytest.mark.parametrize(
        ("where", "value"),
        [
            (("branches", 0, "parent"), "9"),
            (("branches", 0, "parent"), "1"),
            (("dimensions", 0, "options"), ["dropped"]),
        ],
    )
    def test_a_damaged_space_is_refused(self, where: tuple[Any, ...], value: Any) -> None:
        data = json.loads(json.dumps(Depth().bind(structure()).to_json()))
        inner = data
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = value
        with pytest.raises(ValueError, match=f"space.{where[0]}"):
            space_from_json(data)


def data() -> autoprune.Data:
    torch.manual_seed(0)
    x = torch.randn(24, *TOKENS)
    return autoprune.Data(calibration=[x[:8]], validation=[x[8:16]], test=[x[16:]])


def found(model: nn.Module, **settings: Any) -> autoprune.SearchResult:
    return autoprune.search(model, "params <= 80%", data(), trials=8, **settings)


class TestEvaluators(EvaluatorContract):
    """Attention and its norms are dropped, with channels of what is left; batch norm of images is re-fitted."""

    @pytest.fixture(autouse=True, params=[Compensated, AdaptiveBN, FineTune, Supernet])
    def _kind(self, request: pytest.FixtureRequest) -> None:
        self.kind = request.param

    def make_evaluator(self) -> Evaluator:
        made: Evaluator = self.kind() if self.kind in (Compensated, AdaptiveBN) else self.kind(steps=2)
        return made

    def make_context(self) -> Context:
        make = image_context if self.kind in (AdaptiveBN, Supernet) else sequence_context
        return make(Product(Depth("both", min_kept=0), Channels(step=0.5)))


@pytest.mark.parametrize("kind", [AdaptiveBN, Compensated])
def test_scores_are_the_same_to_the_last_bit_where_candidates_share_their_beginning(kind: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(24, *TOKENS)
    context = context_of(transformer("plain", 4), autoprune.Data(validation=[x[:12], x[12:]]), Depth("both"))
    candidates = context.space.canonical(np.random.default_rng(0).integers(0, 2, (12, len(context.space.sizes))))
    evaluators = [kind(share_bytes=share) for share in (0, 2**28)]
    plain, shared = evaluators
    for evaluator in evaluators:
        evaluator.prepare(context)
    for a, b in zip(plain.evaluate(candidates), shared.evaluate(candidates), strict=True):
        np.testing.assert_array_equal(a.signal, b.signal)
    cache = shared._adapted._cache
    assert cache.on
    assert cache.proven


OPTIMIZERS = ["auto", "knapsack", "nsga2", "level_switch", "bayes", "random"]


class TestSearches:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_every_optimizer_finds_networks_within_the_budget(self, optimizer: str) -> None:
        model = transformer("plain", 3)
        result = found(model, space="depth", optimizer=optimizer, evaluator="adaptive_bn")
        built = result.build("params <= 80%")
        dense = sum(p.numel() for p in model.parameters())
        assert sum(p.numel() for p in built.parameters()) <= 0.8 * dense
        assert "dropped" in result.best("params <= 80%").decoded.values()

    def test_with_channels_in_a_product_it_is_saved_and_loaded(self, tmp_path: Any) -> None:
        model = transformer("plain", 3)
        result = found(model, space=Product(Depth(), Channels(step=0.5)), optimizer="random")
        result.save(tmp_path / "result")
        loaded = autoprune.SearchResult.load(tmp_path / "result", model=model)
        x = torch.randn(2, *TOKENS)
        for a, b in zip(result.front, loaded.front, strict=True):
            assert torch.equal(result.build(a)(x), loaded.build(b)(x))

    def test_what_is_scored_is_what_is_built(self) -> None:
        result = found(transformer("plain", 3), space="depth", optimizer="random", evaluator="compensated")
        assert result.front
        for trial in result.front:
            out: Tensor = result.build(trial)(torch.randn(2, *TOKENS))
            assert out.isfinite().all()

    def test_a_convolutional_network_loses_blocks(self) -> None:
        entry = ZOO["preactivation_resnet"]
        x = torch.randn(24, *entry.inputs()[0].shape[1:])
        batches = autoprune.Data(calibration=[x[:8]], validation=[x[8:16]], test=[x[16:]])
        result = autoprune.search(entry.build(), "flops <= 75%", batches, space="depth", trials=6)
        assert result.best("flops <= 75%").costs["flops"] <= 0.75 * result.dense.costs["flops"]


class TestLatencyAndMemory:
    @pytest.mark.slow
    def test_operations_of_dropped_branches_take_no_time(self) -> None:
        torch.manual_seed(0)
        model = transformer("plain", 4)
        x = torch.randn(2, *TOKENS)
        latency = autoprune.profile(model, x, networks=6)
        found = analyse(Example(model, (x,)))
        assert latency.branches == tuple(branch.name for branch in found.branches)
        space = Depth("blocks", min_kept=0).bind(found)
        ladder = np.tril(np.ones((5, 4), dtype=np.int64), -1)
        assert make_costs(found, space, latency=latency)["latency_ms"](ladder)[0] == latency.dense_ms
        measured = dict.fromkeys(latency.correction.factors, 1.0)  # those fitted on a busy machine may be 0
        parts = replace(latency, correction=replace(latency.correction, factors=measured))
        times = parts.by_module(predicted_widths(found.presence, space, ladder))
        inside = {name: int(name[0]) - 1 for name in times if name[:1] in set("1234")}
        assert len(inside) == 4 * 8
        for name, block in inside.items():
            assert (times[name] > 0).tolist() == (ladder[:, block] == 0).tolist()
        for name in times.keys() - inside.keys():
            assert len(set(times[name])) == 1
        assert Latency.from_json(json.loads(json.dumps(latency.to_json()))).branches == latency.branches
        with pytest.raises(ValueError, match="knows those of 0"):
            replace(latency, branches=()).predict(predicted_widths(found.presence, space, ladder))

    def test_a_search_within_a_peak_of_memory_drops_blocks(self) -> None:
        settings: Any = {"space": "depth", "trials": 6, "optimizer": "random"}
        result = autoprune.search(transformer("plain", 4), "memory <= 70%", data(), **settings)
        best = result.best("memory <= 70%")
        assert best.costs["memory_bytes"] <= 0.7 * result.dense.costs["memory_bytes"]
