"""The files of docs/extending.md: each passes the contract of its kind and works in a search."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune.costs import GivenCost, make_costs
from autoprune.errors import FileFormatError
from autoprune.evaluators import Context, Evaluator
from autoprune.optimizers import Problem
from autoprune.protocols import Optimizer, SearchSpace
from autoprune.search_spaces import SPACES, Channels
from autoprune.search_spaces.channels import ChannelSpace
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.rules import OPERATIONS
from autoprune.structure.structure import Structure
from autoprune.testing.contexts import context_of, sequence_context
from autoprune.testing.contracts import (
    CostContract,
    EvaluatorContract,
    MetricContract,
    OptimizerContract,
    RuleContract,
    SpaceContract,
)
from tests import own_space
from tests.candidates import uniform_order

DOCUMENT = Path(__file__).parent.parent / "docs" / "extending.md"
FILES = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with every file of the document, from which they are imported."""
    folder = tmp_path_factory.mktemp("extending")
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    spaces, operations = dict(SPACES), dict(OPERATIONS)
    sys.path.insert(0, str(folder))
    own_space.register()
    yield folder
    sys.path.remove(str(folder))
    SPACES.clear()
    SPACES.update(spaces)
    OPERATIONS.clear()
    OPERATIONS.update(operations)
    for name in FILES:
        sys.modules.pop(name, None)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@cache
def structure() -> Structure:
    return analyse(Example(model(), (torch.zeros(2, 6),)))


class TestHillClimber(OptimizerContract):
    def make(self, problem: Problem, seed: int) -> Optimizer:
        optimizer: Optimizer = module("hill_climber").HillClimber(problem, seed)
        return optimizer


class TestAsCut(EvaluatorContract):
    def make_evaluator(self) -> Evaluator:
        evaluator: Evaluator = module("as_cut").AsCut()
        return evaluator


class TestAsCutOnSequencesWithZeros(TestAsCut):
    def make_context(self) -> Context:
        return sequence_context("sparsity")


class TestOnMyPhone(CostContract):
    def make_cost(self) -> GivenCost:
        cost: GivenCost = module("on_my_phone").on_my_phone
        return cost

    def make_context(self) -> Context:
        return context_of(model(), (torch.ones(30, 6), torch.arange(30) % 3))

    def test_it_is_the_sum_over_the_layers(self):
        context = self.make_context()
        cost = make_costs(context.structure, context.space, {"latency_ms": self.make_cost()})["latency_ms"]
        dense, least = np.zeros((1, 2), dtype=np.int64), context.space.sizes[None] - 1
        assert context.space.widths(least).tolist() == [[1, 1]]
        np.testing.assert_allclose([*cost(dense), *cost(least)], [0.4 + 0.5 + 0.7, 0.4 + 0.1 + 0.2])


def test_a_cost_of_widths_is_a_latency_budget():
    result = autoprune.search(
        model(), "latency_ms <= 1.0", example=torch.ones(2, 6), evaluator="adaptive_bn", trials=4,
        costs={"latency_ms": module("on_my_phone").on_my_phone},
    )  # fmt: skip
    for trial in result.front:
        widths = [np.interp(trial.decoded["0"], [1, 8, 16], [0.1, 0.3, 0.5]), 0.2 + (trial.decoded["2"] - 4) * 0.125]
        assert trial.costs["latency_ms"] == pytest.approx(0.4 + widths[0] + max(widths[1], 0.2))
        assert trial.costs["latency_ms"] <= 1.0


class TestTop2(MetricContract):
    def make_metric(self) -> Any:
        return module("top2").top2


class TestAMeasureOfTheWholeSet(MetricContract):
    def make_metric(self) -> Any:
        def largest(forward: Any, batches: Any) -> float:
            return max(float(forward(batch).max()) for batch in batches)

        return autoprune.Metric(largest, higher_is_better=True, per_sample=False)


def gated() -> nn.Module:
    gate = module("gated").gate

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 16), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> Any:
            return self.down(gate(self.up(x)))

    return Gated().eval()


class TestGate(RuleContract):
    def make_example(self) -> Example:
        return Example(gated(), (torch.ones(2, 6),))


def test_all_of_them_work_in_one_search(folder):
    result = autoprune.search(
        gated(), "params <= 70%", (torch.randn(90, 6), torch.randint(0, 3, (90,))),
        metric=module("top2").top2, space=module("uniform_width").Uniform(), evaluator=module("as_cut").AsCut(),
        optimizer=module("hill_climber").HillClimber, trials=5,
    )  # fmt: skip
    assert result.metric == "top2"
    assert result.front[0].status == "ok"
    assert {trial.decoded["width"] for trial in result.front} <= {0.5, 0.25}


def test_notes_of_an_evaluator_are_asked_for_once(folder):
    class Talks(module("as_cut").AsCut):
        asked = 0

        def notes(self):
            type(self).asked += 1
            (dense,) = self.evaluate(np.zeros((1, 2), dtype=np.int64))
            return (f"dense: {len(dense.signal)} samples",)

    result = autoprune.search(
        model(), "flops <= 60%", (torch.ones(40, 6), torch.arange(40) % 3), evaluator=Talks(), trials=2
    )
    assert Talks.asked == 1
    assert "dense: 16 samples" in result.notes


class TestOwnSpace(SpaceContract):
    def make_space(self) -> SearchSpace:
        space: SearchSpace = own_space.OwnUniform().bind(structure(), uniform_order(structure()))
        return space

    def make_structure(self) -> Structure:
        return structure()


