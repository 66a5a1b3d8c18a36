"""A plan tells what a search would take, before it begins."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.evaluators.scoring import scorer
from autoprune.execution import evaluate_one
from autoprune.study.plan import DEFAULTS, lasting
from autoprune.testing.contexts import study_for
from tests.cli.commands import CODE, run


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def samples() -> autoprune.Data:
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(1))
    return autoprune.Data((x, x[:, :3].argmax(1)))


@pytest.fixture(scope="module")
def plan() -> autoprune.Plan:
    return autoprune.plan(network(), "flops <= 50%", samples(), trials=30)


def test_it_has_the_defaults_of_a_search() -> None:
    keywords = inspect.signature(autoprune.search).parameters.values()
    assert {each.name: each.default for each in keywords if each.kind is each.KEYWORD_ONLY} == DEFAULTS


def test_it_counts_dimensions_and_trials_and_adds_up_the_time(plan: autoprune.Plan) -> None:
    assert plan.dimensions == 2
    assert plan.trials == 30
    assert plan.seconds == pytest.approx(plan.seconds_set_up + 30 * plan.seconds_per_trial)
    assert 0 < plan.seconds_per_trial < plan.seconds


def test_it_scores_the_dense_model_and_two_candidates_at_the_budget(plan: autoprune.Plan) -> None:
    found = autoprune.search(network(), "flops <= 50%", samples(), trials=4, evaluator="compensated")
    assert plan.metric == "accuracy"
    assert plan.dense_score == found.dense.score
    assert any(plan.uniform_score == trial.score for trial in found.trials)  # which every search begins with
    assert 0 <= plan.expected_score <= 1


def test_the_prior_expects_no_more_loss_of_its_choice_than_of_uniform_pruning(plan: autoprune.Plan) -> None:
    assert plan.expected_loss is not None
    assert 0 <= plan.expected_loss <= 1


def test_it_prints_and_is_plain_in_json(plan: autoprune.Plan) -> None:
    assert "30 trials of" in str(plan)
    assert "of what uniform pruning loses there" in str(plan)
    assert json.loads(json.dumps(plan.to_dict()))["trials"] == 30


def test_a_time_limit_bounds_it() -> None:
    assert autoprune.plan(network(), "flops <= 50%", samples(), max_seconds=1e-3 + 30).seconds <= 30.001


def test_two_candidates_are_evaluated_besides_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "autoprune.study.plan.evaluate_one", lambda own, row: seen.append(row) or evaluate_one(own, row)
    )
    autoprune.plan(network(), "flops <= 50%", samples())
    assert len(seen) == 2


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(TypeError, match=r"arguments of autoprune.search.*'trails'"):
        autoprune.plan(network(), "flops <= 50%", samples(), trails=3)
    with pytest.raises(TypeError, match="Execution"):
        autoprune.plan(network(), "flops <= 50%", samples(), run_dir="here")


def test_a_search_tells_its_plan_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "autoprune"):
        autoprune.search(network(), "flops <= 50%", samples(), trials=3, evaluator="compensated")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("plan: ")]
    assert len(lines) == 1
    assert "2 dimensions, 3 trials" in lines[0]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0123, "0.012 s"), (14.2, "14 s"), (300, "5 min"), (7200, "2 h"), (86_400 * 3, "3 days")],
)
def test_times_are_told_in_units_that_fit(seconds: float, words: str) -> None:
    assert lasting(seconds) == words


def test_the_shell_prints_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan_example.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    shown = run(
        "plan",
        "plan_example.py:build",
        "--data",
        "plan_example.py:load",
        "--budget",
        "flops <= 60%",
        "--trials",
        "12",
        "--json",
    )
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["trials"] == 12


class Clock:
    """Advances by a second in every pass of `Slow`, and stands else."""

    now = 0.0

    @classmethod
    def perf_counter(cls) -> float:
        return cls.now


class Slow(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        Clock.now += 1.0
        return super().forward(x)


@pytest.mark.parametrize("evaluator", ["adaptive_bn", "compensated"])
def test_the_dense_model_takes_its_passes_though_their_outputs_were_there(
    monkeypatch: pytest.MonkeyPatch, evaluator: str
) -> None:
    monkeypatch.setattr(scorer, "time", Clock)
    model = nn.Sequential(Slow(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    study = study_for(model, "flops <= 50%", samples(), evaluator=evaluator)
    assert study.dense.seconds == len(study.context.subsets.validation)
