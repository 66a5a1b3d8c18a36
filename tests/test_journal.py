import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from autoprune.errors import FileFormatError
from autoprune.journal.journal import Journal
from autoprune.journal.sqlite_file import APPLICATION_ID, FILE_NAME, SCHEMA, SCHEMA_VERSION
from autoprune.metrics.statistics import evaluations_of
from autoprune.protocols import Failure, Measurement

META = {"space": "channels", "limits": {"flops": 12.5}, "seed": 3, "versions": ["torch 2.13"]}
CANDIDATES = np.array([[0, 2, 1], [4, 0, 0]], dtype=np.int64)
COSTS = {"flops": np.array([10.0, 8.0]), "params": np.array([5.0, 7.5])}


def measurement(n=4):
    """Values that float32 cannot hold exactly, so that rounding shows."""
    values = np.arange(n) + 0.1
    return Measurement(signal=values, metric=np.float64(values > 1), seconds=0.25)


def scored(outcome, dense=None):
    """An outcome with its statistics, as a search records them."""
    return outcome, evaluations_of(outcome, dense)


@pytest.fixture
def journal(tmp_path):
    with Journal.create(tmp_path, META) as journal:
        yield journal


def test_a_reader_gets_back_what_was_recorded(journal, tmp_path):
    assert journal.record_ask(CANDIDATES, COSTS) == [0, 1]
    assert journal.record_ask(CANDIDATES[:1], {"flops": np.array([1.0])}) == [2]
    journal.record_evaluation(1, *scored(Failure("out of memory", seconds=2.0)), worker="gpu-3")
    journal.record_evaluation(0, *scored(measurement()), started=100.0)

    with Journal.open(tmp_path) as reader:
        assert reader.meta() == META
        ok, failed, pending = reader.trials()
    assert (ok.candidate, ok.costs, ok.ask, ok.status) == ((0, 2, 1), {"flops": 10.0, "params": 5.0}, 0, "ok")
    assert (failed.candidate, failed.status, failed.reason) == ((4, 0, 0), "failed", "out of memory")
    assert (pending.status, pending.ask, pending.evaluations) == ("pending", 1, ())
    (row,) = failed.rows
    assert (row.worker, row.measured.signal, row.measured.samples) == ("gpu-3", None, 0)
    (row,) = ok.rows
    evaluation = row.measured
    assert (row.started, evaluation.seconds, evaluation.samples) == (100.0, 0.25, 4)
    assert evaluation.signal == measurement().signal.mean()
    assert evaluation.metric == 0.75
    assert evaluation.signal_stderr == pytest.approx(np.sqrt(5 / 3) / 2)
    assert (evaluation.distortion, evaluation.signal_change_stderr) == (None, None)


def test_distortion_and_changes_against_the_dense_model_are_kept_as_means_with_standard_errors(journal):
    journal.record_ask(CANDIDATES, COSTS)
    dense = measurement()
    pruned = replace(dense, signal=dense.signal + np.array([1.0, 2.0, 1.0, 2.0]), distortion=np.array([0.5, 1.5]))
    journal.record_evaluation(0, *scored(pruned, dense))
    (evaluation,) = journal.trials()[0].evaluations
    assert (evaluation.distortion, evaluation.distortion_stderr) == (1.0, 0.5)
    assert evaluation.signal_change_stderr == pytest.approx(np.sqrt(1 / 3) / 2)
    assert evaluation.metric_change_stderr == 0.0


@pytest.mark.parametrize("distortion", [[], [np.inf, 1.0], [np.nan]])
def test_a_distortion_without_a_mean_is_null(journal, distortion):
    journal.record_ask(CANDIDATES, COSTS)
    journal.record_evaluation(0, *scored(replace(measurement(), distortion=np.array(distortion))))
    (evaluation,) = journal.trials()[0].evaluations
    assert (evaluation.distortion, evaluation.distortion_stderr) == (None, None)


def test_a_metric_of_the_whole_set_on_one_sample_has_no_standard_error(journal):
    journal.record_ask(CANDIDATES, COSTS)
    journal.record_evaluation(0, *scored(Measurement(np.array([2.0]), np.array([0.75]), seconds=0.0)))
    (evaluation,) = journal.trials()[0].evaluations
    assert (evaluation.signal, evaluation.signal_stderr, evaluation.metric) == (2.0, None, 0.75)


