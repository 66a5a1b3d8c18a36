"""EvoPress' scheme by name: its settings of the evolution, and rungs of growing numbers of samples."""

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune.evaluators import AdaptiveBN, Evaluator, Growing, Masked
from autoprune.optimizers import LevelSwitch, Problem, evopress
from autoprune.protocols import OK, RACED, IntArray, Optimizer
from autoprune.search_spaces import Sparsity
from autoprune.testing.contracts import EvaluatorContract, OptimizerContract
from autoprune.testing.problems import additive_problem


class TestEvoPress(OptimizerContract):
    def make(self, problem: Problem, seed: int) -> Optimizer:
        return evopress(problem, seed)


class TestGrowing(EvaluatorContract):
    def make_evaluator(self) -> Evaluator:
        return Growing(AdaptiveBN())


def search(trials: int, **options: object) -> autoprune.SearchResult:
    torch.manual_seed(0)
    layers = [each for i in range(6) for each in (nn.Linear(16, 16), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(16, 4)).eval()
    x = torch.randn(196, 16, generator=torch.Generator().manual_seed(1))
    data = autoprune.Data(calibration=x[:88], validation=list(x[88:160].split(8)), test=x[160:])
    return autoprune.search(
        model,
        "nonzero_params <= 50%",
        data,
        metric="agreement",
        space=Sparsity(levels=(0, 0.2, 0.4, 0.5, 0.6, 0.8)),
        evaluator=Growing(Masked("sparsegpt")),
        optimizer=evopress,
        trials=trials,
        execution=autoprune.Execution(progress=False),
        **options,  # type: ignore[arg-type]  # settings by name
    )


def test_most_candidates_are_scored_on_few_samples():
    result = search(24, early_stopping=autoprune.Rungs(3))
    stopped = [trial for trial in result.trials if trial.status == RACED]
    scored = [trial for trial in result.trials if trial.status == OK]
    assert stopped
    assert scored
    assert {trial.evaluations[-1].steps for trial in stopped} <= {1, 3}
    assert {tuple(each.samples for each in trial.evaluations) for trial in scored} == {(8, 24, 72)}
    plain = {trial.candidate: trial.signal for trial in search(24).trials}
    assert all(trial.signal == plain[trial.candidate] for trial in scored if trial.candidate in plain)


def test_evolution_improves_on_uniform_pruning():
    result = search(40)
    uniform = result.trials[0]
    assert result.best().signal < uniform.signal


@pytest.mark.parametrize("settings", [{"begin": 0}, {"step": 2.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]):
    with pytest.raises(ValueError, match="begin must be at least 1 and step a share from 0 to 1"):
        LevelSwitch(additive_problem(sizes=(3, 3), seed=0), **settings)  # type: ignore[arg-type]  # settings by name


def test_a_single_niche_is_the_limit():
    known = additive_problem(sizes=(9,) * 8, seed=0)
    problem = known.problem
    optimizer = evopress(problem, seed=1)
    costs: list[IntArray] = []
    for _ in range(12):
        asked = optimizer.ask(1)
        optimizer.tell(known.evaluate(asked))
        costs.append(problem.costs(asked))
    assert np.median(costs) > 0.9 * problem.limits[0]
