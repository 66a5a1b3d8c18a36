"""How far a search scales: utilisation of workers, the driver's throughput, and where its limit lies.

Run ``python -m benchmarks.scaling`` from the root of the repository (about 6 minutes on two quiet cores); exits with 1
when a target is missed. Apart from the parts that say so, workers are simulated (`benchmarks.simulated`): the search,
its optimizer and its journal on disk are real and timed by their processor time, evaluations only take simulated time.

- utilisation: 64 workers, lognormal evaluation times of sigma 1, between the first and the last ask. Beside it NSGA-II
  that waits for a whole generation of 64.
- utilisation on Ray (``ray``): the same with real sleeps in 64 workers of Ray, which share one asynchronous process.
- throughput: 64 workers that need no time, so that the driver is all there is.
- the driver's limit: 1,000 and 10,000 workers; what Ray's messages cost is measured on as many sleeping workers of Ray
  and added to each task. The time starts once the driver has given every worker its first candidates.
- real workers (``real``): ResNet-20 at 32x32 on one and on two workers of Ray with one thread each, and on one with two
  threads; and what is in Ray's object store meanwhile. For a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import autoprune
from autoprune.evaluators import AdaptiveBN
from autoprune.execution import RayExecutor
from benchmarks.common import environment, table, write
from benchmarks.ray_load import ManyWorkers
from benchmarks.simulated import SimulatedWorkers, lognormal, search, utilisation
from tests.zoo import resnet

COMMAND = "python -m benchmarks.scaling"
DIMENSIONS, WORKERS = 30, 64
PARTS = ("utilisation", "ray", "throughput", "limit", "real")


def run(executor: Any, trials: int, optimizer: str = "level_switch", **options: Any) -> autoprune.SearchResult:
    with tempfile.TemporaryDirectory() as folder:
        return search(DIMENSIONS, trials=trials, optimizer=optimizer, executor=executor, run_dir=folder, **options)


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


def cost_of_messages(ray: Any, workers: int, tasks: int) -> float:
    """Seconds of processor time of the driver for each task sent to Ray and its result, with so many workers."""
    executor, rng = ManyWorkers(ray, workers, median=1.0, sigma=0.1), np.random.default_rng(0)
    executor.start(None, _Nothing(), None)
    sent = done = 0
    began = time.process_time()
    while done < tasks:
        if room := min(executor.room(), tasks - sent):
            executor.submit(list(range(sent, sent + room)), rng.integers(0, 16, size=(room, DIMENSIONS)), [None] * room)
            sent += room
        done += len(executor.gather())
    took = time.process_time() - began
    executor.stop()
    return took / tasks


def driver_limit(cases: list[tuple[str, int, float, float, int]], overhead: dict[int, float]) -> list[dict[str, Any]]:
    """Efficiency for (optimizer, workers, mean seconds, sigma, trials), once all workers have something to do."""
    found = []
    for optimizer, workers, seconds, sigma, trials in cases:
        times: Callable[[], float] = lognormal(0, seconds / math.exp(sigma**2 / 2), sigma)
        executor = SimulatedWorkers(workers, times, overhead=overhead[workers])
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


def real_workers(trials: int, samples: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = resnet(20, width=16).eval()
    x, y = torch.randn(3 * samples, 3, 32, 32), torch.randint(0, 10, (3 * samples,))
    parts = [(x[i * samples : (i + 1) * samples], y[i * samples : (i + 1) * samples]) for i in range(3)]
    data = autoprune.Data(*parts, calibration_samples=samples, validation_samples=samples, test_samples=samples)
    found: dict[str, Any] = {}
    for name, workers, threads in (("1 x 1 thread", 1, 1), ("2 x 1 thread", 2, 1), ("1 x 2 threads", 1, 2)):
        timed = Timed(RayExecutor(workers=workers, threads_per_worker=threads))
        autoprune.search(
            model,
            "flops <= 50%",
            data,
            executor=timed,
            evaluator=AdaptiveBN(),
            optimizer="random",
            trials=trials,
            progress=False,
        )
        found[name] = {"candidates_a_second": timed.rate, "object_store": timed.stored}
        print(name, found[name], flush=True)
    found["ratio"] = found["2 x 1 thread"]["candidates_a_second"] / found["1 x 1 thread"]["candidates_a_second"]
    return found


def _stored() -> str:
    """What Ray's object store holds, in its own words."""
    try:
        from ray._private.internal_api import memory_summary

        summary = memory_summary(stats_only=True)
    except ImportError:
        return "unknown (needs grpcio)"
    found = re.search(r"Plasma memory usage .*", summary)
    return found.group() if found else "unknown"


