"""Journals that others lock, move, damage or trap, and readers that leave no trace."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from autoprune.errors import FileFormatError
from autoprune.journal.journal import Journal
from autoprune.journal.sqlite_file import FILE_NAME, LOCK_NAME, patiently
from autoprune.metrics.statistics import evaluations_of
from autoprune.protocols import Measurement
from autoprune.result import SearchResult
from tests.searching import Watched, quick, seen

CANDIDATES = np.array([[0, 2, 1], [4, 0, 0]], dtype=np.int64)
COSTS = {"flops": np.array([10.0, 8.0])}


def measurement(value=1.0):
    return Measurement(np.full(4, value), np.ones(4), seconds=0.1)


def record(journal, trials=2):
    """Ask for two trials at a time, and record what they score."""
    for _ in range(trials // 2):
        for trial in journal.record_ask(CANDIDATES, COSTS):
            outcome = measurement(trial)
            journal.record_evaluation(trial, outcome, evaluations_of(outcome))
            journal.record_tell([trial])


@pytest.fixture
def written(tmp_path):
    """A folder with a finished journal."""
    with Journal.create(tmp_path / "run", {"seed": 3}) as journal:
        record(journal)
    return tmp_path / "run"


def files(folder):
    return {path.name for path in folder.iterdir()}


class TestReaders:
    def test_leave_no_file_behind(self, written):
        before = files(written)
        with Journal.open(written) as journal:
            assert len(journal.trials()) == 2
            assert files(written) == before
        assert files(written) == before

    def test_see_what_a_killed_search_left_in_its_log_even_where_the_shared_file_is_missing(self, tmp_path):
        with Journal.create(tmp_path / "run", {}) as journal:
            record(journal)
            shutil.copytree(tmp_path / "run", tmp_path / "copy")  # as a kill leaves it
        (tmp_path / "copy" / f"{FILE_NAME}-shm").unlink()
        before = files(tmp_path / "copy")
        assert f"{FILE_NAME}-wal" in before
        with Journal.open(tmp_path / "copy") as journal:
            assert [trial.status for trial in journal.trials()] == ["ok", "ok"]
        assert files(tmp_path / "copy") == before

    @pytest.mark.skipif(os.name != "posix" or not hasattr(os, "fork"), reason="changes the user of a child")
    @pytest.mark.parametrize("killed", [False, True])
    def test_need_no_right_to_write(self, tmp_path, killed):
        tmp_path.chmod(0o755)
        with Journal.create(tmp_path / "run", {}) as journal:
            record(journal)
            shutil.copytree(tmp_path / "run", tmp_path / "copy")
        folder = tmp_path / ("copy" if killed else "run")
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
        for parent in folder.parents[: len(tmp_path.parts) - 2]:
            parent.chmod(parent.stat().st_mode | 0o555)
        before = files(folder)
        context = multiprocessing.get_context("fork")
        results = context.Queue()

        def read():
            if os.getuid() == 0:
                os.setuid(65534)
            try:
                with Journal.open(folder) as journal:
                    results.put([trial.status for trial in journal.trials()])
            except Exception as error:  # whatever it is, the parent shows it
                results.put(repr(error))

        child = context.Process(target=read)
        child.start()
        found = results.get(timeout=60)
        child.join()
        results.close()
        results.join_thread()
        folder.chmod(0o755)
        assert found == ["ok", "ok"]
        assert files(folder) == before

    def test_do_not_keep_a_search_from_beginning(self, written):
        stop = threading.Event()

        def read():
            while not stop.is_set():
                Journal.open(written).close()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for _ in range(10):
                Journal.resume(written).close()
        finally:
            stop.set()
            reader.join()


class TestLocks:
    @pytest.mark.slow
    def test_one_of_another_program_is_waited_for_with_a_line_in_the_log(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr("autoprune.journal.sqlite_file.BUSY_SECONDS", 0.05)
        with Journal.create(tmp_path, {}) as journal:
            other = sqlite3.connect(tmp_path / FILE_NAME, check_same_thread=False)
            other.execute("BEGIN IMMEDIATE")
            release = threading.Timer(1.0, other.rollback)
            release.start()
            began = time.monotonic()
            with caplog.at_level(logging.WARNING, "autoprune"):
                record(journal)
            assert time.monotonic() - began > 0.9
            assert caplog.text.count("another program holds a lock on") == 1
            assert [trial.status for trial in journal.trials()] == ["ok", "ok"]
            release.join()
            other.close()

    @pytest.mark.slow
    def test_one_that_is_never_released_ends_in_a_sentence(self, tmp_path):
        def locked():
            connection = sqlite3.connect(tmp_path / "a", timeout=0)
            try:
                connection.execute("BEGIN EXCLUSIVE")
            finally:
                connection.close()

        holder = sqlite3.connect(tmp_path / "a")
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(
            OSError, match=r"run_dir must not be locked, but another program has held a lock on .* for 0 s"
        ):
            patiently(locked, tmp_path / "a", most_seconds=0.1)
        holder.close()

    @pytest.mark.slow
    def test_of_two_searches_that_begin_at_once_in_one_folder_one_is_refused_and_nothing_is_lost(self, tmp_path):
        script = (
            "import sys, numpy as np\n"
            "from autoprune.journal.journal import Journal\n"
            "sys.stdin.readline()\n"
            "try:\n"
            "    journal = Journal.create(sys.argv[1], {'who': int(sys.argv[2])})\n"
            "    journal.record_ask(np.zeros((1, 2), dtype=np.int64), {})\n"
            "    journal.close()\n"
            "    print('made')\n"
            "except (FileExistsError, BlockingIOError):\n"
            "    print('refused')\n"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        racers = [subprocess.Popen([sys.executable, "-c", script, tmp_path / "run", str(i)], **pipes) for i in range(3)]
        told = [racer.communicate("go\n")[0].strip() for racer in racers]
        assert sorted(told) == ["made", "refused", "refused"]
        with Journal.open(tmp_path / "run") as journal:
            assert journal.meta()["who"] == told.index("made")
            assert len(journal.trials()) == 1

    def test_a_journal_made_between_look_and_lock_is_not_overwritten(self, tmp_path, monkeypatch):
        from autoprune.journal import sqlite_file as journal_file

        acquire = journal_file.acquire

        def after_another(path):
            monkeypatch.setattr(journal_file, "acquire", acquire)
            with Journal.create(tmp_path, {"who": "the other"}):
                pass
            return acquire(path)

        monkeypatch.setattr(journal_file, "acquire", after_another)
        with pytest.raises(FileExistsError, match="already holds a journal"):
            Journal.create(tmp_path, {"who": "this one"})
        with Journal.open(tmp_path) as journal:
            assert journal.meta() == {"who": "the other"}

    def test_a_fifo_in_the_place_of_the_lock_does_not_hang(self, tmp_path, written):
        (written / LOCK_NAME).unlink()
        os.mkfifo(written / LOCK_NAME)
        Journal.open(written).close()
        with pytest.raises(OSError, match="run_dir must be"):
            Journal.create(written, {})


def delete(folder):
    shutil.rmtree(folder)


def move(folder):
    folder.rename(folder.with_name("elsewhere"))


def replace_by_another(folder):
    with Journal.create(folder.with_name("other"), {"seed": 4}) as journal:
        record(journal, 20)
    os.replace(folder.with_name("other") / FILE_NAME, folder / FILE_NAME)


def write_over(folder):
    (folder / FILE_NAME).write_bytes(b"my notes " * 10_000)


def copy_over(folder):
    with Journal.create(folder.with_name("other"), {"seed": 4}) as journal:
        record(journal, 20)
    (folder / FILE_NAME).write_bytes((folder.with_name("other") / FILE_NAME).read_bytes())


def empty(folder):
    os.truncate(folder / FILE_NAME, 0)


HARM = {
    "deleted": (delete, "was deleted or moved"),
    "moved": (move, "was deleted or moved"),
    "replaced": (replace_by_another, "was replaced by another file"),
    "written over": (write_over, "was overwritten"),
    "another copied over it": (copy_over, "was overwritten"),
    "emptied": (empty, "was overwritten"),
}


class TestHarmDuringASearch:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", HARM)
    def test_it_is_noticed_at_once_said_loudly_and_nothing_found_is_lost(self, name, tmp_path, mlp, vectors, caplog):
        harm, told = HARM[name]
        options = {"trials": 12, "optimizer": "random"}
        alone = quick(mlp, "flops <= 60%", vectors, evaluator=Watched(), **options)
        after = []

        def harm_once(count):
            if count == 4:
                harm(tmp_path / "run")
            after.append("journal" in caplog.text)

        with caplog.at_level(logging.ERROR, "autoprune"):
            result = quick(
                mlp, "flops <= 60%", vectors, evaluator=Watched(harm_once), run_dir=str(tmp_path / "run"), **options
            )
        assert seen(result) == seen(alone)
        (note,) = (note for note in result.notes if note.startswith("the journal "))
        assert f"{told} while the search was writing it" in note
        assert note in caplog.text
        assert after.index(True) <= 6
        assert len(result.trials) == 12

    @pytest.mark.slow
    def test_a_race_goes_on_without_the_values_that_are_lost(self, tmp_path, mlp, vectors):
        def harm_once(count):
            if count == 6:
                write_over(tmp_path / "run")

        result = quick(
            mlp,
            "flops <= 60%",
            vectors,
            trials=20,
            early_stopping=True,
            evaluator=Watched(harm_once),
            run_dir=str(tmp_path / "run"),
        )
        assert [trial.id for trial in result.trials] == list(range(20))

    def test_a_checkpoint_of_another_program_is_no_harm(self, tmp_path):
        with Journal.create(tmp_path, {"seed": 3}) as journal:
            record(journal)
            other = sqlite3.connect(tmp_path / FILE_NAME)
            other.execute("PRAGMA wal_checkpoint(FULL)")
            other.close()
            record(journal)
            assert journal.notes == ()
        with Journal.open(tmp_path) as journal:
            assert len(journal.trials()) == 4


def run_sql(folder, script):
    connection = sqlite3.connect(folder / FILE_NAME)
    connection.executescript(script)
    connection.close()


TRAPS = {
    "a view that never ends": (
        "DROP TABLE evaluations; CREATE VIEW evaluations AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 "
        "FROM n) SELECT id, 0 AS trial FROM n"
    ),
    "a trigger": "CREATE TRIGGER trap AFTER INSERT ON trials BEGIN DELETE FROM evaluations; END",
    "a view more": "CREATE VIEW more AS SELECT 1",
    "a table less": "DROP TABLE tells",
    "other columns": "ALTER TABLE trials ADD COLUMN more TEXT",
}
DAMAGE = {
    "a candidate that is no list": "UPDATE trials SET candidate = '7'",
    "a candidate that is no JSON": "UPDATE trials SET candidate = '[1,'",
    "a candidate nested deeply": f"UPDATE trials SET candidate = '{'[' * 100_000}'",
    "a candidate of texts": """UPDATE trials SET candidate = '["1"]'""",
    "costs that are no object": "UPDATE trials SET costs = '[]'",
    "costs of infinity": """UPDATE trials SET costs = '{"flops": Infinity}'""",
    "a number that is text": "UPDATE trials SET ask = 'first'",
    "text that is a number": "UPDATE evaluations SET seconds = 'long'",
    "a blob in the place of text": "UPDATE evaluations SET worker = x'ff'",
    "no valid text": "UPDATE trials SET reason = CAST(x'ff' AS TEXT)",
    "infinity": "UPDATE evaluations SET signal = 9e999",
}


class TestHostileFiles:
    @pytest.mark.parametrize("name", TRAPS)
    def test_what_no_journal_defines_is_refused_before_it_runs(self, name, written):
        run_sql(written, TRAPS[name])
        began = time.monotonic()
        with pytest.raises(
            FileFormatError, match=r"has another (view|trigger|table) .* than a journal has: drop|lacks the"
        ):
            Journal.open(written)
        assert time.monotonic() - began < 5

    @pytest.mark.parametrize("name", DAMAGE)
    def test_damaged_rows_are_named_with_the_file(self, name, written):
        run_sql(written, DAMAGE[name])
        with Journal.open(written) as journal:
            with pytest.raises(
                FileFormatError, match=r"run_dir must hold a journal .*journal.sqlite is damaged"
            ) as caught:
                journal.trials()
            assert len(str(caught.value)) <= 500

    @pytest.mark.parametrize("value", ["[", "NaN", "[" * 100_000])
    def test_damaged_facts_about_the_run_are_named_with_the_file(self, written, value):
        run_sql(written, f"UPDATE meta SET value = '{value}'")
        with Journal.open(written) as journal, pytest.raises(FileFormatError, match="is damaged"):
            journal.meta()

    @pytest.mark.parametrize("kind", ["FIFO", "device"])
    def test_what_is_no_file_is_not_opened(self, tmp_path, kind):
        os.mkfifo(tmp_path / FILE_NAME) if kind == "FIFO" else (tmp_path / FILE_NAME).symlink_to("/dev/zero")
        with pytest.raises(FileFormatError, match=f"run_dir must hold a journal of autoprune, got .*: it is a {kind}"):
            Journal.open(tmp_path)

    def test_a_journal_of_no_search_gives_no_result(self, written):
        with pytest.raises(FileFormatError, match=r"journal.sqlite is damaged: 'space' is missing; name another"):
            SearchResult.from_journal(written)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("space", {"type": "channels"}),
            ("limits", {"watts": 1.0}),
            ("dense", {}),
            ("trials", "many"),
            ("budget", "half"),
            ("notes", 3),
            ("seed", None),
        ],
    )
    def test_a_result_is_not_read_from_facts_that_do_not_fit(self, tmp_path, mlp, vectors, key, value):
        quick(mlp, "flops <= 60%", vectors, trials=2, run_dir=str(tmp_path))
        assert len(SearchResult.from_journal(tmp_path).trials) == 2
        connection = sqlite3.connect(tmp_path / FILE_NAME)
        with connection:
            connection.execute("UPDATE meta SET value = ? WHERE key = ?", (json.dumps(value), key))
        connection.close()
        with pytest.raises(FileFormatError, match=r"journal.sqlite is damaged"):
            SearchResult.from_journal(tmp_path)


@pytest.mark.slow
def test_a_killed_search_is_read_without_a_trace(tmp_path):
    script = (
        "import sys, time, numpy as np\n"
        "from autoprune.journal.journal import Journal\n"
        "journal = Journal.create(sys.argv[1], {})\n"
        "journal.record_ask(np.zeros((3, 2), dtype=np.int64), {})\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    with Journal.open(tmp_path) as journal:
        assert len(journal.trials()) == 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    before = files(tmp_path)
    with Journal.open(tmp_path) as journal:
        assert len(journal.trials()) == 3
    assert files(tmp_path) == before
