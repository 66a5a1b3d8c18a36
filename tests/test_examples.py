"""Every example runs to its end in its short mode, and says what it did."""

import importlib.util
import logging
import runpy
import sys
from pathlib import Path

import pytest

from tests.machine import Machine

EXAMPLES = Path(__file__).parents[1] / "examples"
ELSEWHERE = {
    "language_model.py": "tests/test_example_language_model.py",
    "built.py": "what the loops begin with",
    "pictures.py": "pictures of the documents, made by hand",
}
NEEDS = {
    "onnx_deployment.py": ("onnxruntime", "onnxscript"),
    "transformer_encoder.py": ("transformers",),
    "with_lightning.py": ("lightning",),
    "with_accelerate.py": ("accelerate",),
    "with_trainer.py": ("transformers", "accelerate"),
}
SAYS = {
    "quickstart.py": "outputs identical",
    "latency_budget.py": "ms measured",
    "own_parts.py": "found",
    "transformer_encoder.py": "cosine",
    "several_outputs.py": "'boxes': [(8, 4, 8, 8), (8, 4, 4, 4)]",
    "onnx_deployment.py": "its outputs differ from the model's by up to",
    "ray_cluster.py": "8 trials",
    "recover.py": "trained norm+bias",
    "plain.py": "after training",
    "with_lightning.py": "after training",
    "with_accelerate.py": "after training",
    "with_trainer.py": "autoprune.from_pretrained('small') loads it",
}
SCRIPTS = sorted(path for path in EXAMPLES.rglob("*.py") if path.name not in ELSEWHERE)


def test_every_example_is_run_somewhere():
    assert {path.name for path in SCRIPTS} == SAYS.keys()


def case(path):
    return pytest.param(path, id=path.stem, marks=[pytest.mark.ray] if path.name == "ray_cluster.py" else [])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning:lightning")  # Lightning's own calls of what PyTorch deprecates
@pytest.mark.parametrize("path", [case(path) for path in SCRIPTS])
def test_an_example_runs_in_its_short_mode(path, tmp_path, monkeypatch, capsys):
    missing = [name for name in NEEDS.get(path.name, ()) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{path.name} needs {' and '.join(missing)}; pip install them to run it")
    if path.name == "latency_budget.py":  # a busy machine would be waited for
        monkeypatch.setattr("autoprune.costs.latency.profile.clock_for", lambda *_: Machine())
        monkeypatch.setattr("autoprune.study.verification.clock_for", lambda *_: Machine())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--short"])
    monkeypatch.syspath_prepend(path.parent)
    before = logging.getLogger().level, list(logging.getLogger().handlers)
    runpy.run_path(str(path), run_name="__main__")
    logging.getLogger().setLevel(before[0])
    logging.getLogger().handlers[:] = before[1]
    assert SAYS[path.name] in capsys.readouterr().out
