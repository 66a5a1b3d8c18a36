"""Scaling of a search: utilisation of workers, the driver's throughput, and its limit.

Run ``python -m benchmarks.execution.scaling`` from the root of the repository (about 10 minutes on two quiet cores), or
a part by its name: what the other parts found before stays in the results. Exits with 1 when a target is missed. Apart
from the parts that say so, workers are simulated (`benchmarks.execution.simulated`): the search, its optimizer and its
journal on disk are real and timed by their processor time, evaluations only take simulated time.

- utilisation: 64 workers, lognormal evaluation times of sigma 1, between the first and the last ask. Next to it NSGA-II
  that waits for a whole generation of 64.
- ray: the same with real sleeps in 64 workers of Ray, which share one asynchronous process.
- throughput: 64 workers that need no time, so that the driver is all there is.
- messages: what Ray's messages cost the driver for each task, on 1,000 workers of Ray that sleep for 0.05 s only, so
  that the driver is busy, as it is at its limit.
- limit: 1,000 and 10,000 workers; what messages cost the thread that searches is added to each task. The time starts
  once the driver has given every worker its first candidates.
- real: ResNet-20 at 32x32 on one and on two workers of Ray with one thread each, and on one with two threads: the best
  16 candidates in a row of two searches each, because the machine may not be quiet all the time.
- store: what is in Ray's object stores on two nodes, both on this machine, as results come in (needs grpcio).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import autoprune
from autoprune.data.subsets import Subsets, materialise
from autoprune.evaluators import AdaptiveBN
from autoprune.execution import RayExecutor
from benchmarks.execution.ray_load import ManyWorkers
from benchmarks.execution.simulated import InMemory, SimulatedWorkers, lognormal, search, utilisation
from benchmarks.support.common import RESULTS, environment, table, write
from tests.object_stores import object_stores
from zoo import resnet

COMMAND = "python -m benchmarks.execution.scaling"
DIMENSIONS, WORKERS = 30, 64


def run(executor: Any, trials: int, optimizer: str = "level_switch", **options: Any) -> autoprune.SearchResult:
    with tempfile.TemporaryDirectory() as folder:
        execution = autoprune.Execution(executor=executor, run_dir=folder, progress=False)
        return search(DIMENSIONS, trials=trials, optimizer=optimizer, execution=execution, **options)


def simulated_utilisation(trials: int) -> dict[str, float]:
    found = {}
    for name, optimizer, generation in (
        ("level_switch, steady state", "level_switch", None),
        ("nsga2, steady state", "nsga2", None),
        ("nsga2, generations of 64", "nsga2", WORKERS),
    ):
        workers = SimulatedWorkers(WORKERS, lognormal(0), generation=generation)
        run(workers, trials, optimizer)
        found[name] = utilisation(workers.spans, (workers.submitted[0], workers.submitted[-1]), WORKERS)
    return found


def utilisation_on_ray(ray: Any, trials: int) -> float:
    workers = ManyWorkers(ray, WORKERS, median=2.0, sigma=1.0)
    run(workers, trials)
    return utilisation(workers.spans, (workers.submitted[0], workers.submitted[-1]), WORKERS)


def throughput(trials: dict[str, int]) -> dict[str, float]:
    """Trials a second of the driver, at saturation: it then asks for many at once."""
    found = {}
    for optimizer, count in trials.items():
        workers = SimulatedWorkers(WORKERS, lambda: 0.0)
        run(workers, count, optimizer)
        found[optimizer] = count / workers.driver
    return found


def cost_of_messages(ray: Any, workers: int, tasks: int) -> dict[str, float]:
    """Processor time, in seconds, for each task sent to Ray and its result: of the search's thread, and of all."""
    executor, rng = ManyWorkers(ray, workers, median=0.05, sigma=0.1), np.random.default_rng(0)
    subsets = materialise((torch.zeros(12, 8), torch.zeros(12, dtype=torch.int64)), seed=0)
    executor.start(None, _Nothing(torch.nn.Linear(1, 1), subsets), None)
    sent = done = 0
    began = time.thread_time(), time.process_time()
    while done < tasks:
        if room := min(executor.room(), tasks - sent):
            executor.submit(list(range(sent, sent + room)), rng.integers(0, 16, size=(room, DIMENSIONS)), [None] * room)
            sent += room
        done += len(executor.gather())
    ended = time.thread_time(), time.process_time()
    executor.stop()
    return {name: (b - a) / tasks for name, a, b in zip(("thread", "process"), began, ended, strict=True)}


def driver_limit(cases: list[tuple[str, int, float, float, int]], overhead: float) -> list[dict[str, Any]]:
    """Efficiency for (optimizer, workers, mean seconds, sigma, trials), once all workers have something to do."""
    found = []
    for optimizer, workers, seconds, sigma, trials in cases:
        times: Callable[[], float] = lognormal(0, seconds / math.exp(sigma**2 / 2), sigma)
        executor = SimulatedWorkers(workers, times, overhead=overhead)
        run(executor, trials, optimizer)
        filled = executor.submitted[0]
        window = (filled, max(executor.submitted[-1], filled + seconds))
        found.append(
            {
                "optimizer": optimizer,
                "workers": workers,
                "seconds": seconds,
                "sigma": sigma,
                "efficiency": utilisation(executor.spans, window, workers),
                "ms_a_trial": 1000 * executor.driver / trials,
            }
        )
        print(found[-1], flush=True)
    return found


