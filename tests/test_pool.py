"""Searches in several processes of this machine: the same trials as in one, whatever dies during the search."""

from __future__ import annotations

import copy
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.evaluators import AdaptiveBN, Compensated
from autoprune.execution import PoolExecutor, fastest
from autoprune.execution.fastest import FastestExecutor
from autoprune.execution.local import GENERATION, Finished, LocalExecutor
from autoprune.execution.shipping import Parcel, opened
from autoprune.protocols import FAILED, IntArray
from autoprune.result import SearchResult
from autoprune.study import convergence
from autoprune.testing.contexts import image_context
from tests.processes import running


def network() -> nn.Module:
    """A network of a class without a module that another process could import."""

    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
            self.second, self.head = nn.Conv2d(12, 10, 3, padding=1), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
            scores: Tensor = self.head(y.mean((2, 3)))
            return scores

    return Local().eval()


def search(execution: Any, trials: int = 20, **options: Any) -> SearchResult:
    x = torch.randn(120, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    labels = (3 * x.mean((1, 2, 3))).round().clamp(-1, 1).long() + 1
    chosen = {"optimizer": "level_switch", **options}
    return autoprune.search(network(), "flops <= 50%", (x, labels), trials=trials, execution=execution, **chosen)


def trials_of(result: SearchResult) -> list[Any]:
    return [(t.id, t.candidate, t.status, t.score, t.signal, t.distortion) for t in result.trials]


class Faulty(AdaptiveBN):
    """Ends the processes of the pool at one candidate in four."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = os.getpid()

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> Any:
        if os.getpid() != self.driver and candidates[0][0] % 4 == 1:
            os._exit(3)
        return super().evaluate(candidates, chunk)


class Slow(AdaptiveBN):
    """Takes a moment for each candidate, so that something can happen meanwhile."""

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> Any:
        time.sleep(0.2)
        return super().evaluate(candidates, chunk)


class Endless(AdaptiveBN):
    """Takes minutes for each candidate in other processes."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = os.getpid()

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> Any:
        if os.getpid() != self.driver:
            time.sleep(300)
        return super().evaluate(candidates, chunk)


class EndlessAt(AdaptiveBN):
    """Takes minutes for one candidate."""

    def __init__(self, candidate: IntArray) -> None:
        super().__init__()
        self.slow = candidate

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> Any:
        if (candidates == self.slow).all():
            time.sleep(300)
        return super().evaluate(candidates, chunk)


class Threaded(AdaptiveBN):
    """Starts a thread where it is unpickled."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()


class Unprepared(AdaptiveBN):
    """Cannot be prepared in another process."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = os.getpid()

    def prepare(self, context: Any) -> None:
        if os.getpid() != self.driver:
            raise OSError("no such device")
        super().prepare(context)


@pytest.fixture(scope="module")
def alone() -> SearchResult:
    return search("local")


def test_processes_give_the_trials_and_the_front_of_a_search_in_one(alone: SearchResult) -> None:
    result = search(autoprune.Execution(workers=2))
    assert trials_of(result) == trials_of(alone)
    assert [trial.id for trial in result.front] == [trial.id for trial in alone.front]
    assert not [told for told in running().values() if "pool_worker" in told]


@pytest.mark.slow
def test_a_candidate_that_ends_its_process_fails_after_a_second_try(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "autoprune"):
        result = search(autoprune.Execution(workers=2), 10, evaluator=Faulty())
    failed = [trial for trial in result.trials if trial.status == FAILED]
    assert failed
    assert {trial.id for trial in failed} == {t.id for t in result.trials if t.candidate[0] % 4 == 1}
    assert all("2 workers were lost while they evaluated it" in trial.reason for trial in failed)
    assert len(result.trials) == 10
    assert caplog.text.count("is tried again") == len(failed)


@pytest.mark.parametrize("which", ["worker", "source"])
def test_a_process_that_is_killed_is_replaced_and_nothing_is_lost(caplog: pytest.LogCaptureFixture, which: str) -> None:
    executor = PoolExecutor(2)
    killed: list[int] = []

    def kill() -> None:
        while not any(worker.task is not None for worker in executor._workers):
            time.sleep(0.02)
        killed.extend(worker.pid for worker in executor._workers if worker.task is not None)
        assert executor._source is not None
        os.kill(killed[0] if which == "worker" else executor._source.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with caplog.at_level(logging.WARNING, "autoprune"):
        result = search(executor, 12, evaluator=Slow())
    killer.join(10)
    assert [trial.id for trial in result.trials] == list(range(12))
    assert {trial.status for trial in result.trials} <= {"ok"}
    assert f"{killed[0]} ended with {-9 if which == 'worker' else None}" in caplog.text
    assert not [told for told in running().values() if "pool_worker" in told]


@contextmanager
def started(evaluator: Any) -> Iterator[PoolExecutor]:
    """A pool of two workers that are ready."""
    executor, context = PoolExecutor(2), image_context()
    fresh = copy.deepcopy(evaluator)
    evaluator.prepare(context)
    executor.start(evaluator, context, fresh)
    try:
        executor.ready()
        yield executor
    finally:
        executor.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are programs of their own")
class TestForking:
    def test_a_worker_adds_a_small_part_of_the_memory_that_it_reads(self) -> None:
        with started(Compensated()) as executor:
            for pid in executor.processes:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
                size = {key: int(value.split()[0]) for key, value in (line.split(":") for line in lines)}
                assert size["Private_Clean"] + size["Private_Dirty"] < 0.1 * size["Rss"]

    @pytest.mark.slow
    def test_where_a_process_of_several_threads_cannot_be_forked_workers_are_programs(self) -> None:
        with started(Threaded()) as executor:
            told = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in executor.processes]
            assert len(told) == 2
            assert all(each.endswith(b"\0alone\0") for each in told)
        assert not [told for told in running().values() if "pool_worker" in told]


def test_products_are_sent_complete_and_each_process_keeps_a_part_of_what_one_would() -> None:
    evaluator = Compensated(share_bytes=1000)
    evaluator.prepare(image_context())
    sent = evaluator.to_send(4)
    layers = [layer for each in sent._layers.values() for layer in each]
    assert layers
    assert not any(layer.moments._halved for layer in layers)
    assert sent._share_bytes == 250
    assert sent._most_solved == evaluator._most_solved // 4


def test_an_evaluator_that_cannot_be_prepared_there_ends_the_search_with_its_reason() -> None:
    with pytest.raises(RuntimeError, match="no worker could be started: OSError: no such device"):
        search(autoprune.Execution(workers=1), evaluator=Unprepared())
    assert not [told for told in running().values() if "pool_worker" in told]


def test_what_cannot_be_sent_is_named_by_its_argument() -> None:
    lock = threading.Lock()

    def metric(outputs: Tensor, batch: object) -> Tensor:
        with lock:
            return outputs[:, 0]

    with pytest.raises(TypeError, match=r"metric must be something that cloudpickle can send.*leave workers= out"):
        search(autoprune.Execution(workers=2), metric=autoprune.Metric(metric, True))


def test_the_end_of_the_time_does_not_wait_for_running_evaluations() -> None:
    began = time.monotonic()
    result = search(autoprune.Execution(workers=2), evaluator=Endless(), max_seconds=4)
    assert time.monotonic() - began < 30
    assert (result.stopped, result.trials) == ("time", ())
    assert not [told for told in running().values() if "pool_worker" in told]


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 3])
def test_the_end_of_the_time_loses_nothing_that_is_finished(monkeypatch: pytest.MonkeyPatch, slow: int) -> None:
    context, real = image_context(), PoolExecutor._hear
    candidates = np.array([[i, i] + [0] * (len(context.space.sizes) - 2) for i in range(6)])
    evaluator = EndlessAt(candidates[slow])
    evaluator.prepare(context)
    pool = PoolExecutor(2)

    def hear(self: PoolExecutor, worker: Any) -> None:
        real(self, worker)
        if len(found) + len(self._done) == len(candidates) - 1:
            self.until = 0.0

    monkeypatch.setattr(PoolExecutor, "_hear", hear)
    found: list[int] = []
    try:
        pool.start(evaluator, context, EndlessAt(candidates[slow]))
        pool.submit([*range(len(candidates))], candidates, [None] * len(candidates))
        while pool.until:
            found += [finished.trial for finished in pool.gather()]
        assert pool.gather() == []
    finally:
        pool.stop()
    assert sorted(found) == [trial for trial in range(len(candidates)) if trial != slow]


