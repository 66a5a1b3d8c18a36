"""Searches on Ray: the same trials as here, whatever dies during the search."""

import logging
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

import autoprune
from autoprune.evaluators import AdaptiveBN, Masked
from autoprune.execution import RayExecutor
from autoprune.execution.ray import _require_authentication
from autoprune.execution.ray_worker import Worker
from autoprune.journal.journal import Journal
from autoprune.protocols import FAILED, OK
from tests.object_stores import object_stores
from tests.processes import running
from tests.searching import grouped
from tests.sockets import LOOPBACK, listening_of
from zoo import ZOO

pytestmark = pytest.mark.ray


def make_data():
    x = torch.randn(240, 64, generator=torch.Generator().manual_seed(0))
    return x, x[:, :10].argmax(1)


def search(trials=24, data=None, **options):
    options = {"optimizer": "level_switch", **options}
    return autoprune.search(
        ZOO["mlp"].build(), "flops <= 50%", data or make_data(), trials=trials, **grouped(**options)
    )


def scores(result):
    return {t.candidate: (t.score, t.signal, t.distortion) for t in result.trials}


def assert_whole(result, trials=24):
    """Exactly the trials asked for, each candidate once."""
    assert result.stopped == "trials"
    assert [trial.id for trial in result.trials] == list(range(trials))
    assert len({trial.candidate for trial in result.trials}) == trials


class Faulty(AdaptiveBN):
    """Calls ``fault()`` in the workers for candidates whose first option is odd, always or the first time only."""

    def __init__(self, fault, marks=None):
        super().__init__()
        self.fault, self.marks, self.driver = fault, marks, os.getpid()

    def evaluate(self, candidates, chunk=None):
        for candidate in candidates.tolist():
            mark = None if self.marks is None else self.marks / "-".join(map(str, candidate))
            if os.getpid() != self.driver and odd(candidate) and (mark is None or not mark.exists()):
                if mark is not None:
                    mark.touch()
                self.fault()
        return super().evaluate(candidates, chunk)