def real_workers(trials: int, samples: int, rounds: int = 2) -> dict[str, Any]:
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 lets anything else on the machine go first
    found: dict[str, float] = {}
    for _ in range(rounds):
        for name, workers, threads in (("1 x 1 thread", 1, 1), ("2 x 1 thread", 2, 1), ("1 x 2 threads", 1, 2)):
            watched = Watched(RayExecutor(workers=workers, threads_per_worker=threads))
            search_resnet(samples, watched, evaluator=AdaptiveBN(), trials=trials)
            found[name] = max(found.get(name, 0.0), watched.best_rate)
            print(name, found[name], flush=True)
    return found


def stores(trials: int, samples: int) -> dict[str, Any]:
    """Contents of the object stores of two nodes on this machine, with two workers each, as results come in."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    watched = Watched(RayExecutor(address=cluster.address), ask=lambda: object_stores(ray))
    try:
        search_resnet(samples, watched, evaluator=InMemory(), trials=trials)
    finally:
        ray.shutdown()
        cluster.shutdown()
    counts = [count for count, _ in watched.stored]
    wanted = [min(range(len(counts)), key=lambda i: abs(counts[i] - share * trials)) for share in (0.1, 0.5, 1.0)]
    return {
        "samples_mb": 3 * samples * 3 * 32 * 32 * 4 / 1e6,
        "most_objects_on_a_node": max(objects for _, nodes in watched.stored for objects, _ in nodes),
        "after": [
            {"results": counts[i], "nodes": [{"objects": n, "mb": size / 1e6} for n, size in watched.stored[i][1]]}
            for i in wanted
        ],
    }


def search_resnet(samples: int, executor: Any, **options: Any) -> autoprune.SearchResult:
    """Random search over ResNet-20 at 32x32, with `samples` samples in each of three sets."""
    torch.manual_seed(0)
    model = resnet(20, width=16).eval()
    x, y = torch.randn(3 * samples, 3, 32, 32), torch.randint(0, 10, (3 * samples,))
    parts = [(x[i * samples : (i + 1) * samples], y[i * samples : (i + 1) * samples]) for i in range(3)]
    data = autoprune.Data(*parts, calibration_samples=samples, validation_samples=samples, test_samples=samples)
    return autoprune.search(
        model,
        "flops <= 50%",
        data,
        optimizer="random",
        execution=autoprune.Execution(executor=executor, progress=False),
        **options,
    )


class Watched:
    """A Ray executor that notes when results come, and what `ask` says then."""

    name = "ray"

    def __init__(self, inner: RayExecutor, ask: Callable[[], Any] = lambda: None) -> None:
        self.inner, self.threads = inner, inner.threads
        self._ask, self._times = ask, list[float]()
        self.stored: list[tuple[int, Any]] = []

    def gather(self) -> Any:
        finished = self.inner.gather()
        self._times += [time.perf_counter()] * len(finished)
        self.stored.append((len(self._times), self._ask()))
        return finished

    @property
    def best_rate(self) -> float:
        """Candidates a second in the best window of 16, from the fifth on, when all workers are at work."""
        times = np.array(self._times[4:])
        return float(15 / (times[15:] - times[:-15]).min())

    def submit(self, *args: Any) -> None:
        self.inner.submit(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass(frozen=True)
class _Nothing:
    """A context for workers that do not evaluate."""

    model: torch.nn.Module
    subsets: Subsets


def on_own_ray(measure: Callable[[Any], Any]) -> Any:
    """Call `measure` with a Ray of its own, and return its result."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        return measure(ray)
    finally:
        ray.shutdown()


def limit(some: Callable[[int], int], known: dict[str, Any]) -> list[dict[str, Any]]:
    if "messages" not in known:
        raise SystemExit("limit adds what messages cost: run the part messages before it")
    cases = [
        (optimizer, workers, seconds, sigma, some(min(6 * workers, 30_000)))
        for optimizer, workers, seconds, sigma in (
            ("random", 1_000, 1.0, 0.1),
            ("level_switch", 1_000, 1.0, 0.1),
            ("level_switch", 1_000, 1.0, 1.0),
            ("level_switch", 1_000, 10.0, 1.0),
            ("auto", 1_000, 10.0, 1.0),
            ("level_switch", 10_000, 10.0, 1.0),
            ("level_switch", 10_000, 60.0, 1.0),
        )
    ]
    return driver_limit(cases, known["messages"]["found"]["thread"])


