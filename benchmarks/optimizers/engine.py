"""Overhead of a search with `auto`: its time without the evaluation of candidates.

Run ``python -m benchmarks.optimizers.engine`` from the root of the repository, about 4 minutes on one thread; exits
with 1 when the target is missed. Processor time of one search with 200 trials on a ResNet-20 at 32x32, 512 calibration
and 512 validation samples: what the evaluator takes, and everything else from the first ask on (proposals, costs,
journal, fronts). Tracing, ranking and the first forward passes are reported apart, and imports are not counted.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import autoprune
from autoprune.evaluators import AdaptiveBN, Context
from autoprune.protocols import Failure, IntArray, Measurement
from benchmarks.support.common import environment, table, write
from zoo import resnet

COMMAND = "python -m benchmarks.optimizers.engine"
TRIALS, SAMPLES, MOST_SHARE = 200, 512, 0.05


class Timed:
    """An evaluator that adds up its own processor time."""

    def __init__(self) -> None:
        self.inner = AdaptiveBN()
        self.seconds = {"prepare": 0.0, "evaluate": 0.0, "test": 0.0}
        self.prepared = 0.0

    def prepare(self, context: Context) -> None:
        self._time("prepare", lambda: self.inner.prepare(context))
        self.prepared = time.process_time()

    def evaluate(self, candidates: IntArray, chunk: slice | None = None) -> list[Measurement | Failure]:
        return self._time("evaluate", lambda: self.inner.evaluate(candidates, chunk))

    def test(self, candidate: IntArray) -> Measurement | Failure:
        return self._time("test", lambda: self.inner.test(candidate))

    def build(self, candidate: IntArray) -> nn.Module:
        return self.inner.build(candidate)

    def _time(self, what: str, run: Callable[[], Any]) -> Any:
        began = time.process_time()
        try:
            return run()
        finally:
            self.seconds[what] += time.process_time() - began


def main() -> int:
    torch.set_num_threads(1)
    where = environment(COMMAND)
    torch.manual_seed(0)
    model = resnet(20, width=16).eval()
    x, y = torch.randn(3 * SAMPLES, 3, 32, 32), torch.randint(0, 10, (3 * SAMPLES,))
    parts = [(x[i * SAMPLES : (i + 1) * SAMPLES], y[i * SAMPLES : (i + 1) * SAMPLES]) for i in range(3)]
    data = autoprune.Data(*parts, calibration_samples=SAMPLES, validation_samples=SAMPLES)
    small = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
    autoprune.search(
        small, "flops <= 50%", (x[:90, 0, 0, :4], y[:90]), trials=40, execution=autoprune.Execution(progress=False)
    )  # imports
    timed = Timed()
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        autoprune.search(
            model,
            "flops <= 50%",
            data,
            evaluator=timed,
            trials=TRIALS,
            execution=autoprune.Execution(run_dir=f"{folder}/run", progress=False),
        )
    ended = time.process_time()
    engine = ended - timed.prepared - timed.seconds["evaluate"] - timed.seconds["test"]
    share = engine / timed.seconds["evaluate"]
    met = share <= MOST_SHARE
    rows = [
        ("tracing, checks, ranking, expected losses, dense outputs", f"{timed.prepared - began:.1f}"),
        (f"evaluating {TRIALS} candidates and the dense model", f"{timed.seconds['evaluate']:.1f}"),
        ("test scores of the front", f"{timed.seconds['test']:.1f}"),
        ("everything else: proposals, costs, journal, fronts", f"{engine:.1f}"),
        ("of the evaluator's time", f"{share:.1%}"),
    ]
    verdict = f"Target (at most {MOST_SHARE:.0%}) {'met' if met else 'NOT met'}."
    text = f"{table(('', 'seconds of processor time'), rows)}\n\n{verdict}"
    results = {"environment": where, "met": met, "engine": engine, "share": share, "seconds": timed.seconds}
    write("engine", "What the engine takes", results, text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
