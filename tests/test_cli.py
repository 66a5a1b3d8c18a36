"""The command line: from a search to a loaded model, journals alone, and what mistakes look like."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

import autoprune
from autoprune.cli import app
from autoprune.journal import Journal
from autoprune.loading import load_model, load_object
from autoprune.protocols import Failure
from autoprune.result.from_journal import result_from_journal
from autoprune.statistics import evaluations_of
from tests.machine import Machine

CODE = """
import autoprune
import torch
from torch import nn

def build(width=16):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3),
    )
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model

def load():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(120, 1, 4, 4, generator=generator)
    return x, x.mean((1, 2, 3)).mul(4).round().clamp(-1, 1).long() + 1

def noise():
    return torch.ones(2, 1, 4, 4)

def wide(width):
    return build(width)

def broken():
    raise ValueError("a bug of the user")

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 4, C // 4).permute(2, 0, 3, 1, 4)
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))

def tied():
    return nn.Sequential(nn.Linear(6, 16), Tied(), nn.Linear(16, 3))

model = build(4)
coarse = autoprune.Channels(options=(1.0, 0.5))
"""
MODEL, DATA = "cli_example.py:build", "cli_example.py:load"
SEARCH = ("search", MODEL, "--data", DATA, "--budget", "flops <= 60%", "--trials", "12", "--optimizer", "random")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: object) -> str:
    found = run(*arguments)
    assert found.exit_code == 0, found.output
    return found.stdout


def error(*arguments: object) -> str:
    found = run(*arguments)
    assert (found.exit_code, found.stdout) == (2, ""), found.output
    *before, last = found.stderr.splitlines()
    assert not any(line.startswith(("error", "Traceback")) for line in before)
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_example.py").write_text(CODE)
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def searched(folder):
    """A finished search and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        return folder / "runs" / "a", ok(*SEARCH, "--run-dir", "runs/a", "--round-to", 2, "--ignore", "8")


@pytest.fixture
def journal_only(searched, tmp_path):
    """The run as a kill in the middle of the last trial on the front leaves it, and the id of that trial."""
    shutil.copy(searched[0] / "journal.sqlite", tmp_path)
    trial = autoprune.SearchResult.load(searched[0]).front[-1].id
    with sqlite3.connect(tmp_path / "journal.sqlite") as connection:
        connection.execute("DELETE FROM tells WHERE trial = ?", (trial,))
        connection.execute("DELETE FROM evaluations WHERE trial = ?", (trial,))
        connection.execute("UPDATE trials SET status = 'pending' WHERE id = ?", (trial,))
    connection.close()
    return tmp_path, trial


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


def test_front_prints_the_saved_result(searched):
    assert ok("front", searched[0]).strip() == str(autoprune.SearchResult.load(searched[0]))


def test_front_as_json_holds_the_front_and_counts_the_rest(searched):
    found = json.loads(ok("front", searched[0], "--json"))
    result = autoprune.SearchResult.load(searched[0])
    assert found["front"] == [trial.to_json() for trial in result.front]
    assert found["trials"] == {"ok": len(result.trials), "raced": 0, "failed": 0, "pending": 0}
    assert found["limits"] == result.limits