def test_a_journal_in_memory_behaves_the_same_and_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Journal.create(None, META) as journal:
        journal.record_ask(CANDIDATES, COSTS)
        journal.record_evaluation(0, *scored(measurement()))
        journal.record_tell([0])
        assert [trial.status for trial in journal.trials()] == ["ok", "pending"]
    assert list(tmp_path.iterdir()) == []


def test_pandas_and_plain_sql_read_the_file_while_the_search_runs(journal, tmp_path):
    journal.record_ask(CANDIDATES, COSTS)
    journal.record_evaluation(1, *scored(measurement()))
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    query = "SELECT json_extract(costs, '$.flops') AS flops, signals FROM trials JOIN evaluations ON trial = trials.id"
    frame = pd.read_sql(query, connection)
    connection.close()
    assert frame.flops.tolist() == [8.0]
    np.testing.assert_array_equal(np.frombuffer(frame.signals[0], "<f4"), measurement().signal.astype(np.float32))


def test_a_reader_opened_before_sees_later_trials(journal, tmp_path):
    with Journal.open(tmp_path) as reader:
        assert reader.trials() == []
        journal.record_ask(CANDIDATES, COSTS)
        assert len(reader.trials()) == 2


def test_a_reader_cannot_write(journal, tmp_path):
    with Journal.open(tmp_path) as reader, pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.record_ask(CANDIDATES, COSTS)


def test_tells_keep_their_order_and_batches(journal, tmp_path):
    journal.record_ask(np.zeros((4, 3), dtype=np.int64), {})
    journal.record_tell([2, 0])
    journal.record_tell([3])
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    assert connection.execute("SELECT tell, trial FROM tells ORDER BY id").fetchall() == [(0, 2), (0, 0), (1, 3)]
    connection.close()


def test_a_tell_that_doubles_a_trial_is_refused_as_a_whole(journal, tmp_path):
    journal.record_ask(CANDIDATES, COSTS)
    journal.record_tell([0])
    with pytest.raises(sqlite3.IntegrityError):
        journal.record_tell([1, 0])
    journal.record_tell([1])


def test_an_evaluation_of_an_unknown_trial_is_refused(journal):
    with pytest.raises(sqlite3.IntegrityError):
        journal.record_evaluation(0, *scored(measurement()))


WRITER = """
import sys
import threading
import numpy as np
from autoprune.journal.journal import Journal
from autoprune.protocols import Measurement
from autoprune.metrics.statistics import evaluations_of

journal = Journal.create(sys.argv[1], {})
while True:
    candidates = np.random.default_rng(0).integers(9, size=(3, 20))
    for trial in journal.record_ask(candidates, {"flops": np.ones(3)}):
        outcome = Measurement(np.full(256, trial), np.ones(256), seconds=0.0)
        journal.record_evaluation(trial, outcome, evaluations_of(outcome))
        print(trial, flush=True)
"""


