"""Blocks of Python and of commands in README and docs run, page by page, on a small model and few samples.

A search has at most eight trials here, a training twelve steps, an audit four trainings; nothing else is changed.
"""

import functools
import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import autoprune
from autoprune.data.batch import default_forward
from autoprune.execution import trackers
from autoprune.search_spaces import Channels, Depth, Product
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.adapters import ADAPTERS
from tests.cli.commands import ok
from tests.documents import blocks, commands
from tests.machine import Machine

MOST = {"trials": 8, "steps": 12, "k": 4, "repeats": 0}
LONG = {"search": "trials", "recover": "steps"}
"""Numbers that are lowered where a block leaves them out."""

NOT_HERE = {
    "docs/extending.md": "tests/test_extending.py runs its files",
    "docs/tutorial.md": "tests/test_site.py runs it as it is",
}
PYTHON = sorted({block.page for block in blocks() if not block.is_session} - NOT_HERE.keys())
SHELL = sorted({page for page, _ in commands("autoprune")})
WITH_GPUS = "gpus_per_worker"
"""Blocks with this need a cluster with GPUs; names and arguments in them are checked by tests/test_site.py."""

ELSEWHERE = {
    "autoprune report runs/a --watch": "it serves until it is stopped: tests/cli/test_report.py",
    "autoprune profile model.py:build --runtime onnxruntime --batch 1 --threads 1 --output table.json": (
        "it times fifty exports: tests/test_onnxruntime.py does so on a clock of its own"
    ),
}

MODEL = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, 2, padding=1), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.layer1(torch.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def build():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()
"""
TRANSFORMER = """
from transformers import LlamaConfig, LlamaForCausalLM


def build():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, use_cache=False, **sizes)).eval()
"""
DATA = """
import torch


def load():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(120, 3, 8, 8, generator=generator)
    return x, torch.randint(0, 4, (120,), generator=generator)
"""


TEXT = """
import torch


