"""Spaces of one's own from a shell: ``--import`` brings in the module that registers them."""

import sys

import pytest

import autoprune
from autoprune.search_spaces.registry import SPACES
from tests.cli.commands import MODEL, SEARCH, error, ok

REGISTERS = "from tests import own_space\n\nown_space.register()\n"


@pytest.fixture
def fresh(monkeypatch):
    """Forget the space of one's own, as a new process would."""

    def forget():
        for registry, name in ((SPACES, "own"), (sys.modules, "registers_own")):
            monkeypatch.delitem(registry, name, raising=False)

    forget()
    yield forget
    forget()


@pytest.fixture
def run_dir(folder, fresh, tmp_path):
    """A search of a space of one's own, made by a process that knows the space."""
    (folder / "registers_own.py").write_text(REGISTERS)
    options = ("--import", "registers_own.py", "--space", "own", "--evaluator", "adaptive_bn", "--trials", "3")
    assert "saved in" in ok(*SEARCH, "--run-dir", tmp_path / "run", *options)
    fresh()
    return tmp_path / "run"


def test_without_its_module_the_error_names_the_option(run_dir, tmp_path):
    built = ("build", run_dir, "--model", MODEL, "--output", tmp_path / "small.safetensors")
    for command in (("front", run_dir), built):
        message = error(*command)
        assert "'own'" in message
        assert message.endswith("(from a shell: --import FILE.py, or --import package.module)")


@pytest.mark.parametrize("source", ["registers_own.py", "registers_own"])
def test_the_front_is_shown_and_the_best_is_built(source, run_dir, tmp_path):
    output = tmp_path / "small.safetensors"
    assert "own" not in SPACES
    assert "under flops <= 60%" in ok("front", run_dir, "--import", source)
    assert "trial" in ok("build", run_dir, "--model", MODEL, "--output", output, "--import", source)
    assert output.exists()
    assert type(autoprune.SearchResult.load(run_dir).space).__name__ == "UniformSpace"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("registers_own.py:register", ["--import must be FILE.py or package.module", "'registers_own.py:register'"]),
        ("", ["--import must be FILE.py or package.module"]),
        ("elsewhere.py", ["--import must be in a file", "no such file", "elsewhere.py"]),
        ("no_package.spaces", ["--import", "no module named 'no_package'", "FILE.py"]),
    ],
)
@pytest.mark.parametrize("command", [("front", "runs/a"), ("inspect", MODEL)])
def test_a_module_that_cannot_be_imported_is_one_line(command, source, words):
    message = error(*command, "--import", source)
    assert [word for word in words if word not in message] == []