@pytest.mark.slow
def test_kill_9_loses_no_trial_reported_as_finished(tmp_path):
    for round_ in range(3):
        run_dir = tmp_path / str(round_)
        process = subprocess.Popen([sys.executable, "-c", WRITER, run_dir], stdout=subprocess.PIPE, text=True)
        reported = [int(process.stdout.readline()) for _ in range(50)]
        time.sleep(0.01 * round_)
        process.send_signal(signal.SIGKILL)
        reported += [int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        process.wait()
        process.stdout.close()
        with Journal.open(run_dir) as journal:
            trials = journal.trials()
        finished = [trial for trial in trials if trial.status == "ok"]
        assert len(trials) % 3 == 0, "an ask is recorded as a whole or not at all"
        assert [trial.id for trial in finished][: len(reported)] == reported
        assert all(trial.evaluations[0].signal == trial.id for trial in finished)


@pytest.mark.slow
def test_ten_thousand_trials_of_a_hundred_dimensions_fit_in_a_tenth_of_the_allowed_space(tmp_path):
    candidates = np.random.default_rng(0).integers(32, size=(10_000, 100))
    with Journal.create(tmp_path, {}) as journal:
        for chunk in np.split(candidates, 100):
            journal.record_ask(chunk, {"flops": np.random.default_rng(0).random(100), "params": np.ones(100)})
    assert (tmp_path / FILE_NAME).stat().st_size < 5e6


class TestBadRunDir:
    def test_a_file_is_refused(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(FileExistsError, match=r"run_dir .*notes.txt is a file; pass another"):
            Journal.create(tmp_path / "notes.txt", META)

    def test_a_folder_that_cannot_be_made_is_refused(self, tmp_path):
        (tmp_path / "notes.txt").touch()
        with pytest.raises(OSError, match=r"run_dir .*written, got .*runs .*pass another"):
            Journal.create(tmp_path / "notes.txt" / "runs", META)

    def test_a_folder_with_a_journal_is_refused_and_the_journal_is_kept(self, journal, tmp_path):
        with pytest.raises(FileExistsError, match=r"run_dir .* already holds a journal.sqlite; pass another run_dir"):
            Journal.create(tmp_path, {})
        assert journal.meta() == META

    def test_a_folder_without_a_journal_cannot_be_read(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"run_dir .* got .*: no journal.sqlite there"):
            Journal.open(tmp_path)

    @pytest.mark.parametrize("content", [b"hello" * 1000, b"SQLite format 3\0" + b"x" * 4000])
    def test_a_damaged_file_is_named(self, tmp_path, content):
        (tmp_path / FILE_NAME).write_bytes(content)
        with pytest.raises(FileFormatError, match=r"run_dir .*journal.sqlite cannot be read"):
            Journal.open(tmp_path)

    def test_a_file_cut_short_is_named(self, tmp_path):
        with Journal.create(tmp_path, META) as journal:
            journal.record_ask(np.zeros((200, 50), dtype=np.int64), {})
        path = tmp_path / FILE_NAME
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(FileFormatError, match="cannot be read"):
            Journal.open(tmp_path)

    @pytest.mark.parametrize(
        ("statement", "problem"),
        [
            ("PRAGMA application_id=7", "another program"),
            ("PRAGMA user_version=99", "has schema 99, and this .* reads"),
        ],
    )
    def test_a_foreign_or_newer_file_is_refused(self, tmp_path, statement, problem):
        Journal.create(tmp_path, META).close()
        connection = sqlite3.connect(tmp_path / FILE_NAME)
        connection.execute(statement)
        connection.close()
        with pytest.raises(FileFormatError, match=f"run_dir must hold a journal of autoprune, but .* {problem}"):
            Journal.open(tmp_path)

    def test_meta_that_is_not_json_fails_before_a_file_is_made(self, tmp_path):
        with pytest.raises(TypeError):
            Journal.create(tmp_path, {"seed": object()})
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_journal_that_is_only_beginning_is_waited_for(tmp_path):
    path = tmp_path / FILE_NAME
    path.touch()  # what a search makes first

    def lay_out():
        connection = sqlite3.connect(path)
        connection.executescript(
            f"BEGIN; PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION}; {SCHEMA} COMMIT"
        )
        connection.close()

    later = threading.Timer(0.3, lay_out)
    later.start()
    with Journal.open(tmp_path) as journal:
        assert journal.trials() == []
    later.join()


class TestTheDocument:
    text = (Path(__file__).parent.parent / "docs" / "journal.md").read_text()

    def test_names_every_table_and_column(self, journal, tmp_path):
        connection = sqlite3.connect(tmp_path / FILE_NAME)
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            (line,) = (line for line in self.text.splitlines() if line.startswith(f"| `{name}` |"))
            for _, column, *_ in connection.execute(f"PRAGMA table_info({name})"):
                assert f"`{column}`" in line
        connection.close()

    def test_shows_a_query_that_pandas_reads(self, journal, tmp_path):
        journal.record_ask(CANDIDATES, COSTS)
        journal.record_evaluation(1, *scored(measurement()), worker="gpu-3")
        (query,) = re.findall(r'"""(.*?)"""', self.text, re.DOTALL)
        connection = sqlite3.connect(tmp_path / FILE_NAME)
        frame = pd.read_sql(query, connection)
        connection.close()
        assert frame.flops.tolist() == [10.0, 8.0]
        assert frame.worker.isna().tolist() == [True, False]
