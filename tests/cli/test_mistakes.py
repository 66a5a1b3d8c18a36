"""Mistakes of users: one line with the way out, and nothing left behind."""

from pathlib import Path

import pytest
import torch

from autoprune.cli.user_objects import load_model
from tests.cli.commands import MODEL, SEARCH, error, run


def test_weights_that_would_run_code_are_refused(tmp_path):
    torch.save(load_model(MODEL), tmp_path / "whole.pt")
    assert "more than tensors" in error(*SEARCH, "--run-dir", tmp_path / "r", "--weights", tmp_path / "whole.pt")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("cli_example.py:nothing", ["cli_example.py", "'nothing'", "build", "load", "noise"]),
        ("cli_example.py", ["MODEL must be FILE.py:NAME", "'cli_example.py'"]),
        ("elsewhere.py:build", ["no such file", "elsewhere.py"]),
        ("no_package.models:build", ["'no_package'", "FILE.py:NAME"]),
        ("cli_example.py:wide", ["without arguments", "wide(width)"]),
        ("cli_example.py:load", ["torch.nn.Module", "tuple"]),
        (MODEL, ["Sequential", "--input-shape", "--example"]),
    ],
)
def test_a_model_that_cannot_be_had_is_named_with_what_there_is(target, words):
    message = error("inspect", target)
    assert [word for word in words if word not in message] == []
    assert "annotations" not in message


@pytest.mark.parametrize("command", ["inspect", "profile"])
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("2,3", ["the model's forward must run on", "float32 (2, 3)", "RuntimeError", "--debug shows where"]),
        ("2,x", ["input-shape must be positive numbers", "'2,x'"]),
        ("99999999999999,1,4,4", ["input-shape must be of inputs that fit into memory, got '99999999999999,1,4,4'"]),
        ("9" * 400, ["input-shape must be of inputs that fit into memory", "..."]),
    ],
)
def test_a_wrong_input_shape_is_one_line(command, shape, words, tmp_path):
    output = ["--output", tmp_path / "table.json"] * (command == "profile")
    message = error(command, MODEL, "--input-shape", shape, *output)
    assert [word for word in words if word not in message] == []
    assert len(message) < 600
    assert not (tmp_path / "table.json").exists()


def test_a_file_named_like_a_module_in_use_is_refused(tmp_path):
    (tmp_path / "json.py").write_text("build = 1")
    assert "rename" in error("inspect", f"{tmp_path}/json.py:build")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget", "flops << 50"), ["'flops << 50'", "flops <= 50%"]),
        (("--budget", "params <= 1"), ["cheapest reachable"]),
        (("--metric", "beauty"), ["'beauty'", "accuracy"]),
        (("--optimizer", "luck"), ["'luck'", "nsga2"]),
        (("--evaluator", "oracle"), ["'oracle'", "adaptive_bn"]),
        (("--criterion", "taste"), ["'taste'", "l2"]),
        (("--space", "depths"), ["--space", "'depths'", "channels", "FILE.py:NAME"]),
        (("--space", "sparsity", "--round-to", "4"), ["--round-to", "--space sparsity"]),
        (("--space", "cli_example.py:coarse", "--ignore", "3"), ["--ignore", "--space cli_example.py:coarse"]),
        (("--space", "cli_example.py:model"), ["space", "Channels"]),
        (("--ignore", "tail*"), ["'tail*'"]),
        (("--round-to", "0"), ["round_to", "0"]),
        (("--weights", "none.pt"), ["no such file", "none.pt"]),
        (("--weights", "cli_example.py"), ["cli_example.py", "state dict"]),
        (("--data", "cli_example.py:nothing"), ["'nothing'"]),
        (("--run-dir", "cli_example.py"), ["is a file"]),
        (("--run-dir", "runs/a"), ["runs/a", "holds a result", "--resume"]),
        (("--run-dir", "runs/a", "--resume"), ["differs in", "space"]),
        (("--executor", "cloud"), ["'cloud'", "ray"]),
        (("--workers", "0"), ["workers", "0"]),
    ],
)
def test_a_mistake_in_a_search_is_one_line_before_any_trial(options, words, searched, tmp_path):
    message = error(*SEARCH, "--run-dir", tmp_path / "run", *options)
    assert [word for word in words if word not in message] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mistake_in_a_build_is_one_line(searched, journal_only, tmp_path):
    out = tmp_path / "small.safetensors"
    command = ("build", searched[0], "--model", MODEL, "--output", out)
    assert "not both" in error(*command, "--trial", 1, "--budget", "flops <= 40%")
    assert "got 99" in error(*command, "--trial", 99)
    assert "the nearest is trial" in error(*command, "--budget", "params <= 1")
    assert "folder that exists" in error(*command[:-1], tmp_path / "missing" / "small.safetensors")
    assert "no saved result" in error("build", journal_only[0], *command[2:])
    (journal_only[0] / "result.json").write_text("{")
    assert "no saved result" in error("build", journal_only[0], *command[2:])
    assert "journal.sqlite" in error("front", tmp_path / "missing")
    wrong = error("build", searched[0], "--model", "cli_example.py:model", "--output", out)
    assert "Sequential" in wrong
    assert not out.exists()


def test_bugs_keep_their_traceback_and_mistakes_do_with_debug():
    bug = run("inspect", "cli_example.py:broken")
    assert isinstance(bug.exception, ValueError)
    assert str(bug.exception) == "a bug of the user"
    mistake = run("inspect", "elsewhere.py:build", "--debug")
    assert isinstance(mistake.exception, FileNotFoundError)


def test_profile_refuses_an_unknown_runtime_in_one_line():
    refused = run("profile", MODEL, "--input-shape", "2,1,4,4", "--output", "table.json", "--runtime", "tensorrt")
    assert refused.exit_code == 2
    assert "runtime must be 'torch', 'onnxruntime' or 'onnxruntime:PROVIDER', got 'tensorrt'" in refused.output


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--device", "gpu", "device must be cpu, cuda or cuda:N, got 'gpu'"),
        ("--device", "mps", "device must be cpu, cuda or cuda:N, got 'mps'"),
        ("--device", "cuda:99", "device must be one of this machine, got 'cuda:99', and PyTorch sees"),
        ("--batch", "0", "batch must be an integer of at least 1, got 0"),
        ("--threads", "0", "Invalid value for '--threads'"),
        ("--output", ".", "must be a file to write the table to, got the folder ."),
        ("--output", "none/table.json", "must lie in a folder that exists, got none"),
    ],
)
def test_profile_names_what_it_cannot_use_and_leaves_nothing(option, value, said):
    def there():
        return sorted(path for path in Path().iterdir() if path.name != "__pycache__")

    before = there()
    refused = run("profile", MODEL, "--input-shape", "2,1,4,4", "--output", "table.json", option, value)
    assert refused.exit_code == 2
    assert said in refused.output
    assert there() == before