THROUGHPUT = {"random": 10_000, "level_switch": 10_000, "nsga2": 10_000, "bayes": 400, "auto": 2_000}
PARTS: dict[str, Callable[[Callable[[int], int], dict[str, Any]], Any]] = {
    "utilisation": lambda some, known: simulated_utilisation(some(4_000)),
    "ray": lambda some, known: on_own_ray(lambda ray: utilisation_on_ray(ray, some(1_000))),
    "throughput": lambda some, known: throughput({name: some(count) for name, count in THROUGHPUT.items()}),
    "messages": lambda some, known: on_own_ray(lambda ray: cost_of_messages(ray, some(1_000), some(4_000))),
    "limit": limit,
    "real": lambda some, known: real_workers(40, 512),
    "store": lambda some, known: stores(some(1_000), 512),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="by default all")
    parser.add_argument("--small", action="store_true", help="a hundredth of the trials, to see that it runs; no file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    search(DIMENSIONS, trials=8)  # imports
    results: dict[str, Any] = {}
    for part in options.parts or PARTS:
        where = environment(COMMAND)
        if not options.small:
            results = earlier(where)
        found = PARTS[part](lambda trials: max(trials // 100, 8 * WORKERS) if options.small else trials, results)
        if not options.small:
            results = earlier(where)  # another part may have ended meanwhile
        results |= {"environment": where, part: {"load_1min": where["load_1min"], "found": found}}
        text, met = report(results)
        if options.small:
            print(text)
        else:
            write("scaling", "Scaling", {**results, "met": met}, text)
    return 0 if met else 1


def earlier(where: dict[str, Any]) -> dict[str, Any]:
    """Read results of earlier parts, on the same machine with the same versions."""
    path = RESULTS / "scaling.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    same = {**known.get("environment", {}), "load_1min": where["load_1min"]} == where
    return {part: known[part] for part in PARTS if part in known} if same else {}


def sustained(row: dict[str, Any]) -> float:
    """Efficiency when what waits at the workers in the beginning is used up: no more than the driver can serve."""
    served: float = row["seconds"] / (row["workers"] * row["ms_a_trial"] / 1000)
    return min(row["efficiency"], served)


def report(results: dict[str, Any]) -> tuple[str, bool]:
    """Markdown, and whether every target of what was measured is met."""
    parts, targets = [], {}
    known = {part: results[part]["found"] for part in PARTS if part in results}
    if found := known.get("utilisation"):
        targets["utilisation above 95 %"] = found["level_switch, steady state"] > 0.95
        rows = [(name, f"{value:.1%}") for name, value in found.items()]
        parts.append(table(("64 workers, lognormal times (sigma 1)", "utilisation"), rows))
    if found := known.get("ray"):
        targets["utilisation on Ray above 95 %"] = found > 0.95
        parts.append(f"64 workers of Ray, really asleep for lognormal times (median 2 s): utilisation {found:.1%}.")
    if found := known.get("throughput"):
        targets["300 trials a second"] = min(found["random"], found["level_switch"]) > 300
        rows = [(name, f"{value:.0f}") for name, value in found.items()]
        parts.append(table(("optimizer", "trials a second of the driver, journal on"), rows))
    if found := known.get("messages"):
        parts.append(
            f"Messages of Ray for each task: {1000 * found['thread']:.2f} ms of the thread that searches, with all "
            f"threads of Ray {1000 * found['process']:.2f} ms, which have another core."
        )
    if found := known.get("limit"):
        first = [sustained(row) for row in found if (row["workers"], row["seconds"]) == (1_000, 1.0)]
        targets["efficiency above 90 % with 1,000 workers and 1 s"] = min(first) > 0.9
        header = ("optimizer", "workers", "mean seconds", "sigma", "efficiency", "sustained", "driver, ms a trial")
        rows = [
            (
                row["optimizer"],
                f"{row['workers']:,}",
                f"{row['seconds']:g}",
                f"{row['sigma']:g}",
                f"{row['efficiency']:.1%}",
                f"{sustained(row):.1%}",
                f"{row['ms_a_trial']:.2f}",
            )
            for row in found
        ]
        parts.append(table(header, rows))
    if found := known.get("real"):
        ratio = found["2 x 1 thread"] / found["1 x 1 thread"]
        targets[f"two workers at least 1.7 times one ({ratio:.2f})"] = ratio >= 1.7
        rows = [(name, f"{rate:.2f}") for name, rate in found.items()]
        parts.append(table(("ResNet-20 at 32x32", "candidates a second, best 16 in a row"), rows))
    if found := known.get("store"):
        targets["model and data stored once on each node"] = found["most_objects_on_a_node"] == 1
        rows = [
            (after["results"], *(f"{node['objects']}, {node['mb']:.1f} MB" for node in after["nodes"]))
            for after in found["after"]
        ]
        parts.append(f"Object stores of two nodes with two workers each; the samples are {found['samples_mb']:.1f} MB.")
        parts.append(table(("results so far", "objects on the first node", "on the second"), rows))
    verdicts = [f"- {name}: {'met' if met else 'NOT met'}" for name, met in targets.items()]
    loads = ", ".join(f"{part} {results[part]['load_1min']}" for part in known)
    parts += ["\n".join(verdicts), f"Load before each part: {loads}."]
    return "\n\n".join(parts), all(targets.values())


if __name__ == "__main__":
    sys.exit(main())