@pytest.mark.slow
def test_front_draws_a_picture_where_told(searched, tmp_path):
    ok("front", searched[0], "--plot", tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "png" in error("front", searched[0], "--plot", tmp_path / "front.xyz")
    assert "make the folder first" in error("front", searched[0], "--plot", tmp_path / "missing" / "front.png")


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


def test_the_journal_of_a_finished_search_gives_its_front(searched, tmp_path):
    shutil.copy(searched[0] / "journal.sqlite", tmp_path)
    saved, read = autoprune.SearchResult.load(searched[0]), result_from_journal(tmp_path)
    assert [(t.id, t.costs, t.decoded) for t in read.front] == [(t.id, t.costs, t.decoded) for t in saved.front]
    assert [t.score for t in read.front] == pytest.approx([t.score for t in saved.front])
    assert read.best().id == saved.best().id
    assert (read.limits, read.budget, read.metric, read.seed) == (saved.limits, saved.budget, saved.metric, saved.seed)
    assert read.stopped == "trials"


def test_front_of_a_killed_search_leaves_out_what_is_pending(journal_only):
    run_dir, pending = journal_only
    printed = ok("front", run_dir)
    total = len(result_from_journal(run_dir).trials)
    assert f"{total - 1} of 12 trials finished, 1 pending" in printed
    found = json.loads(ok("front", run_dir, "--json"))
    assert found["trials"] == {"ok": total - 1, "raced": 0, "failed": 0, "pending": 1}
    assert found["front"]
    assert pending not in [trial["id"] for trial in found["front"]]
    assert found["stopped"] == "unfinished"


@pytest.mark.slow
def test_a_front_is_watched_until_the_search_has_all_its_trials(journal_only):
    run_dir, pending = journal_only

    def finish():
        time.sleep(0.5)
        with Journal.resume(run_dir) as journal:
            outcome = Failure("out of memory")
            journal.record_evaluation(pending, outcome, evaluations_of(outcome))

    search = threading.Thread(target=finish)
    search.start()
    printed = ok("front", run_dir, "--watch")
    search.join()
    assert printed.count("trials finished") == 1
    assert "0 pending" in printed


@pytest.mark.slow
def test_watching_a_killed_search_ends(journal_only, monkeypatch):
    monkeypatch.setattr("autoprune.cli._WATCH_SECONDS", 0.05)
    printed = ok("front", journal_only[0], "--watch")
    assert "1 pending" in printed


def test_a_torn_result_does_not_hide_a_good_journal(journal_only):
    run_dir, _ = journal_only
    (run_dir / "result.json").write_text('{"format": "autoprune-result", "tri')
    finished = run("front", run_dir)
    assert finished.exit_code == 0
    assert "1 pending" in finished.stdout
    assert "result.json is not a result of autoprune, or is damaged" in finished.stderr
    assert "the journal next to it may be whole" in finished.stderr


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
    assert more.trials[:10] == resumed.trials[:10]


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
        (("--workers", "2"), ["--executor ray", "local"]),
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
def test_a_running_search_under_two_budgets_can_be_watched_and_ctrl_c_saves_what_it_found(tmp_path):
    # Where tests run in the background, SIGINT is ignored, and Python leaves it so unless it is told otherwise.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from autoprune.cli import app; app()"
    )
    command = [sys.executable, "-c", code, *SEARCH, "--budget", "params <= 90%"]
    # An optimizer that takes its time, because others may have been through the whole space by the time of the signal.
    command += ["--run-dir", str(tmp_path / "run"), "--trials", "100000", "--optimizer", "bayes"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_trials(tmp_path / "run", 5, process)
        watched = json.loads(ok("front", tmp_path / "run", "--json"))
        process.send_signal(signal.SIGINT)
        printed, problems = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 130, problems
    assert watched["trials"]["ok"] >= 5
    assert watched["front"]
    result = autoprune.SearchResult.load(tmp_path / "run")
    assert (result.stopped, set(result.limits)) == ("interrupted", {"flops", "params"})
    assert len(result.trials) >= watched["trials"]["ok"]
    assert str(result) in printed


def wait_for_trials(run_dir, count, process):
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        if (run_dir / "journal.sqlite").exists() and (run_dir / "journal.sqlite").stat().st_size:
            with Journal.open(run_dir) as journal:
                if sum(trial.status == "ok" for trial in journal.trials()) >= count:
                    return
        time.sleep(0.1)
    raise AssertionError("the search finished no trials within three minutes")


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
    before = sorted(Path().iterdir())
    refused = run("profile", MODEL, "--input-shape", "2,1,4,4", "--output", "table.json", option, value)
    assert refused.exit_code == 2
    assert said in refused.output
    assert [path for path in sorted(Path().iterdir()) if path.name != "__pycache__"] == before


@pytest.mark.slow
def test_profile_writes_a_table_that_search_takes(monkeypatch):
    monkeypatch.setattr("autoprune.costs.profiling.profile.clock_for", lambda *_: Machine())
    monkeypatch.setattr("autoprune.verify.clock_for", lambda *_: Machine())
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