class TestUniformSpace(SpaceContract):
    def make_space(self) -> SearchSpace:
        space: SearchSpace = module("uniform_width").Uniform().bind(structure(), uniform_order(structure()))
        return space

    def make_structure(self) -> Structure:
        return structure()


BUILD = """
import sys, torch, autoprune
from tests import own_space
from tests.test_extending import model
if sys.argv[3] == "UniformSpace":
    own_space.register()
result = autoprune.SearchResult.load(sys.argv[1], model=model())
assert type(result.space).__name__ == sys.argv[3]
assert "uniform_width" not in sys.modules
torch.save([result.build()(torch.ones(2, 6)), [trial.decoded for trial in result.front]], sys.argv[2])
"""


class TestASpaceOfOnesOwn:
    @pytest.mark.parametrize(("space", "kind"), [("uniform", "Choices"), ("own", "UniformSpace")])
    def test_it_is_searched_saved_loaded_in_another_process_and_built(self, folder, tmp_path, space, kind):
        module("uniform_width")
        result = autoprune.search(
            model(), "flops <= 60%", example=torch.ones(2, 6), space=space, evaluator="adaptive_bn", trials=4
        )
        result.save(tmp_path / "result")
        command = [sys.executable, "-c", BUILD, tmp_path / "result", tmp_path / "found.pt", kind]
        env = {**os.environ, "PYTHONPATH": f"{folder}:{DOCUMENT.parents[1]}"}
        finished = subprocess.run(command, env=env, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        outputs, decoded = torch.load(tmp_path / "found.pt")
        torch.testing.assert_close(outputs, result.build()(torch.ones(2, 6)), rtol=0, atol=0)
        assert decoded == [trial.decoded for trial in result.front]
        assert {name for trial in decoded for name in trial} == {"width"}

    def test_without_its_module_loading_says_what_to_import(self, monkeypatch, tmp_path):
        result = autoprune.search(
            model(), "flops <= 60%", example=torch.ones(2, 6), space="own", evaluator="adaptive_bn", trials=2
        )
        result.save(tmp_path)
        monkeypatch.delitem(SPACES, "own")
        with pytest.raises(FileFormatError, match=r"'own'.*import the module that calls autoprune.register_space"):
            autoprune.SearchResult.load(tmp_path)

    def test_one_that_is_not_registered_is_refused_before_the_search(self, monkeypatch):
        settings = own_space.OwnUniform()
        monkeypatch.delitem(SPACES, "own")
        with pytest.raises(ValueError, match=r"space must be registered.*'own'"):
            autoprune.search(model(), "flops <= 60%", example=torch.ones(2, 6), space=settings, trials=2)

    def test_a_taken_name_is_refused_and_the_same_class_is_registered_again(self):
        autoprune.register_space("own", own_space.OwnUniform, own_space.UniformSpace)
        with pytest.raises(ValueError, match="name must be free, but 'channels'"):
            autoprune.register_space("channels", own_space.OwnUniform, own_space.UniformSpace)
        with pytest.raises(TypeError, match="space must be a class with a method from_json"):
            autoprune.register_space("other", own_space.OwnUniform, Channels)
        with pytest.raises(TypeError, match="settings must be a class with a method bind"):
            autoprune.register_space("other", ChannelSpace, own_space.UniformSpace)


class Following:
    """Settings that cannot be bound before they know the latency."""

    needs_latency, criterion = True, "l2"

    def with_latency(self, latency: Any, structure: Structure) -> Any:
        assert latency.right_edges([group.multiple for group in structure.groups]).keys() == {"0", "2"}
        return module("uniform_width").Uniform()

    def bind(self, structure: Structure, order: Any) -> Any:
        pytest.fail("bound without a latency")


@pytest.mark.slow
def test_settings_of_ones_own_may_follow_the_measured_latency():
    table = autoprune.profile(model(), torch.ones(1, 6), networks=6)
    result = autoprune.search(
        model(), "flops <= 60%", example=torch.ones(2, 6), space=Following(), costs={"latency_ms": table}, trials=2
    )
    assert [dimension.name for dimension in result.space.dimensions] == ["width"]


def test_spaces_say_how_many_candidates_they_have():
    own = structure()
    order = uniform_order(own)
    two = Channels(options=(1.0, 0.5)).bind(own, order)
    assert two.describe() == "2 groups of 24 units with 2 widths each, 4 candidates"
    assert Channels(options=(1.0, 0.5), ignore=["4"]).bind(own, order).describe().endswith("2 widths, 2 candidates")
    assert Channels().bind(own, order).describe() == "2 groups of 24 units with 8 to 16 widths, 128 candidates"


def test_a_rule_of_zeros_is_a_candidate_to_begin_from():
    files = importlib.import_module("by_energy")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 12)
    structure, settings = analyse(Example(model, (x[:2],))), autoprune.Sparsity()
    begun = files.begun_by(files.by_energy, model, structure, settings, 0.6)
    weights = {name: model.get_parameter(name) for name in structure.weights}
    squares = [weight.double().flatten().square() for weight in weights.values()]
    kept = files.by_energy(weights, 100)
    assert sum(kept.values()) == 100
    first = torch.cat([each / each.sum() for each in squares]).detach().argsort(descending=True)[:100]
    assert kept["0.weight"] == int((first < 12 * 16).sum())
    with torch.no_grad():
        data = x, model(x).argmax(1)
    execution = autoprune.Execution(progress=False)
    result = autoprune.search(
        model, "nonzero_params <= 60%", data, space=settings, start=[begun], trials=3, execution=execution
    )
    assert result.trials[0].candidate == tuple(begun)
