"""A user's script under ``mypy --strict``: every public verb is typed, and misspelt names are refused."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from autoprune.evaluators import EVALUATORS, EvaluatorName
from autoprune.execution import EXECUTORS, ExecutorName
from autoprune.optimizers import OPTIMIZERS, OptimizerName

ROOT = Path(__file__).parents[1]

SCRIPT = """
from pathlib import Path

import torch
from torch import Tensor, nn

import autoprune


def train(model: nn.Module) -> None:
    model.train()


def error(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (outputs.argmax(1) != batch[1]).float()


folder = Path("runs/a")
model = nn.Linear(4, 2)
x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
data = autoprune.Data(calibration=(x, y), validation=(x, y))
call = autoprune.Call(inputs=[(x,), {"input": x}], forward=lambda model, batch: model(batch))
found: autoprune.Inspection = autoprune.inspect(model, call)
table: autoprune.Latency = autoprune.profile(model, x, path=folder / "table.json")
result: autoprune.SearchResult = autoprune.search(
    model,
    ["flops <= 50%", autoprune.Budget.parse("params <= 60%")],
    data,
    metric=autoprune.Metric(error, higher_is_better=False),
    space=autoprune.Channels(round_to=8),
    evaluator="adaptive_bn",
    optimizer="nsga2",
    trials="auto",
    start=autoprune.Start(candidates=[{"0": 1}], prior="sensitivity"),
    example=autoprune.Call(inputs=x, outputs=lambda made: made, checks="strict", rewrite="off", cost_batch=8),
    costs={"latency_ms": table},
    early_stopping=autoprune.Racing(delta=0.01),
    execution=autoprune.Execution(run_dir=folder, resume="anyway"),
)
plain = autoprune.search(model, "flops <= 50%", example=[x, x], start=[result], execution="ray")
plain = autoprune.search(model, "latency <= 50%", data, costs={"latency_ms": folder / "table.json"})
best: autoprune.Trial = result.best("flops <= 40%")
small: nn.Module = result.build(best)
result.save(folder)
autoprune.save(small, folder / "small.safetensors")
again: nn.Module = autoprune.load(folder / "small.safetensors", nn.Linear(4, 2))
loaded = autoprune.SearchResult.load(folder, model)
audited = autoprune.audit(loaded, train, run_dir=folder, evaluators=["finetune"])
print(found, best.score, audited.audit)
"""

WRONG = {
    'evaluator="adaptive_bn"': 'evaluator="adaptive-bn"',
    'optimizer="nsga2"': 'optimizer="nsga"',
    'trials="auto"': 'trials="all"',
    'resume="anyway"': 'resume="yes"',
    "run_dir=folder, resume": "run_dir=3, resume",
    'checks="strict"': 'checks="stricter"',
    'rewrite="off"': 'rewrite="no"',
    'prior="sensitivity"': 'prior="sensitive"',
    'execution="ray"': 'execution="dask"',
    'evaluators=["finetune"]': 'evaluators=["fine-tune"]',
}


def mypy(folder: Path, script: str) -> str:
    """Messages about the script, checked strictly as a user's that imports the package from here."""
    path = folder / "script.py"
    path.write_text(script)
    options = ["--strict", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(folder / "cache")]
    command = [sys.executable, "-m", "mypy", *options, "--follow-imports", "silent", str(path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return finished.stdout + finished.stderr


@pytest.mark.slow
def test_a_strict_script_of_every_verb_is_accepted_and_each_misspelt_name_refused(tmp_path):
    assert "Success" in mypy(tmp_path, SCRIPT)
    wrong = SCRIPT
    for right, mistake in WRONG.items():
        assert wrong.count(right) == 1
        wrong = wrong.replace(right, mistake)
    told = mypy(tmp_path, wrong)
    arguments = {
        "search": ("evaluator", "optimizer", "trials", "execution"),
        "Execution": ("resume", "run_dir"),
        "Call": ("checks", "rewrite"),
        "Start": ("prior",),
    }
    for call, names in arguments.items():
        for name in names:
            assert f'Argument "{name}" to "{call}" has incompatible type' in told
    assert "fine-tune" in told


@pytest.mark.parametrize(
    ("names", "registry"), [(EvaluatorName, EVALUATORS), (OptimizerName, OPTIMIZERS), (ExecutorName, EXECUTORS)]
)
def test_the_names_that_a_type_checker_knows_are_those_there_are(names, registry):
    assert sorted(get_args(names)) == sorted(registry)