class Always(AdaptiveBN):
    """Calls ``fault()`` in the workers for every candidate."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.driver = fault, os.getpid()

    def evaluate(self, candidates, chunk=None):
        if os.getpid() != self.driver:
            self.fault()
        return super().evaluate(candidates, chunk)


def odd(candidate):
    return candidate[0] % 4 == 1


def die():
    os._exit(1)


def hang():
    time.sleep(600)


class Slow(AdaptiveBN):
    """Takes a moment for each candidate, so that something can happen meanwhile."""

    def evaluate(self, candidates, chunk=None):
        time.sleep(0.2)
        return super().evaluate(candidates, chunk)


@pytest.fixture(scope="module")
def local():
    return search(trials=40)


@pytest.fixture(scope="module")
def ray():
    """One Ray for all tests of the module, with GPUs that there are none of."""
    ray = pytest.importorskip("ray")
    ray.init(
        address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="warning"
    )
    yield ray
    ray.shutdown()


@pytest.fixture
def two_workers(ray):
    """Options for two workers, with a check that none of their processes is left."""

    def make(**options):
        return RayExecutor(workers=2, **options)

    yield make
    deadline = time.monotonic() + 60
    while alive(ray) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(ray)
    assert ray.is_initialized(), "a Ray that was there before must stay"


def alive(ray):
    """CPUs that workers hold."""
    return ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0)


def test_synchronous_workers_give_the_trials_and_the_front_of_a_local_search(two_workers, local):
    result = search(trials=40, execution=two_workers(synchronous=True))
    assert [(t.candidate, *scores(result)[t.candidate]) for t in result.trials] == [
        (t.candidate, *scores(local)[t.candidate]) for t in local.trials
    ]
    assert [trial.id for trial in result.front] == [trial.id for trial in local.front]


def test_asynchronous_workers_score_as_here_and_the_journal_says_who_did(two_workers, local, tmp_path):
    result = search(
        execution=two_workers(), metric="auto", forward=lambda model, batch: model(batch[0]), run_dir=tmp_path
    )
    assert_whole(result)
    common = scores(result).keys() & scores(local).keys()
    assert common
    assert {c: scores(result)[c] for c in common} == {c: scores(local)[c] for c in common}
    with Journal.open(tmp_path) as journal:
        workers = {one.worker.split()[0] for row in journal.trials() for one in row.rows}
        assert workers <= {"ray-0", "ray-1"}  # one may have done all before the other is ready
        assert workers
        assert journal.told() == set(range(24))


@pytest.mark.parametrize("kind", ["in memory", "in a folder", "in order"])
def test_workers_put_networks_with_zeros_together_as_here(two_workers, tmp_path, kind: str):
    evaluators = {
        "in memory": Masked("sparsegpt"),
        "in a folder": Masked("sparsegpt", folder=tmp_path, store="weights"),
        "in order": Masked("sparsegpt", sequential=True),
    }
    options = {
        "space": autoprune.Sparsity(levels=(0, 0.5, 0.8), patterns=["unstructured", "2:4"]),
        "evaluator": evaluators[kind],
        "optimizer": "level_switch",
        "trials": 10,
    }
    model, data = ZOO["mlp"].build(), make_data()
    here, there = (
        autoprune.search(model, "nonzero_params <= 50%", data, **grouped(**options, **where))
        for where in ({}, {"execution": two_workers(synchronous=True)})
    )
    assert scores(there) == scores(here)


def test_workers_draw_samples_for_themselves_where_functions_give_them(two_workers, local, tmp_path):
    def give():
        (tmp_path / str(os.getpid())).touch()
        return make_data()

    result = search(8, data=autoprune.Data(validation=give), execution=two_workers(synchronous=True))
    assert {str(os.getpid())} < {mark.name for mark in tmp_path.iterdir()}
    assert scores(result) == {c: scores(local)[c] for c in scores(result)}


def test_workers_share_a_gpu(ray, local):
    result = search(execution=RayExecutor(cpus_per_worker=0.1, gpus_per_worker=0.5))
    assert_whole(result)


def test_a_candidate_that_ends_its_process_fails_after_a_second_try_and_the_search_goes_on(two_workers, caplog):
    with caplog.at_level(logging.WARNING, "autoprune"):
        result = search(12, execution=two_workers(ahead=0), evaluator=Faulty(die))  # nothing waits behind it
    assert_whole(result, 12)
    failed = [trial for trial in result.trials if trial.status == FAILED]
    assert {trial.id for trial in failed} == {trial.id for trial in result.trials if odd(trial.candidate)}
    assert failed
    assert all(trial.reason.startswith("2 workers were lost while they evaluated it") for trial in failed)
    assert caplog.text.count("is tried again") == caplog.text.count(" failed") == len(failed)


def test_what_hangs_once_is_replaced_and_its_candidate_scored(two_workers, local, tmp_path):
    evaluator = Faulty(hang, marks=tmp_path)
    result = search(12, execution=two_workers(timeout_seconds=8, ahead=0), evaluator=evaluator)
    assert_whole(result, 12)
    assert {trial.status for trial in result.trials} == {OK}
    assert list(tmp_path.iterdir())


def test_the_end_of_the_time_does_not_wait_for_running_evaluations(two_workers):
    began = time.monotonic()
    result = search(execution=two_workers(), evaluator=Always(hang), max_seconds=10)
    assert result.stopped == "time"
    assert time.monotonic() - began < 60


def test_kill_9_of_a_worker_loses_nothing(two_workers, tmp_path, caplog):
    def kill():
        while not (found := places(tmp_path)):
            time.sleep(0.05)
        os.kill(int(found.pop().rpartition(":")[2]), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with caplog.at_level(logging.WARNING, "autoprune"):
        result = search(execution=two_workers(), evaluator=Slow(), run_dir=tmp_path)
    killer.join(10)
    assert_whole(result)
    assert {trial.status for trial in result.trials} == {OK}
    assert "is tried again" in caplog.text


def begin_with_all(executor):
    """Begin a search when every worker is ready, however long that takes on a busy machine."""
    start = executor.start

    def start_all(*args):
        start(*args)
        while any(worker.starting is not None for worker in executor._workers):
            executor._step()

    executor.start = start_all


def places(run_dir):
    """Workers that evaluated trials so far."""
    try:
        with Journal.open(run_dir) as journal:
            return {one.worker for row in journal.trials() for one in row.rows}
    except FileNotFoundError:
        return set()


def test_a_resumed_asynchronous_search_evaluates_what_was_pending(two_workers, tmp_path):
    class Stops:
        """A Ray executor whose driver stops after ten results."""

        name, threads = "ray", 1

        def __init__(self, inner):
            self.inner, self.count = inner, 0

        def gather(self):
            if self.count >= 10:
                raise KeyboardInterrupt
            finished = self.inner.gather()
            self.count += len(finished)
            return finished

        def __getattr__(self, name):
            return getattr(self.inner, name)

    search(execution=Stops(two_workers()), run_dir=tmp_path)
    with Journal.open(tmp_path) as journal:
        before = {row.id: (row.candidate, row.evaluations) for row in journal.trials()}
    pending = [i for i, (_, evaluations) in before.items() if not evaluations]
    assert pending
    assert_whole(search(execution=two_workers(), run_dir=tmp_path, resume=True))
    with Journal.open(tmp_path) as journal:
        after = journal.trials()
    assert {i: after[i].candidate for i in before} == {i: candidate for i, (candidate, _) in before.items()}
    assert [len(row.evaluations) for row in after] == [1] * 24


def test_a_driver_holds_no_more_tasks_than_its_workers_have_slots(two_workers):
    executor, held = two_workers(), []
    submit = executor.submit

    def watched(*tasks):
        submit(*tasks)
        held.append(len(executor._unreleased))

    executor.submit = watched
    search(execution=executor)
    assert max(held) == 4


class InOrder(AdaptiveBN):
    """Wants candidates by their first option."""

    def order(self, candidates):
        return np.argsort(candidates[:, 0])


class Handle:
    """Stands in for an actor, and notes the first options of what it is sent."""

    def __init__(self):
        self.sent, self.evaluate = [], self

    def remote(self, candidate, race):
        self.sent.append(int(candidate[0]))


class TestRelatedCandidates:
    """Eight candidates in no order, for two workers with room for two each."""

    @pytest.fixture
    def executor(self):
        executor = RayExecutor(workers=2, synchronous=True)
        executor._evaluator = InOrder()
        executor._workers = [Worker(i, Handle()) for i in range(2)]
        executor.submit(list(range(8)), np.array([3, 6, 0, 5, 7, 2, 4, 1])[:, None], [None] * 8)
        return executor

    @staticmethod
    def answer(executor, worker):
        del executor._workers[worker].tasks[0]
        executor._dispatch()

    def test_each_worker_gets_those_that_share_most(self, executor):
        for _ in range(2):
            for worker in range(2):
                self.answer(executor, worker)
        assert [worker.handle.sent for worker in executor._workers] == [[0, 1, 2, 3], [4, 5, 6, 7]]

    def test_nobody_waits_for_a_slow_worker(self, executor):
        for _ in range(4):
            self.answer(executor, 0)
        quick, slow = (worker.handle.sent for worker in executor._workers)
        assert (len(quick), len(slow)) == (6, 2)
        assert sorted(quick + slow) == list(range(8))


class Locked(AdaptiveBN):
    """Can be copied, and cannot be pickled."""

    def __deepcopy__(self, memo):
        return Locked()

    def __reduce__(self):
        raise TypeError("cannot pickle a lock")


class Unpreparable(AdaptiveBN):
    def __init__(self):
        super().__init__()
        self.driver = os.getpid()

    def prepare(self, context):
        if os.getpid() != self.driver:
            raise RuntimeError("the licence server is down")
        super().prepare(context)


def test_workers_that_cannot_start_are_given_up_with_the_reason(two_workers):
    with pytest.raises(RuntimeError, match=r"no worker could be started: .*the licence server is down"):
        search(execution=two_workers(max_restarts=1), evaluator=Unpreparable())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers must be an integer of at least 1, got 0"),
        ({"threads_per_worker": 0}, "threads_per_worker must be an integer of at least 1, got 0"),
        ({"workers": 2.5}, "workers must be an integer of at least 1, got 2.5"),
        ({"workers": True}, "workers must be an integer of at least 1, got True"),
        ({"gpus_per_worker": "x"}, "gpus_per_worker must be a number of at least 0, got 'x'"),
        ({"gpus_per_worker": float("nan")}, "gpus_per_worker must be a number of at least 0, got nan"),
        ({"address": 5}, "address must be text, such as 'auto', or None, got 5"),
        ({"runtime_env": []}, "runtime_env must be a dictionary for Ray, or None"),
        ({"synchronous": "no"}, "synchronous must be True or False, got 'no'"),
        ({"timeout_seconds": True}, "timeout_seconds must be positive or None, got True"),
        ({"cpus_per_worker": 0}, "must not both be 0"),
        ({"listen": "everywhere"}, "listen must be one of \\['loopback', 'network'\\], got 'everywhere'"),
        ({"timeout_seconds": 0}, "timeout_seconds must be positive or None, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        RayExecutor(**options)


@pytest.mark.parametrize("version", ["2.40.0", "2.51.1", "1.13", "2.9.3"])
def test_a_ray_without_token_authentication_is_refused(version):
    with pytest.raises(ImportError, match=rf"needs Ray 2.52 or newer, .* token authentication, got {version}; pip"):
        _require_authentication(version)


@pytest.mark.parametrize("version", ["2.52.0", "2.60.0", "3.0.0.dev0"])
def test_a_ray_with_token_authentication_is_taken(version):
    _require_authentication(version)


def test_workers_larger_than_any_node_are_refused(ray):
    with pytest.raises(ValueError, match=r"1 workers must fit, each with cpus_per_worker=64 .* room for 0 .*2 CPUs"):
        search(execution=RayExecutor(cpus_per_worker=64))


class TestOtherRays:
    """Each needs Ray to itself, so these come last and stop the one that the tests above share."""

    @pytest.fixture(autouse=True)
    def alone(self, ray):
        ray.shutdown()
        yield
        assert not ray.is_initialized()

    def test_a_ray_of_its_own_is_shut_down_and_leaves_the_random_state_alone(self, ray, global_rng_untouched):
        with global_rng_untouched():
            assert_whole(search(4, execution=RayExecutor(workers=1)), 4)

    def test_it_listens_on_the_loopback_only_and_leaves_the_environment_as_it_was(self, ray):
        executor, listening = RayExecutor(workers=1), []
        gather, before = executor.gather, dict(os.environ)

        def watched():
            finished = gather()
            listening.extend(listening_of({os.getpid(), *running()}))
            return finished

        executor.gather = watched
        assert_whole(search(4, execution=executor), 4)
        assert len(set(listening)) >= 4, "Ray and its worker"
        assert {address for address, _ in listening} <= LOOPBACK
        assert dict(os.environ) == before

    @pytest.mark.parametrize("name", ["evaluator", "metric", "forward"])
    def test_what_cannot_be_pickled_is_named_by_its_argument(self, ray, name):
        lock = threading.Lock()

        def metric(outputs, batch):
            return (outputs.argmax(1) == batch[1]).float() if lock else None

        options = {
            "evaluator": {"evaluator": Locked()},
            "metric": {"metric": autoprune.Metric(metric, True)},
            "forward": {"forward": lambda model, batch: model(batch[0]) if lock else None},
        }[name]
        pattern = rf"^{name} must be something that pickle can send to the workers of Ray, but .*use execution='local'$"
        with pytest.raises(TypeError, match=pattern) as caught:
            search(4, execution=RayExecutor(workers=1), **options)
        assert len(str(caught.value)) <= 500

    def test_model_and_data_are_stored_once_a_node_however_many_tasks(self, ray):
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        cluster.add_node(num_cpus=2)
        executor = RayExecutor(address=cluster.address)
        gather, seen, x = executor.gather, [], torch.randn(3_000, 64)
        begin_with_all(executor)

        def watched():
            finished = gather()
            seen.append(object_stores(ray))
            return finished

        executor.gather = watched
        try:
            assert_whole(search(60, (x, x[:, :10].argmax(1)), execution=executor), 60)
        finally:
            ray.shutdown()
            cluster.shutdown()
        ((objects, size),) = {store for stores in seen for store in stores}
        assert objects == 1
        assert size > 64 * 4 * 2_560, "the samples are in it"

    def test_nodes_that_leave_and_join_change_only_the_speed(self, ray, tmp_path):
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        leaving = cluster.add_node(num_cpus=1)
        executor = RayExecutor(address=cluster.address)
        begin_with_all(executor)
        submit, changes = executor.submit, []

        def submit_and_change(*tasks):
            submit(*tasks)
            if not changes and len(places(tmp_path)) == 2:
                changes.append("one left, one joined")
                cluster.remove_node(leaving, allow_graceful=False)
                cluster.add_node(num_cpus=1)

        executor.submit = submit_and_change
        try:
            result = search(60, execution=executor, evaluator=Slow(), run_dir=tmp_path)
        finally:
            ray.shutdown()
            cluster.shutdown()
        assert changes
        assert_whole(result, 60)
        assert {trial.status for trial in result.trials} == {OK}
        assert np.unique([place.split()[1] for place in places(tmp_path)]).size >= 2