def test_a_search_takes_what_has_come_in_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        passed = 0.0

        @classmethod
        def monotonic(cls) -> float:
            return time.monotonic() + cls.passed

    class Slow(LocalExecutor):
        """Hands out one outcome, and the others of its generation once the time is over."""

        until = 0.0

        def gather(self) -> list[Finished]:
            if not Clock.passed:
                Clock.passed = 1e6
                return super().gather()
            assert Clock.monotonic() > self.until
            return [finished for _ in range(len(self._queue)) for finished in super(Slow, self).gather()]

    monkeypatch.setattr(convergence, "time", Clock)
    result = search(Slow(), max_seconds=1e5)
    assert (result.stopped, len(result.trials)) == ("time", GENERATION)


class TestChoosing:
    """Processes are chosen by the clock, here by a false one."""

    @staticmethod
    def timed(monkeypatch: pytest.MonkeyPatch, pool_seconds: float) -> FastestExecutor:
        real: Callable[..., Any] = FastestExecutor._timed

        def timed(self: Any, executor: Any, *given: Any) -> Any:
            found, _ = real(self, executor, *given)
            return found, pool_seconds if isinstance(executor, PoolExecutor) else 1.0

        monkeypatch.setattr(FastestExecutor, "_timed", timed)
        monkeypatch.setattr(fastest, "WORTH_SECONDS", 0.0)
        return FastestExecutor(2)

    @pytest.mark.slow
    @pytest.mark.parametrize(("seconds", "words"), [(0.5, "in processes"), (2.0, "in this process")])
    def test_the_faster_way_is_taken_with_the_same_trials(
        self, monkeypatch: pytest.MonkeyPatch, alone: SearchResult, seconds: float, words: str
    ) -> None:
        result = search(self.timed(monkeypatch, seconds))
        assert trials_of(result) == trials_of(alone)
        (note,) = [note for note in result.notes if note.startswith("candidates are evaluated")]
        assert words in note
        assert "in 2 processes of one thread" in note
        assert not [told for told in running().values() if "pool_worker" in told]

    @pytest.mark.slow
    def test_processes_that_were_chosen_end_in_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real, seen = PoolExecutor.gather, []

        def gather(pool: PoolExecutor) -> Any:
            seen.append(pool.until)
            return real(pool)

        monkeypatch.setattr(PoolExecutor, "gather", gather)
        began = time.monotonic()
        search(self.timed(monkeypatch, 0.5), max_seconds=1000)
        assert began < seen[-1] - 1000 < time.monotonic()

    def test_short_evaluations_stay_in_this_process(self, alone: SearchResult) -> None:
        result = search(autoprune.Execution(workers="auto"))
        assert trials_of(result) == trials_of(alone)
        assert any("candidates are evaluated in this process" in note for note in result.notes)

    @pytest.mark.parametrize("obstacle", ["metric must be something", "no worker could be started: OSError"])
    def test_a_search_that_processes_cannot_take_goes_on_in_this_one(
        self, monkeypatch: pytest.MonkeyPatch, obstacle: str
    ) -> None:
        monkeypatch.setattr(fastest, "WORTH_SECONDS", 0.0)
        lock = threading.Lock()

        def locked(outputs: Tensor, batch: object) -> Tensor:
            with lock:
                return outputs[:, 0]

        def chosen() -> dict[str, Any]:
            return {"metric": autoprune.Metric(locked, True)} if "metric" in obstacle else {"evaluator": Unprepared()}

        result = search(FastestExecutor(2), **chosen())
        assert trials_of(result) == trials_of(search("local", **chosen()))
        assert any(f"processes cannot be started, because {obstacle}" in note for note in result.notes)
        assert not [told for told in running().values() if "pool_worker" in told]