def load():
    drawn = torch.randint(0, 50, (12, 8, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": words} for words in drawn]
"""
SEARCH = (
    *("search", "model.py:build", "--data", "data.py:load", "--budget", "flops <= 60%"),
    *("--run-dir", "runs/a", "--trials", MOST["trials"]),
)


def loaded(name: str, code: str, folder: Path) -> Any:
    """Module of a file of the reader's."""
    (folder / f"{name}.py").write_text(code)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def shorter(function: Any) -> Any:
    """The same with numbers that are no larger than `MOST` says."""

    @functools.wraps(function)
    def short(*args: Any, **kwargs: Any) -> Any:
        if function.__name__ in LONG:
            kwargs.setdefault(LONG[function.__name__], 1000)
        fewer = {name: min(kwargs[name], most) for name, most in MOST.items() if kwargs.get(name) is not None}
        return function(*args, **{**kwargs, **fewer})

    return short


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to run in; what blocks register, and the modules of the reader, go afterwards."""
    before = dict(ADAPTERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("search", "recover", "audit", "Recovery"):
        monkeypatch.setattr(autoprune, name, shorter(getattr(autoprune, name)))
    for name in ("FineTune", "Supernet"):
        monkeypatch.setattr(autoprune.evaluators, name, shorter(getattr(autoprune.evaluators, name)))
    for place in ("costs.latency.profile", "study.verification"):  # a busy machine would be waited for
        monkeypatch.setattr(f"autoprune.{place}.clock_for", lambda *_: Machine())
    yield tmp_path
    ADAPTERS.clear()
    ADAPTERS.update(before)
    for name in ("model", "data"):
        sys.modules.pop(name, None)


def things(folder: Path) -> dict[str, Any]:
    """Names that blocks use and leave to the reader."""
    model = loaded("model", MODEL, folder).build()
    X, y = loaded("data", DATA, folder).load()
    train, val, test = ((X[i : i + 40], y[i : i + 40]) for i in range(0, 120, 40))
    loader = DataLoader(TensorDataset(X, y), batch_size=20)
    return {
        **{"torch": torch, "np": np, "autoprune": autoprune, "Path": Path},
        **{"Product": Product, "Channels": Channels, "Depth": Depth},
        **{"model": model, "X": X, "y": y, "x": X[:2], "example": X[:2], "example_inputs": X[:2]},
        **{"train": train, "val": val, "test": test, "loader": loader, "train_loader": loader},
        "data": autoprune.Data(train, val, test),
        "dice": lambda outputs, batch: (outputs.argmax(1) == batch[1]).float(),
        **{"WIDTHS": [1, 32], "STEM_MS": [1.0, 4.0], "BODY_MS": [1.0, 9.0]},
        **{"kind": type(model), "batches": [train], "forward": default_forward},
    }


def prepared(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names, with what the page takes from pages before it."""
    found = things(folder)
    model, data = found["model"], found["data"]
    if page in ("docs/audit.md", "docs/notebooks.md", "docs/recover.md", "docs/report.md"):
        found["result"] = autoprune.search(model, "flops <= 50%", data)
        found["small"] = found["result"].build()
    if page == "docs/journal.md":
        autoprune.search(model, "flops <= 50%", data, execution=autoprune.Execution(run_dir="runs/a"))
    if page == "docs/layer-database.md":
        found["structure"] = analyse(Example(model, (found["x"],)))
    if page == "docs/language-models.md":
        found |= language_model(folder)
    if page == "docs/trackers.md":  # with warnings of its own; tests/test_trackers.py reads back what it keeps
        monkeypatch.setattr(trackers, "MLflow", lambda name: trackers.TensorBoard(folder / name))
    return found


def language_model(folder: Path) -> dict[str, Any]:
    """A folder with a model and a tokenizer, and a text."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = [f"w{i}" for i in range(50)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1").save_pretrained(
        folder / "language"
    )
    loaded("model", TRANSFORMER, folder).build().save_pretrained(folder / "language")
    drawn = torch.randint(0, 50, (256 * 24,), generator=torch.Generator().manual_seed(0))
    (folder / "text").write_text(" ".join(words[i] for i in drawn))
    names = {name: getattr(transformers, name) for name in ("AutoModelForCausalLM", "AutoTokenizer")}
    return {**names, "name": str(folder / "language"), "text": folder / "text"}


def page_case(page: str) -> Any:
    return pytest.param(page, marks=[pytest.mark.ray] if page == "docs/ray.md" else [])


@pytest.mark.slow
@pytest.mark.parametrize("page", [page_case(page) for page in PYTHON])
def test_the_python_of_a_page_runs(page, folder, monkeypatch):
    names = prepared(page, folder, monkeypatch)
    for block in blocks():
        if block.page == page and not block.is_session and WITH_GPUS not in block.code:
            with torch.random.fork_rng(devices=[]):
                exec(compile(block.code, f"{page}:{block.line}", "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("page", SHELL)
def test_the_commands_of_a_page_run(page, folder):
    own = [line for other, line in commands("autoprune") if other == page and line not in ELSEWHERE]
    texts = [line for line in own if "--format hf" in line]
    run_next_to(folder, MODEL, DATA, [line for line in own if line not in texts])
    run_next_to(folder, TRANSFORMER, TEXT, texts)


def run_next_to(folder: Path, model: str, data: str, lines: list[str]) -> None:
    """Run commands next to files with a model and data, and to a search, unless the first of them does it."""
    (folder / "model.py").write_text(model)
    (folder / "data.py").write_text(data)
    for name in ("model", "data"):
        sys.modules.pop(name, None)
    if lines and not any(line.startswith("autoprune search") for line in lines):
        shutil.rmtree(folder / "runs", ignore_errors=True)
        ok(*SEARCH)
    for line in lines:
        words = shlex.split(line)[1:]
        short = {"search": ["--trials", MOST["trials"]], "recover": ["--steps", MOST["steps"]]}
        ok(*words, *short.get(words[0], []))


def test_what_is_not_run_here_is_in_a_page():
    assert [block.page for block in blocks() if WITH_GPUS in block.code] == ["docs/ray.md"]
    assert {block.page for block in blocks()} > NOT_HERE.keys()
    assert ELSEWHERE.keys() <= {line for _, line in commands("autoprune")}


def test_comments_are_no_part_of_a_command():
    assert all("#" not in line and re.match(r"autoprune \w+ ", line) for _, line in commands("autoprune"))