class Timed:
    """A Ray executor that notes when results come, and what the object store holds while they do."""

    name = "ray"

    def __init__(self, inner: RayExecutor) -> None:
        self.inner, self.threads = inner, inner.threads
        self._times: list[float] = []
        self.stored = ""

    def gather(self) -> Any:
        finished = self.inner.gather()
        self._times += [time.perf_counter()] * len(finished)
        if not self.stored:
            self.stored = _stored()
        return finished

    @property
    def rate(self) -> float:
        """Candidates a second, from the fifth result on, when all workers are at work."""
        return (len(self._times) - 5) / (self._times[-1] - self._times[4])

    def submit(self, *args: Any) -> None:
        self.inner.submit(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Nothing:
    """A context without a model, for workers that do not evaluate."""

    model = torch.nn.Linear(1, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="by default all; a part alone writes no file")
    parser.add_argument("--small", action="store_true", help="a hundredth of the trials, to see that it runs")
    options = parser.parse_args()
    chosen, share = options.parts or PARTS, 0.01 if options.small else 1.0
    torch.set_num_threads(1)
    where = environment(COMMAND)
    search(DIMENSIONS, trials=8)  # imports
    results = measure(chosen, share)
    text, met = report(results)
    if options.parts or options.small:
        print(text)
    else:
        write("scaling", "Scaling", {"environment": where, "met": met, **results}, text)
    return 0 if met else 1


def measure(parts: tuple[str, ...], share: float) -> dict[str, Any]:
    results: dict[str, Any] = {}

    def some(trials: int) -> int:
        return max(int(share * trials), 8 * WORKERS)

    if "utilisation" in parts:
        results["utilisation"] = simulated_utilisation(some(4_000))
    if "throughput" in parts:
        wanted = {"random": 10_000, "level_switch": 10_000, "nsga2": 10_000, "bayes": 400, "auto": 2_000}
        results["throughput"] = throughput({name: some(count) for name, count in wanted.items()})
    overhead = {1_000: 0.0, 10_000: 0.0}
    if {"ray", "limit"} & set(parts):
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="warning")
        try:
            if "ray" in parts:
                results["utilisation on Ray"] = utilisation_on_ray(ray, some(1_000))
            if "limit" in parts:
                overhead = dict.fromkeys(overhead, cost_of_messages(ray, some(1_000), some(4_000)))
                results["messages"] = overhead[1_000]
        finally:
            ray.shutdown()
    if "limit" in parts:
        cases = [
            (optimizer, workers, seconds, sigma, some(6 * workers))
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
        results["limit"] = driver_limit(cases, overhead)
    if "real" in parts:
        results["real"] = real_workers(trials=60 if share == 1 else 8, samples=512 if share == 1 else 32)
    return results


def report(results: dict[str, Any]) -> tuple[str, bool]:
    """Markdown, and whether every target of what was measured is met."""
    parts, targets = [], {}
    if found := results.get("utilisation"):
        targets["utilisation above 95 %"] = found["level_switch, steady state"] > 0.95
        rows = [(name, f"{value:.1%}") for name, value in found.items()]
        parts.append(table(("64 workers, lognormal times (sigma 1)", "utilisation"), rows))
    if found := results.get("utilisation on Ray"):
        targets["utilisation on Ray above 95 %"] = found > 0.95
        parts.append(f"64 workers of Ray, really asleep for lognormal times (median 2 s): utilisation {found:.1%}.")
    if found := results.get("throughput"):
        targets["300 trials a second"] = min(found["random"], found["level_switch"]) > 300
        rows = [(name, f"{value:.0f}") for name, value in found.items()]
        parts.append(table(("optimizer", "trials a second of the driver, journal on"), rows))
    if found := results.get("limit"):
        first = [row["efficiency"] for row in found if (row["workers"], row["seconds"]) == (1_000, 1.0)]
        targets["efficiency above 90 % with 1,000 workers and 1 s"] = min(first) > 0.9
        parts.append(f"Messages of Ray: {1000 * results['messages']:.2f} ms of the driver for each task.")
        header = ("optimizer", "workers", "mean seconds", "sigma", "efficiency", "driver, ms a trial")
        rows = [
            (
                row["optimizer"],
                f"{row['workers']:,}",
                f"{row['seconds']:g}",
                f"{row['sigma']:g}",
                f"{row['efficiency']:.1%}",
                f"{row['ms_a_trial']:.2f}",
            )
            for row in found
        ]
        parts.append(table(header, rows))
    if found := results.get("real"):
        targets["two workers at least 1.7 times one"] = found["ratio"] >= 1.7
        names = [name for name in found if name != "ratio"]
        rows = [(name, f"{found[name]['candidates_a_second']:.2f}", found[name]["object_store"]) for name in names]
        parts.append(table(("ResNet-20 at 32x32", "candidates a second", "Ray's object store"), rows))
    verdicts = [f"- {name}: {'met' if met else 'NOT met'}" for name, met in targets.items()]
    return "\n\n".join([*parts, "\n".join(verdicts)]), all(targets.values())


if __name__ == "__main__":
    sys.exit(main())