class TestParcel:
    def test_tensors_come_back_equal_and_what_shared_memory_shares_it(self) -> None:
        base = torch.arange(10_000, dtype=torch.float32)
        parts = {
            "whole": base,
            "part": base[1000:2000],
            "weight": nn.Parameter(base.view(100, 100).T),
            "small": torch.ones(3),
        }
        parcel = Parcel(parts)
        found = opened(parcel.pickled, os.dup(parcel.file.fileno()))
        parcel.close()
        assert all(torch.equal(found[name], value) for name, value in parts.items())
        assert isinstance(found["weight"], nn.Parameter)
        assert found["weight"].stride() == (1, 100)
        found["whole"][1000] = -1.0
        assert found["part"][0] == -1.0
        assert len(parcel.pickled) < 4000

    def test_a_write_stays_in_the_process(self) -> None:
        parcel = Parcel(torch.zeros(10_000))
        first, second = (opened(parcel.pickled, os.dup(parcel.file.fileno())) for _ in range(2))
        parcel.close()
        first[0] = 1.0
        assert second[0] == 0.0

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.bool, torch.complex64])
    def test_every_type_comes_back(self, dtype: torch.dtype) -> None:
        values = (torch.arange(5000) % 7).to(dtype)
        parcel = Parcel((values, "text"))
        found, text = opened(parcel.pickled, os.dup(parcel.file.fileno()))
        parcel.close()
        assert found.dtype == dtype
        assert torch.equal(found, values)
        assert text == "text"

    def test_what_holds_no_tensors_comes_back(self) -> None:
        parcel = Parcel([1, "two"])
        assert opened(parcel.pickled, os.dup(parcel.file.fileno())) == [1, "two"]
        parcel.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be an integer of at least 1"),
        ({"workers": "all"}, "workers must be"),
        ({"workers": 2, "executor": "ray"}, r"RayExecutor\(workers=2\)"),
    ],
)
def test_workers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autoprune.Execution(**options)
