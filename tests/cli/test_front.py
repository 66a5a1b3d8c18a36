"""Fronts of searches that are finished, killed or still running, printed from their folder."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import autoprune
from autoprune.journal.journal import Journal
from autoprune.metrics.statistics import evaluations_of
from autoprune.protocols import Failure
from autoprune.result import SearchResult
from tests.cli.commands import SEARCH, error, ok, run


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


def test_the_journal_of_a_finished_search_gives_its_front(searched, tmp_path):
    shutil.copy(searched[0] / "journal.sqlite", tmp_path)
    saved, read = autoprune.SearchResult.load(searched[0]), SearchResult.from_journal(tmp_path)
    assert [(t.id, t.costs, t.decoded) for t in read.front] == [(t.id, t.costs, t.decoded) for t in saved.front]
    assert [t.score for t in read.front] == pytest.approx([t.score for t in saved.front])
    assert read.best().id == saved.best().id
    assert (read.limits, read.budget, read.metric, read.seed) == (saved.limits, saved.budget, saved.metric, saved.seed)
    assert read.stopped == "trials"


def test_front_of_a_killed_search_leaves_out_what_is_pending(journal_only):
    run_dir, pending = journal_only
    printed = ok("front", run_dir)
    total = len(SearchResult.from_journal(run_dir).trials)
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
    monkeypatch.setattr("autoprune.cli.front._WATCH_SECONDS", 0.05)
    printed = ok("front", journal_only[0], "--watch")
    assert "1 pending" in printed


def test_a_torn_result_does_not_hide_a_good_journal(journal_only, caplog):
    run_dir, _ = journal_only
    (run_dir / "result.json").write_text('{"format": "autoprune-result", "tri')
    finished = run("front", run_dir)
    assert finished.exit_code == 0
    assert "1 pending" in finished.stdout
    assert "result.json is not a result of autoprune, or is damaged" in caplog.text
    assert "this is read from the journal next to it" in " ".join(finished.stdout.split())


@pytest.mark.slow
def test_a_running_search_under_two_budgets_can_be_watched_and_ctrl_c_saves_what_it_found(tmp_path):
    # Where tests run in the background, SIGINT is ignored, and Python leaves it so unless it is told otherwise.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from autoprune.cli.app import app; app()"
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
