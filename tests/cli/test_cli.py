"""The command line from a search to a loaded model."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import autoprune
from autoprune.cli.user_objects import load_model, load_object
from tests.cli.commands import DATA, MODEL, SEARCH, error, ok, run
from tests.machine import Machine


@pytest.mark.slow
def test_a_search_prints_its_front_and_saves_it_beside_the_journal(searched):
    run_dir, printed = searched
    result = autoprune.SearchResult.load(run_dir)
    assert str(result) in printed
    assert f"saved in {Path('runs/a')}" in printed
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {"journal.sqlite", "result.json", *(f"trial-{t.id:04d}.safetensors" for t in result.front)}


def test_options_of_a_search_reach_its_space(searched):
    dimensions = autoprune.SearchResult.load(searched[0]).space.dimensions
    assert [dimension.name for dimension in dimensions] == ["0", "3"]
    assert all(width % 2 == 0 for dimension in dimensions for width in dimension.options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "cost", "kind", "sizes"),
    [
        (("sparsity", "--ignore", "8"), "nonzero_params", "sparsity", None),
        (("cli_example.py:coarse",), "flops", "channels", {2}),
    ],
)
def test_every_space_can_be_searched(options, cost, kind, sizes, tmp_path):
    searching = ("search", MODEL, "--data", DATA, "--budget", f"{cost} <= 60%", "--trials", 2, "--optimizer", "random")
    ok(*searching, "--run-dir", tmp_path / "run", "--space", *options)
    space = autoprune.SearchResult.load(tmp_path / "run").space
    assert space.to_json()["type"] == kind
    assert sizes is None or {len(dimension.options) for dimension in space.dimensions} == sizes


@pytest.mark.slow
def test_the_package_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "autoprune", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == ok("--version")


def test_the_next_command_that_a_search_names_works(searched, tmp_path):
    *command, output = searched[1].splitlines()[-1].removeprefix("next: autoprune ").split()
    assert output == "small.safetensors"
    assert "trial" in ok(*command, tmp_path / output)


@pytest.mark.parametrize("choice", ["best", "budget", "trial"])
def test_a_built_file_loads_into_a_fresh_model_and_costs_what_was_said(choice, searched, tmp_path):
    result, path = autoprune.SearchResult.load(searched[0]), tmp_path / "small.safetensors"
    first = result.front[0]
    share = 100 * first.costs["flops"] / result.dense.costs["flops"]
    options = {"best": (), "budget": ("--budget", f"flops <= {share + 0.01}%"), "trial": ("--trial", first.id)}
    chosen = result.best() if choice == "best" else first
    printed = ok("build", searched[0], "--model", MODEL, "--output", path, *options[choice])
    assert f"trial {chosen.id}: " in printed
    small = autoprune.load(path, load_model(MODEL)).eval()
    assert sum(p.numel() for p in small.parameters()) == chosen.costs["params"]
    expected = autoprune.SearchResult.load(searched[0], load_model(MODEL)).build(chosen).eval()
    x, _ = load_object(DATA, "--data")
    torch.testing.assert_close(small(x), expected(x), rtol=0, atol=0)


@pytest.mark.slow
def test_a_search_may_limit_the_score_and_stop_by_itself(tmp_path):
    command = (*SEARCH[:4], "--budget", "accuracy drop <= 5pp", "--optimizer", "random", "--round-to", 8)
    printed = ok(*command, "--trials", "auto", "--run-dir", tmp_path / "run")
    assert "score limit" in printed.splitlines()[0]
    assert "stopped after" in printed
    message = "trials must be an integer of at least 1, or 'auto', got "
    assert message + "'soon'" in error(*command, "--trials", "soon", "--run-dir", tmp_path / "other")
    assert message + "-3" in error(*command, "--trials", "-3", "--run-dir", tmp_path / "other")


def test_build_takes_the_best_of_the_trials_that_have_weights(searched, tmp_path):
    result = autoprune.SearchResult.load(searched[0], load_model(MODEL))
    shutil.copytree(searched[0], tmp_path / "run")
    (tmp_path / "run" / f"trial-{result.best().id:04d}.safetensors").unlink()
    printed = ok("build", tmp_path / "run", "--model", MODEL, "--output", tmp_path / "small.safetensors")
    assert f"trial {result.best().id}: " not in printed


@pytest.mark.slow
def test_a_killed_search_is_resumed_and_a_finished_one_takes_more_trials(searched, journal_only):
    run_dir, _ = journal_only
    command = (*SEARCH, "--run-dir", run_dir, "--round-to", 2, "--ignore", "8", "--resume")
    ok(*command)
    whole, resumed = (autoprune.SearchResult.load(folder) for folder in (searched[0], run_dir))
    assert [(t.id, t.candidate, t.score) for t in resumed.trials] == [
        (t.id, t.candidate, t.score) for t in whole.trials
    ]
    ok(*command, "--trials", 14)
    more = autoprune.SearchResult.load(run_dir)
    assert len(more.trials) == 14
    # Held-out scores are of the front, which further trials change.
    earlier, later = (
        [replace(t, test_score=None, test_interval=None) for t in each.trials[:10]] for each in (resumed, more)
    )
    assert later == earlier


@pytest.mark.slow
def test_inspect_prints_what_the_library_says():
    found = json.loads(ok("inspect", MODEL, "--input-shape", "2,1,4,4", "--json"))
    assert [group["units"] for group in found["groups"]] == [16, 16, 8]
    assert found == json.loads(ok("inspect", MODEL, "--example", "cli_example.py:noise", "--json"))
    assert "3 groups" in ok("inspect", "cli_example:model", "--input-shape", "2,1,4,4")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_loaded_into_the_model(suffix, tmp_path):
    state = {name: torch.full_like(tensor, 2) for name, tensor in load_model(MODEL).state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    loaded = load_model(MODEL, path).state_dict()
    assert all((tensor == 2).all() for tensor in loaded.values())


@pytest.mark.slow
@pytest.mark.parametrize(("rewrite", "graphs"), [("auto", ["1"]), ("off", [])])
def test_code_that_ties_sizes_is_rewritten_unless_told_otherwise(rewrite, graphs, tmp_path):
    shape = ("--input-shape", "2,5,6", "--rewrite", rewrite)
    assert json.loads(ok("inspect", "cli_example.py:tied", *shape, "--json"))["graphs"] == graphs
    budget = ("--budget", "params <= 90%", "--trials", 2, "--run-dir", tmp_path / "run")
    said = ok("search", "cli_example.py:tied", *shape, *budget)
    assert ("rewrite='off' leaves them as they are" in " ".join(said.split())) == bool(graphs)


def test_help_lists_the_commands_and_their_options():
    commands = ok("--help")
    for command in ("search", "front", "build", "inspect"):
        assert command in commands
        assert "--debug" in ok(command, "--help")
    listed = ok("search", "--help")
    for option in (
        "--data",
        "--budget",
        "--run-dir",
        "--trials",
        "--seed",
        "--weights",
        "--ignore",
        "--resume",
        "--executor",
    ):
        assert option in listed


def test_the_version_is_that_of_the_package():
    assert ok("--version") == f"autoprune {autoprune.__version__}\n"


@pytest.mark.slow
def test_profile_writes_a_table_that_search_takes(monkeypatch):
    monkeypatch.setattr("autoprune.costs.latency.profile.clock_for", lambda *_: Machine())
    monkeypatch.setattr("autoprune.study.verification.clock_for", lambda *_: Machine())
    arguments = ("--input-shape", "2,1,4,4", "--output", "table.json", "--batch", "2")
    finished = run("profile", MODEL, *arguments)
    assert finished.exit_code == 0, finished.output
    assert "Sequential, batch 2" in finished.output
    assert json.loads(Path("table.json").read_text())["setting"]["batch"] == 2
    budget = ("--budget", "latency <= 70%", "--latency", "table.json", "--trials", "8", "--run-dir", "timed")
    assert run("search", MODEL, "--data", DATA, *budget, "--cost-batch", "2").exit_code == 0
    refused = run("search", MODEL, "--data", DATA, *budget[:-1], "other")
    assert refused.exit_code == 2
    assert "batch size is 2" in refused.output


def test_each_command_from_a_search_to_a_file_for_another_runtime_names_the_next(searched, tmp_path):
    *command, output = searched[1].splitlines()[-1].removeprefix("next: autoprune ").split()
    built = ok(*command, tmp_path / output)
    command = built.splitlines()[-1].removeprefix("next: autoprune ").split()
    assert command[0] == "recover"
    command = [str(tmp_path / "better.safetensors") if word == "recovered.safetensors" else word for word in command]
    recovered = ok(*[DATA if word == "data.py:load" else word for word in command], "--steps", 3, "--train", "lora")
    assert "trained lora" in recovered
    *command, last = recovered.splitlines()[-1].removeprefix("next: autoprune ").split()
    assert (command[0], last) == ("export", str(tmp_path / "better.onnx"))
    exported = ok(*command, tmp_path / "better.pt2", "--input-shape", "2,1,4,4")
    assert "its outputs differ from the model's by up to 0" in exported
    x = torch.randn(3, 1, 4, 4)
    small = autoprune.load(tmp_path / "better.safetensors", load_model(MODEL)).eval()
    torch.testing.assert_close(torch.export.load(tmp_path / "better.pt2").module()(x), small(x))
    assert not torch.equal(small(x), autoprune.load(tmp_path / output, load_model(MODEL)).eval()(x))


def test_recover_takes_the_run_itself_and_goes_on_from_its_checkpoint(searched, tmp_path):
    common = ("recover", searched[0], "--model", MODEL, "--data", DATA, "--steps", 4, "--distill", "logits")
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file in files:
        assert "4 steps" in ok(*common, "--output", file, "--checkpoint", tmp_path / "state")
    one, two = (autoprune.load(file, load_model(MODEL)).state_dict() for file in files)
    assert all(torch.equal(one[name], two[name]) for name in one)
    told = error(*common, "--output", files[0], "--train", "half")
    assert "train must be one of ['all', 'norm+bias', 'lora'], got 'half'" in told
    export = ("export", files[0], "--model", MODEL, "--output", tmp_path / "x.pt2", "--input-shape", "2,1,4,4")
    told = error(*export, "--trial", 1)
    assert "--trial and --budget choose from the --run-dir of a search" in told


def test_build_exports_by_the_ending_or_the_format(searched, tmp_path):
    small = tmp_path / "small.pt2"
    output = ok("build", searched[0], "--model", MODEL, "--output", small, "--input-shape", "2,1,4,4")
    assert "any batch; its outputs differ from the model's by up to 0" in output
    assert f"in Python: torch.export.load({str(small)!r}).module()" in output
    x = torch.randn(5, 1, 4, 4)
    expected = autoprune.SearchResult.load(searched[0], load_model(MODEL)).build().eval()(x)
    torch.testing.assert_close(torch.export.load(small).module()(x), expected)
    told = error("build", searched[0], "--model", MODEL, "--output", small, "--format", "tflite")
    assert "format must be one of ['safetensors', 'onnx', 'torch', 'hf'], got 'tflite'" in told
