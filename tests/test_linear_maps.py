"""Linear maps in place of dropped blocks: fitted to the dense model, and merged into the layers before."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.evaluators import Compensated
from autoprune.evaluators.refit.linear_maps import LinearMaps, fitted_map
from autoprune.importance.calibration import Calibration
from autoprune.protocols import Pruning
from autoprune.search_spaces import Depth
from autoprune.structure.analysis import analyse
from autoprune.structure.branches.handover import Run, runs_of
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.testing.contexts import context_of
from tests.small_transformer import TOKENS, transformer
from zoo.hf import HF_ZOO

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


class Zero(nn.Module):
    """Stream of zeros with a branch added to it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        stream = x * self.scale
        out: Tensor = stream + self.down(self.up(x + stream).relu())
        return out


def linear_blocks(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, WIDTH), Zero(bias), *(Block() for _ in range(3)), nn.Linear(WIDTH, 4)).eval()


def traced(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> Structure:
    return analyse(Example(model, args, kwargs))


def maps_of(model: nn.Module, structure: Structure, batches: list[Any]) -> LinearMaps:
    calibration = Calibration(model, structure, batches, lambda net, batch: net(batch))
    return LinearMaps(calibration, structure.branches)


def replace(module: nn.Module, name: str, value: Tensor) -> None:
    module.get_parameter(name).data.copy_(value)


class TestRuns:
    def test_consecutive_blocks_are_one_run_fed_by_the_layer_before(self) -> None:
        branches = traced(linear_blocks(), torch.randn(3, 5)).branches
        assert runs_of(branches, ["2", "3"]) == [Run(("2", "3"), "1.down")]
        assert runs_of(branches, ["3"]) == [Run(("3",), "2.b")]
        assert runs_of(branches, ["2", "4"]) == [Run(("2",), "1.down"), Run(("4",), "3.b")]

    def test_a_run_whose_layer_before_is_dropped_too_has_none(self) -> None:
        branches = traced(linear_blocks(), torch.randn(3, 5)).branches
        assert runs_of(branches, ["3", "2.b"]) == []

    @pytest.mark.parametrize(
        ("name", "layer"),
        [
            ("LlamaForCausalLM", "model.layers.0.mlp.down_proj"),
            ("GPT2LMHeadModel", "transformer.h.0.mlp.c_proj"),
            ("GPTNeoXForCausalLM", "gpt_neox.layers.0.mlp.dense_4h_to_h"),
            ("BertForSequenceClassification", ""),  # a norm comes after the addition
        ],
    )
    def test_the_layer_is_found_in_language_models(self, name: str, layer: str) -> None:
        entry = HF_ZOO[name]
        inputs: Any = entry.inputs()
        blocks = [branch for branch in traced(entry.build(), **inputs).branches if branch.parent is None]
        assert blocks[-1].fed_by == layer
        assert blocks[-1].follows == blocks[-2].name


class TestFit:
    def test_it_is_weighted_ridge_regression(self) -> None:
        torch.manual_seed(0)
        fed = torch.randn(400, 5, dtype=torch.float64)
        added = fed @ torch.randn(5, 5, dtype=torch.float64) + 0.1 * torch.randn(400, 5, dtype=torch.float64)
        weight = torch.rand(400, 1, dtype=torch.float64) + 0.1
        found = fitted_map(fed, added, weight, intercept=False)
        assert found is not None
        scaled = weight * fed
        gram = scaled.T @ scaled
        least = 1e-3 * gram.diagonal().mean()  # of the ridges, that for clean data
        rows = torch.cat([scaled, least.sqrt() * torch.eye(5, dtype=torch.float64)])
        expected = torch.linalg.lstsq(
            rows, torch.cat([weight * added, torch.zeros(5, 5, dtype=torch.float64)])
        ).solution
        torch.testing.assert_close(found.change.double(), expected, atol=1e-5, rtol=1e-5)

    def test_a_constant_is_found_with_an_intercept(self) -> None:
        torch.manual_seed(0)
        fed = torch.randn(400, 3)
        found = fitted_map(fed, torch.ones(400, 3) * torch.tensor([1.0, 2.0, 3.0]), torch.ones(400, 1), intercept=True)
        assert found is not None
        assert found.shift is not None
        torch.testing.assert_close(found.shift, torch.tensor([1.0, 2.0, 3.0]), atol=1e-3, rtol=1e-3)

    def test_noise_has_no_map(self) -> None:
        torch.manual_seed(0)
        assert fitted_map(torch.randn(60, 40), torch.randn(60, 40), torch.ones(60, 1), intercept=False) is None


class TestMerging:
    @pytest.mark.parametrize("bias", [True, False])
    def test_linear_blocks_are_replaced_almost_exactly_without_a_new_operation(self, bias: bool) -> None:
        model = linear_blocks(bias)
        x = torch.randn(512, 5)
        structure = traced(model, x[:3])
        pruning = Pruning(dropped=("2", "3"))
        built = structure.build(model, pruning)
        with torch.no_grad():
            names = {name: tuple(p.shape) for name, p in built.named_parameters()}
            dense, dropped = model(x), built(x)
            maps_of(model, structure, [x[:256], x[256:]]).apply(built, structure.edit(pruning), replace)
            error = (built(x) - dense).norm() / (dropped - dense).norm()
        assert error < (0.02 if bias else 0.3)  # without a bias, the constants of the blocks are lost
        assert {name: tuple(p.shape) for name, p in built.named_parameters()} == names

    def test_channels_of_the_stream_that_are_removed_take_no_part(self) -> None:
        model = linear_blocks()
        x = torch.randn(512, 5)
        structure = traced(model, x[:3])
        (stream,) = (group for group in structure.groups if group.size == WIDTH)
        pruning = Pruning({stream.name: (0, 2, 3, 5, 6)}, dropped=("3",))
        built = structure.build(model, pruning)
        maps_of(model, structure, [x]).apply(built, structure.edit(pruning), replace)
        assert built[2].b.weight.shape == (5, 5)
        assert built(x).isfinite().all()

    def test_the_transposed_layers_of_gpt_2_too(self) -> None:
        entry = HF_ZOO["GPT2LMHeadModel"]
        model = entry.build()
        batches: list[Any] = [entry.inputs(batch=8, seed=seed) for seed in range(8)]
        structure = traced(model, **batches[0])
        pruning = Pruning(dropped=("transformer.h.1",))
        built = structure.build(model, pruning)
        calibration = Calibration(model, structure, batches, lambda net, batch: net(**batch).logits)
        maps = LinearMaps(calibration, structure.branches)
        with torch.no_grad():
            dense, before = (torch.cat([net(**b).logits for b in batches]) for net in (model, built))
            maps.apply(built, structure.edit(pruning), replace)
            after = torch.cat([built(**b).logits for b in batches])
        assert (after - dense).norm() < 0.9 * (before - dense).norm()

    def test_a_search_scores_and_builds_what_is_merged(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(96, *TOKENS)
        model = transformer("plain", 4)
        context = context_of(model, autoprune.Data(calibration=x[:64], validation=x[64:]), Depth("blocks", min_kept=0))
        candidate = np.array([0, 1, 1, 0], dtype=np.int64)
        errors = []
        for least_squares in (False, True):
            evaluator = Compensated(least_squares=least_squares)
            evaluator.prepare(context)
            built = evaluator.build(candidate)
            with torch.no_grad():
                errors.append(float((built(x[64:]) - model(x[64:])).square().mean()))
        assert errors[1] < 0.9 * errors[0]
