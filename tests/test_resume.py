"""A search killed at any moment goes on as if nothing had happened."""

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import autoprune
from autoprune.execution import LocalExecutor
from autoprune.journal import journal as journal_module
from autoprune.journal.journal import Journal
from autoprune.journal.sqlite_file import FILE_NAME
from autoprune.optimizers.auto import Auto
from autoprune.protocols import FAILED, OK, Failure
from tests.resuming import TRIALS, Counting, interrupted, make_data, rows, search, seen
from zoo import ZOO


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["random", "nsga2", "level_switch", "bayes", "knapsack", "auto"])
def test_an_interrupted_search_ends_as_the_uninterrupted_one_does(optimizer, tmp_path):
    trials = 20 if optimizer == "bayes" else TRIALS
    whole = search(None, evaluator=Counting(), optimizer=optimizer, trials=trials)
    assert interrupted(tmp_path, 11, optimizer=optimizer, trials=trials).stopped == "interrupted"
    evaluator = Counting()
    resumed = search(tmp_path, True, evaluator=evaluator, optimizer=optimizer, trials=trials)
    assert seen(resumed) == seen(whole)
    assert evaluator.count == trials - 11


@pytest.mark.slow
def test_interrupted_again_and_again_it_still_ends_the_same(tmp_path):
    whole = search(None, evaluator=Counting())
    for after in (0, 3, 0, 9):
        search(tmp_path, True, evaluator=Counting(after))
    assert [row.status for row in rows(tmp_path)].count("pending") == 4
    assert seen(search(tmp_path, True, evaluator=Counting())) == seen(whole)
    assert len(rows(tmp_path)) == TRIALS


