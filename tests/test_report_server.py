"""The report of a search that runs: who may see it, and what it says when the search or its file does not go on."""

import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

import autoprune
from autoprune.journal.journal import Journal
from autoprune.journal.sqlite_file import acquire
from autoprune.metrics.statistics import Evaluation
from autoprune.protocols import Measurement
from autoprune.result.report import snapshots
from autoprune.result.report.server import ReportServer
from tests.browser import Browser, why_no_browser
from tests.reporting import Page, made

SAMPLES = np.linspace(0.0, 1.0, 8)


def written(journal, trials, first=0):
    """Record trials of a made result, each with the same samples."""
    for trial in trials[first:]:
        costs = {name: np.array([value]) for name, value in trial.costs.items()}
        (number,) = journal.record_ask(np.array([trial.candidate]), costs)
        outcome = Measurement(signal=SAMPLES, metric=SAMPLES, seconds=0.1)
        journal.record_evaluation(number, outcome, (Evaluation.of(outcome),))
        journal.record_tell([number])


@pytest.fixture
def quick_looks(monkeypatch):
    monkeypatch.setattr(snapshots, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(snapshots, "_SLOW_SECONDS", 0.2)


@pytest.fixture
def result():
    return made(trials=12)


@pytest.fixture
def journal(result, tmp_path):
    """The journal of a search that has evaluated three of its trials, open for writing."""
    meta = {
        "space": result.space.to_json(),
        "limits": dict(result.limits),
        "dense": result.dense.to_json(),
        "budget": result.budget,
        "metric": result.metric,
        "higher_is_better": True,
        "notes": [],
        "trials": len(result.trials),
        "seed": 0,
        "outline": json.loads(json.dumps(result.outline.to_json())),
    }
    with Journal.create(tmp_path, meta) as found:
        written(found, result.trials[:3])
        yield found


@pytest.fixture
def server(journal, quick_looks, tmp_path):
    with ReportServer(tmp_path) as found:
        yield found


def ask(server, path=None, **headers):
    """Status, headers and body of an answer; by default of the page."""
    address = urlsplit(server.url)
    with closing(http.client.HTTPConnection(address.hostname, address.port, timeout=10)) as connection:
        connection.request("GET", address.path if path is None else path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def data(server, **headers):
    return ask(server, f"{urlsplit(server.url).path}data", **headers)


def until(server, holds, seconds=20):
    """Headers and data of the first answer for which `holds` is true."""
    end = time.monotonic() + seconds
    while True:
        _, headers, body = data(server)
        if holds(headers, json.loads(body)):
            return headers, json.loads(body)
        assert time.monotonic() < end, (headers["X-Kind"], unquote(headers["X-State"]))
        time.sleep(0.05)


class TestTheServer:
    def test_it_gives_the_page_of_the_journal_at_its_address(self, server):
        status, headers, body = ask(server)
        page = Page(body.decode())
        assert (status, headers["Cache-Control"]) == (200, "no-store")
        assert page.data["data-head"]["trials"] == 3
        assert dict(page.tags)["body"] == {"data-live": "data"}
        policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
        assert "default-src 'none'" in policy
        assert policy.endswith("connect-src 'self'")

    @pytest.mark.parametrize("host", ["attacker.example", "attacker.example:80", "127.0.0.1", "127.0.0.1:1", ""])
    def test_a_foreign_host_is_refused(self, server, host):
        status, _, body = ask(server, Host=host)
        assert status == 403
        assert b"trial" not in body

    def test_localhost_is_its_name_too(self, server):
        assert ask(server, Host=f"localhost:{urlsplit(server.url).port}")[0] == 200

    @pytest.mark.parametrize("path", ["/", "/data", "/wrong/", "/wrong/data", "/../", "{path}other", "//", "/%C3%A9/"])
    def test_other_addresses_hold_nothing(self, server, path):
        status, _, body = ask(server, path.format(path=urlsplit(server.url).path))
        assert (status, b"layer" in body) == (404, False)

    def test_it_listens_to_this_machine_alone(self, server):
        assert server.url.startswith("http://127.0.0.1:")
        assert server._server.server_address[0] == "127.0.0.1"

    def test_two_servers_have_other_tokens(self, server, tmp_path):
        with ReportServer(tmp_path) as other:
            assert urlsplit(other.url).path != urlsplit(server.url).path

    def test_what_did_not_change_is_not_sent_again(self, server):
        version = data(server)[1]["ETag"]
        status, headers, body = data(server, **{"If-None-Match": version})
        assert (status, body, headers["ETag"]) == (304, b"", version)

    def test_only_reading_is_allowed(self, server):
        address = urlsplit(server.url)
        with closing(http.client.HTTPConnection(address.hostname, address.port, timeout=10)) as connection:
            connection.request("POST", address.path, body=b"x")
            assert connection.getresponse().status == 501


class TestTheJournal:
    def test_new_trials_appear_for_two_viewers(self, server, journal, result):
        before = data(server)[1]["ETag"]
        written(journal, result.trials, first=3)
        found = []
        viewers = [
            threading.Thread(target=lambda: found.append(until(server, lambda h, d: d["head"]["trials"] == 12)))
            for _ in range(2)
        ]
        for viewer in viewers:
            viewer.start()
        for viewer in viewers:
            viewer.join()
        (one, first), (two, second) = found
        assert first == second
        assert one["ETag"] == two["ETag"] != before
        assert one["X-Kind"] == "running"

    def test_a_search_that_was_killed_is_told_as_such(self, server, journal):
        journal._lock.close()  # as the system does when a process dies
        headers, _ = until(server, lambda h, d: h["X-Kind"] == "killed")
        assert "it was killed after 3 trials" in unquote(headers["X-State"])

    def test_a_search_that_ended_and_saved_is_told_as_such(self, server, journal, tmp_path):
        (tmp_path / "result.json").write_text("{}")
        journal._lock.close()
        headers, _ = until(server, lambda h, d: h["X-Kind"] == "ended")
        assert "autoprune report writes the page" in unquote(headers["X-State"])

    def test_while_another_program_holds_a_lock_it_shows_the_last_state(self, journal, quick_looks, tmp_path):
        journal.close()
        path = tmp_path / "journal.sqlite"
        with closing(acquire(path)), ReportServer(tmp_path) as server:  # as if the search went on
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("PRAGMA locking_mode=EXCLUSIVE")
                other.execute("BEGIN IMMEDIATE")
                other.execute("UPDATE meta SET value = value")
                path.touch()
                headers, body = until(server, lambda h, d: h["X-Kind"] == "locked")
                assert "another program holds a lock" in unquote(headers["X-State"])
                assert body["head"]["trials"] == 3
            until(server, lambda h, d: h["X-Kind"] == "running")

    def test_a_journal_that_is_damaged_or_deleted_meanwhile_leaves_the_last_state(self, server, journal, tmp_path):
        journal.close()
        (tmp_path / "journal.sqlite").write_bytes(b"x" * 5000)
        headers, body = until(server, lambda h, d: h["X-Kind"] == "lost")
        assert body["head"]["trials"] == 3
        assert "this is the state of" in unquote(headers["X-State"])
        (tmp_path / "journal.sqlite").unlink()
        until(server, lambda h, d: h["X-Kind"] == "lost" and "no journal.sqlite" in unquote(h["X-State"]))

    def test_a_folder_without_a_journal_is_refused_before_anything_is_served(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no journal\.sqlite there"):
            ReportServer(tmp_path)

    def test_nothing_is_left_in_the_folder(self, server, tmp_path):
        before = {p.name for p in tmp_path.iterdir()}
        ask(server)
        assert {p.name for p in tmp_path.iterdir()} == before


SEARCH = """
import sys, torch
import autoprune
from zoo import ZOO

data = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
execution = autoprune.Execution(run_dir=sys.argv[1])
autoprune.search(ZOO["resnet20"].build(), "flops <= 80%", data, trials=100_000, optimizer="random", execution=execution)
"""

COMMAND = """
import signal
from autoprune.cli.app import app

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; tests in the background ignore it
app()
"""


@contextmanager
def program(*command):
    """A process of Python that has ended when the block has."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_the_command_follows_a_search_that_runs_until_it_is_killed(tmp_path):
    with program("-c", SEARCH, str(tmp_path)) as search:
        while not (tmp_path / "journal.sqlite").exists():
            assert search.poll() is None, search.stderr.read()
            time.sleep(0.1)
        with program("-c", COMMAND, "report", str(tmp_path), "--watch") as command:
            watch = SimpleNamespace(url=command.stdout.readline().removeprefix("report at ").strip())
            headers, first = until(watch, lambda h, d: d["head"]["trials"] >= 2, seconds=60)
            assert headers["X-Kind"] == "running"
            assert ask(watch, Host="attacker.example")[0] == 403
            until(watch, lambda h, d: d["head"]["trials"] > first["head"]["trials"], seconds=60)
            search.kill()
            search.wait()
            killed, last = until(watch, lambda h, d: h["X-Kind"] == "killed", seconds=60)
            another, seen = until(watch, lambda h, d: True)
            assert (another["ETag"], seen) == (killed["ETag"], last)
            assert Page(ask(watch)[2].decode()).data["data-head"] == last["head"]
            assert last["head"]["trials"] == len(autoprune.SearchResult.from_journal(tmp_path).trials)
            command.send_signal(signal.SIGINT)
            assert command.wait(timeout=60) == 0
            assert command.stderr.read() == ""


@pytest.mark.slow
@pytest.mark.skipif(bool(why_no_browser()), reason=why_no_browser() or "there is one")
def test_a_page_that_is_open_follows_the_search_and_keeps_what_was_chosen(server, journal, result, tmp_path):
    with Browser(tmp_path) as page:
        page.open(server.url)
        page.wait("document.getElementById('state').dataset.kind === 'running'")
        page.run("document.getElementById('row-1').click()")
        written(journal, result.trials[:11], first=3)
        page.wait("/^11 trials/.test(document.getElementById('summary').textContent)")
        assert page.find("#candidate-title").text == "Trial 1"
        assert page.find("#count").text.startswith("11 of 11 trials")
        assert {urlsplit(url).path for url in page.requests()} == {f"{urlsplit(server.url).path}data"}
        journal._lock.close()
        page.wait("document.getElementById('state').dataset.kind === 'killed'")
        server.close()
        page.wait("document.getElementById('state').dataset.kind === 'lost'")
        assert page.find("#candidate-title").text == "Trial 1"


def test_the_journal_of_the_test_is_one_of_a_search(journal, tmp_path, result):
    found = autoprune.SearchResult.from_journal(tmp_path)
    assert [t.candidate for t in found.trials] == [t.candidate for t in result.trials[:3]]
    assert found.outline == result.outline
