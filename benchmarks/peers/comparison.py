"""The same networks pruned to the same FLOPs by ours and by what others use: accuracy before and after fine-tuning.

Run ``python -m benchmarks.peers.comparison`` from the root of the repository; needs ``pip install -e '.[bench]'``.
Exits with 1 when a target is missed. For every seed (a split of the data, a trained network) each method is a job of
its own, and what it found is kept in ``runs/peers``: an interrupted run goes on where it was, and a new method is run
alone. Jobs of others are repeated when `peer_methods` or `trained` changes, ours when any source of the package does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import methods as methods
from benchmarks.peers.report import missed, plot, report
from benchmarks.support import trained
from benchmarks.support.common import RESULTS, environment, write

COMMAND = "python -m benchmarks.peers.comparison"
FOLDER = Path("runs") / "peers"
SEEDS = 5
PAIRS = {
    "resnet20, hard digits": ("resnet20", True),
    "mobilenet_v2, hard digits": ("mobilenet_v2", True),
    "resnet20, clean digits": ("resnet20", False),
}
PEERS: dict[str, methods.Method] = {
    "uniform L1": partial(methods.uniform, criterion="l1"),
    "uniform L2": partial(methods.uniform, criterion="l2"),
    "torch-pruning L2": partial(methods.torch_pruning, importance="MagnitudeImportance"),
    "torch-pruning Taylor": partial(methods.torch_pruning, importance="TaylorImportance"),
    "torch-pruning BN scale": partial(methods.torch_pruning, importance="BNScaleImportance"),
    "EagleEye": methods.eagleeye,
    "FastNAS": methods.fastnas,
}
OURS: dict[str, methods.Method] = {
    "uniform L2, compensated": partial(methods.uniform, criterion="l2", evaluator="compensated"),
    "autoprune auto": partial(methods.ours, optimizer="auto"),
}
"""The last one is what the targets are about; the first has its weights re-fitted like it, but no search."""

Job = tuple[str, int, str]


def file_of(job: Job) -> Path:
    """File of the outcome of a job, with a name that changes with the code that makes it."""
    pair, seed, method = job
    sources = [Path(module.__file__ or "") for module in (methods, trained)]
    if method in OURS:
        sources += sorted(
            p for folder in ("autoprune", "evaluators", "search_spaces") for p in Path(folder).rglob("*.py")
        )
    digest = hashlib.sha1(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]
    words = f"{pair} {seed} {method} {digest}".replace(",", "").split()
    return FOLDER / ("-".join(words) + ".json")


def run(job: Job) -> dict[str, Any]:
    """The outcome of a job, from its file if it was run before."""
    pair, seed, method = job
    path = file_of(job)
    if not path.exists():
        torch.set_num_threads(1)
        network = train(pair, seed)
        accuracy, loss = trained.score(network.model, network.data["test"])
        outcome = {
            "pair": pair,
            "seed": seed,
            "method": method,
            "dense": {"accuracy": accuracy, "loss": loss},
            **methods.judge(methods.Case(network, seed), (PEERS | OURS)[method]),
        }
        partly = path.with_suffix(".part")
        partly.write_text(json.dumps(outcome))
        partly.rename(path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def train(pair: str, seed: int) -> trained.Trained:
    torch.set_num_threads(1)
    network, hard = PAIRS[pair]
    return trained.trained(network, seed, hard)


def run_all(pairs: Sequence[str], seeds: int, processes: int, names: Iterable[str]) -> list[dict[str, Any]]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    networks = list(product(pairs, range(seeds)))
    jobs = [(pair, seed, method) for pair, seed in networks for method in names]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(train, *zip(*networks, strict=True)))  # before the jobs, or several would train the same network
        return list(pool.map(run, jobs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"fewer than {SEEDS} make a trial, kept in {FOLDER}")
    parser.add_argument("--pair", choices=PAIRS, help="one pair alone makes a trial, too")
    parser.add_argument("--ours", action="store_true", help="run ours alone, next to the others' runs in the results")
    arguments = parser.parse_args()
    pairs = [arguments.pair] if arguments.pair else list(PAIRS)
    stored: list[dict[str, Any]] = []
    if arguments.ours:
        kept = json.loads((RESULTS / "peers.json").read_text())["runs"]
        stored = [each for each in kept if each["method"] in PEERS and each["pair"] in pairs]
    else:
        methods.require_torch_pruning()
    torch.set_num_threads(1)
    where = environment(f"{COMMAND} --ours" if arguments.ours else COMMAND)
    names = OURS if arguments.ours else PEERS | OURS
    runs = run_all(pairs, arguments.seeds, arguments.jobs, names)
    runs += [each for each in stored if each["seed"] < arguments.seeds]
    judged = list(OURS)[-1]
    text, failures = report(runs, list(PEERS), list(OURS)), missed(runs, list(PEERS), judged)
    if (pairs, arguments.seeds) == (list(PAIRS), SEEDS):
        results = {"environment": where, "missed": failures, "runs": runs}
        write("peers", "Pruned to the same FLOPs by ours and by others", results, text)
        plot(runs, list(PEERS | OURS), judged, RESULTS / "peers.png")
    else:
        plot(runs, list(PEERS | OURS), judged, FOLDER / "trial.png")
        print(text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