KILLED = """
import sys, torch
torch.set_num_threads(1)
from tests.resuming import search
print("ready", flush=True)
search(sys.argv[1], resume=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(tmp_path):
    whole, rng = search(None), np.random.default_rng(0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for after in (0, *rng.integers(1, TRIALS - 2, size=2).tolist()):
        run_dir = tmp_path / str(after)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, run_dir], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout.readline() == "ready\n"
        while process.poll() is None and finished(run_dir) < after:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert seen(search(run_dir, True)) == seen(whole)
        assert len(rows(run_dir)) == TRIALS


def finished(run_dir):
    """Trials that were scored so far, read while the search writes."""
    return sum(row.status == OK for row in rows(run_dir)) if (run_dir / FILE_NAME).exists() else 0


@pytest.mark.slow
def test_a_result_recorded_but_not_told_is_told_and_not_evaluated_again(tmp_path):
    class Dies(LocalExecutor):
        def gather(self):
            if len(self._queue) == 3:
                raise OSError("the machine is gone")
            return super().gather()

    whole = search(None)
    with pytest.raises(OSError, match="gone"):
        search(tmp_path, execution=Dies())
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    connection.execute("DELETE FROM tells WHERE trial = 4")
    connection.commit()
    connection.close()
    assert seen(search(tmp_path, True)) == seen(whole)
    with Journal.open(tmp_path) as journal:
        assert journal.told() == set(range(TRIALS))


@pytest.mark.slow
def test_pending_trials_keep_their_numbers_and_are_evaluated_once(tmp_path):
    interrupted(tmp_path, 10)
    before = {row.id: row.candidate for row in rows(tmp_path) if row.status == "pending"}
    assert len(before) == 6
    search(tmp_path, True, evaluator=Counting())
    after = rows(tmp_path)
    assert {i: after[i].candidate for i in before} == before
    assert [len(row.evaluations) for row in after] == [1] * TRIALS


@pytest.mark.slow
def test_failed_trials_stay_failed(tmp_path):
    class Failing(Counting):
        def evaluate(self, candidates, chunk=None):
            outcomes = super().evaluate(candidates, chunk)
            return [Failure("no memory") if c[0] > 7 else o for c, o in zip(candidates, outcomes, strict=True)]

    whole = search(None, evaluator=Failing())
    search(tmp_path, evaluator=Failing(14))
    resumed = search(tmp_path, True, evaluator=Failing())
    assert seen(resumed)[0][0][:3] == seen(whole)[0][0][:3]
    assert [(t.candidate, t.status, t.reason) for t in resumed.trials] == [
        (t.candidate, t.status, t.reason) for t in whole.trials
    ]
    assert FAILED in {t.status for t in resumed.trials[:14]}


class Untouched(LocalExecutor):
    def start(self, *args):
        raise AssertionError("workers are not needed")


@pytest.mark.slow
def test_a_finished_search_returns_at_once(tmp_path):
    whole = search(tmp_path, evaluator=Counting())
    evaluator = Counting()
    assert seen(search(tmp_path, True, evaluator=evaluator, execution=Untouched())) == seen(whole)
    assert evaluator.count == 0


@pytest.mark.slow
def test_more_trials_may_be_added(tmp_path):
    first = search(tmp_path, trials=16)
    second = search(tmp_path, True, trials=24)
    assert seen(second)[0][:16] == seen(first)[0]
    assert len({trial.candidate for trial in second.trials}) == 24
    assert seen(second)[0] == seen(search(None, trials=24))[0]
    with Journal.open(tmp_path) as journal:
        assert journal.meta()["trials"] == 24


def limited():
    """A search for the cheapest network, on labels that the dense one gets right."""
    model, (inputs, _) = ZOO["mlp"].build(), make_data()
    data = (inputs, model(inputs).argmax(1))
    return {"budget": "accuracy drop <= 30pp", "optimizer": "auto", "model": model, "data": data}


@pytest.mark.slow
def test_under_a_limit_on_the_score_it_ends_the_same_and_recalls_who_met_it(tmp_path):
    whole = search(None, **limited())
    met = {trial.candidate: trial.score >= whole.worst_score for trial in whole.trials}
    interrupted(tmp_path, 19, **limited())
    told = []

    class Listening(Auto):
        def tell(self, evaluations):
            told.append(dict(zip(map(tuple, evaluations.candidates.tolist()), evaluations.acceptable, strict=True)))
            super().tell(evaluations)

    resumed = search(tmp_path, True, evaluator=Counting(), **{**limited(), "optimizer": Listening})
    assert seen(resumed) == seen(whole)
    assert [note for note in resumed.notes if "is the cheapest with" in note] == [
        note for note in whole.notes if "is the cheapest with" in note
    ]
    assert len(told[0]) == 19
    assert set(told[0].values()) == {True, False}
    assert told[0].items() <= met.items()


class TestStoppingByItself:
    options = {"trials": "auto", "optimizer": "random", "space": autoprune.Channels(step=4), "budget": "flops <= 60%"}

    @pytest.mark.slow
    def test_it_stops_where_the_uninterrupted_one_does_and_then_returns_at_once(self, tmp_path):
        whole = search(None, **self.options)
        assert whole.stopped == "converged"
        (why,) = (note for note in whole.notes if note.startswith("stopped after"))
        for after in (45, 30):
            assert search(tmp_path, True, evaluator=Counting(after), **self.options).stopped == "interrupted"
        for _ in range(2):
            resumed = search(tmp_path, True, evaluator=Counting(), **self.options)
            assert seen(resumed) == seen(whole)
            assert why in resumed.notes
        search(tmp_path, True, evaluator=Counting(0), execution=Untouched(), **self.options)

    @pytest.mark.slow
    def test_a_number_of_trials_may_become_auto_and_the_other_way_round(self, tmp_path):
        whole = search(None, **self.options)
        search(tmp_path, **{**self.options, "trials": 24})
        assert seen(search(tmp_path, True, **self.options)) == seen(whole)
        more = search(tmp_path, True, **{**self.options, "trials": len(whole.trials) + 4})
        assert more.stopped == "trials"
        assert seen(more)[0][:-4] == seen(whole)[0]


@pytest.mark.slow
def test_resume_without_an_earlier_search_begins_one(tmp_path):
    (tmp_path / "journal.new").write_bytes(b"half of a journal that a kill left")
    assert len(search(tmp_path, True, trials=4).trials) == 4


def other_weights():
    model = ZOO["mlp"].build()
    with torch.no_grad():
        model[-1].bias += 1e-3
    return model


OTHERS = {
    "weights": lambda: {"model": other_weights()},
    "data": lambda: {"data": make_data(1)},
    "space": lambda: {"space": autoprune.Channels(step=4)},
    r"budget \(flops <= 50% before, flops <= 40% now\)": lambda: {"budget": "flops <= 40%"},
    r"budget \(flops <= 50% before, flops <= 50% and accuracy drop <= 0.3 now\)": lambda: {
        "budget": "flops <= 50%, accuracy drop <= 30pp"
    },
    r"seed \(0 before, 1 now\)": lambda: {"seed": 1},
    "metric": lambda: {"metric": "cross_entropy"},
    r"evaluator \(AdaptiveBN before, Counting now\)": lambda: {"evaluator": Counting()},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_another_search_is_refused_by_name_and_the_journal_is_kept(name, tmp_path):
    search(tmp_path, trials=4)
    before = rows(tmp_path)
    with pytest.raises(ValueError, match=rf"run_dir must hold the same search .* differs in .*{name}"):
        search(tmp_path, True, **OTHERS[name]())
    assert rows(tmp_path) == before


@pytest.mark.slow
def test_other_threads_versions_and_optimizers_are_warned_of(tmp_path, caplog):
    search(tmp_path, trials=4)
    with Journal.resume(tmp_path) as journal:
        journal.record_meta("threads", 64)
        journal.record_meta("versions", {"torch": "2.0"})
    with caplog.at_level(logging.WARNING, "autoprune"):
        search(tmp_path, True, trials=6, optimizer="random")
    text = caplog.text
    assert "threads (64 before, 1 now)" in text
    assert "other versions" in text
    assert "optimizer (LevelSwitch before, RandomSearch now)" in text
    assert "device" not in text


@pytest.mark.slow
def test_a_search_that_fills_the_disk_says_so_and_goes_on_once_there_is_room(tmp_path, monkeypatch):
    connect = journal_module.connect

    def connect_to_a_small_disk(path):
        connection = connect(path)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count={pages + 3}")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "connect", connect_to_a_small_disk)
        with pytest.raises(OSError, match=r"run_dir must have room .*resume=True goes on"):
            search(tmp_path)
    assert 0 < finished(tmp_path) < TRIALS
    assert seen(search(tmp_path, True)) == seen(search(None))


def fill(journal):
    for _ in range(1000):
        journal.record_ask(np.zeros((5, 50), dtype=np.int64), {"flops": np.ones(5)})


class TestRunDir:
    def test_resume_needs_one(self):
        with pytest.raises(ValueError, match=r"resume=True needs the run_dir .* got run_dir=None"):
            search(None, True)

    @pytest.mark.slow
    def test_what_cannot_be_written_fails_before_any_trial(self, tmp_path):
        (tmp_path / "file").touch()
        evaluator = Counting()
        with pytest.raises(OSError, match=r"run_dir must be a folder that can be written, got .*runs"):
            search(tmp_path / "file" / "runs", evaluator=evaluator)
        assert evaluator.count == 0

    @pytest.mark.slow
    def test_a_second_search_in_it_is_refused_while_the_first_runs(self, tmp_path):
        with Journal.create(tmp_path, {}), pytest.raises(BlockingIOError, match="another search is writing"):
            Journal.resume(tmp_path)
        Journal.resume(tmp_path).close()

    def test_a_full_disk_is_named_and_the_journal_stays_readable_and_resumable(self, tmp_path):
        with Journal.create(tmp_path, {}) as journal:
            journal._connection.execute("PRAGMA max_page_count=8")
            with pytest.raises(OSError, match=r"run_dir must have room .*journal.sqlite cannot be written: .*full"):
                fill(journal)
        kept = len(rows(tmp_path))
        assert kept % 5 == 0
        with Journal.resume(tmp_path) as journal:
            assert journal.record_ask(np.zeros((1, 50), dtype=np.int64), {"flops": np.ones(1)}) == [kept]
