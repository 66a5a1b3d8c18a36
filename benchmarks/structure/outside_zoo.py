"""Architectures that nobody here wrote: one of every family of timm, and 30 of torchvision's.

Run ``python -m benchmarks.structure.outside_zoo`` from the root of the repository: about an hour on one thread; it goes
on where it stopped, ``--again`` repeats what was short, names repeat these alone, and ``--inspections`` repeats no more
of them than the inspection. Needs timm and torchvision, both of which install without their dependencies. Each network
(random weights) runs in a process of its own, so that one that dies harms no other. It is inspected, searched (4 random
candidates at 70 % of the FLOPs), built, and what was built is counted, run at another batch size, and trained for one
step.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import autoprune
from benchmarks.structure.outside_models import TIMM, TORCHVISION, TRANSFORMERS
from benchmarks.support.common import RESULTS, environment, table, write
from benchmarks.support.outside_libraries import name_operators
from tests.counting import counted_macs

COMMAND = "python -m benchmarks.structure.outside_zoo"
FOUND = RESULTS / "outside_zoo.json"
INSPECT_SECONDS = 30
"""Processor time that an inspection may take."""

MOST_SECONDS = 400
"""Processor time after which a network's process is ended."""

REACH = {"CNN": 0.85, "transformer": 0.80}
"""Share of the FLOPs that must be reachable."""

BATCH, FURTHER = 2, 3
"""Samples of the traced batch, and of the other one."""


def created(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network with random weights, by ``library/name``, and the shape of one input sample."""
    _library = name_operators()
    source, _, model = name.partition("/")
    torch.manual_seed(0)
    if source == "timm":
        import timm

        settings = dict(TIMM[model])
        size = settings.pop("input", settings.get("img_size"))
        network = timm.create_model(model, **settings)
        return network, (3, size, size) if size else tuple(network.default_cfg["input_size"])
    from torchvision import models

    folder, _, model = model.rpartition("/")
    extra = {"weights_backbone": None} if folder == "segmentation" else {}
    extra |= {"init_weights": True} if model in ("googlenet", "inception_v3") else {}
    network = getattr(getattr(models, folder) if folder else models, model)(weights=None, **extra)
    return network, TORCHVISION[name.partition("/")[2]]


def tensors(outputs: Any) -> list[Tensor]:
    """Floating-point tensors of what a model returned."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def examine(name: str, inspection: bool = False) -> Iterator[dict[str, Any]]:
    """Steps of one network, each as soon as it is done, so that a process that dies leaves what it found.

    Args:
        name: ``library/name``.
        inspection: End after the inspection.
    """
    model, size = created(name)
    model.eval()
    x = torch.randn(BATCH + FURTHER, *size)
    yield {"params": sum(p.numel() for p in model.parameters()), "input": size}
    began = time.process_time()
    with torch.no_grad():
        shapes = [tuple(out.shape[1:]) for out in tensors(model(x[:BATCH]))]
    yield {"forward_seconds": round(time.process_time() - began, 2)}
    began = time.process_time()
    found = autoprune.inspect(model, x[:BATCH], space=autoprune.Channels(step=1, min_fraction=1e-9))
    reasons: dict[str, float] = {}
    for part in found.frozen:
        reasons[part.reason] = reasons.get(part.reason, 0.0) + part.params_share
    stays = sorted(reasons.items(), key=lambda item: -item[1])[:4]
    yield {
        "inspect_seconds": round(time.process_time() - began, 1),
        "reach": found.removable["flops"],
        "groups": len(found.groups),
        "stays": [f"{share:.0%} {reason}"[:200] for reason, share in stays],
    }
    if inspection:
        return
    began = time.process_time()
    data = autoprune.Data(calibration=(x[:BATCH],), validation=(x[BATCH:],), test=(x[:BATCH],), batch_size=BATCH)
    result = autoprune.search(
        model,
        "flops <= 70%",
        data,
        trials=4,
        optimizer="random",
        space=autoprune.Channels(),
        seed=0,
        execution=autoprune.Execution(progress=False),
    )
    failed = [trial.reason for trial in result.trials if trial.status == "failed"]
    yield {"search_seconds": round(time.process_time() - began, 1), "failed": failed, "notes": len(result.notes)}
    yield checked(model, result, x, shapes)


def checked(
    model: nn.Module, result: autoprune.SearchResult, x: Tensor, shapes: list[tuple[int, ...]]
) -> dict[str, Any]:
    """Faults of every network built; an empty list where all is right."""
    faults = []
    for trial in result.trials:
        small = result.build(trial).eval()
        macs = counted_macs(small, lambda built: built(x[:BATCH]))
        if macs != trial.costs["flops"] * BATCH:
            faults.append(f"flops said {trial.costs['flops']}, counted {macs / BATCH}")
        params = sum(p.numel() for p in small.parameters())
        if params != trial.costs["params"]:
            faults.append(f"params said {trial.costs['params']}, counted {params}")
        with torch.no_grad():
            again = tensors(small(x[:FURTHER]))
        if [tuple(out.shape[1:]) for out in again] != shapes or not all(torch.isfinite(out).all() for out in again):
            faults.append("outputs of another batch size have other shapes, or are not finite")
        faults += [f"training: {fault}" for fault in untrained(model, small, x[:BATCH])]
    return {"built": len(result.trials), "faults": sorted(set(faults))[:6]}


def untrained(model: nn.Module, small: nn.Module, x: Tensor) -> list[str]:
    """Parameters without a gradient in the pruned network that have one in the dense one, or what was raised."""
    try:
        missing = [_without_gradient(network, x) for network in (small, model)]
    except Exception as error:  # whatever a forward in training mode raises is what this looks for
        return [f"{type(error).__name__}: {error}"[:200]]
    return [f"{name} has no gradient" for name in sorted(missing[0] - missing[1])][:3]


def _without_gradient(network: nn.Module, x: Tensor) -> set[str]:
    network.train()
    network.zero_grad()
    sum(out.float().mean() for out in tensors(network(x))).backward()
    return {name for name, parameter in network.named_parameters() if parameter.grad is None}


def run_one(name: str, inspection: bool) -> None:
    """Print the steps of one network as lines of JSON."""
    torch.set_num_threads(1)
    try:
        for step in examine(name, inspection):
            print(json.dumps(step), flush=True)
    except Exception as error:  # the report is about whatever goes wrong
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:400]}), flush=True)


def in_a_process(name: str, inspection: bool) -> dict[str, Any]:
    """Examine one network in a process, and return its output and how it ended; arguments as in `examine`."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS + 5))

    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.structure.outside_zoo", "--one", name]
    command += ["--inspections"] if inspection else []
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    if done.returncode < 0:
        found["error"] = f"killed by {signal.Signals(-done.returncode).name}"
    elif done.returncode:
        found["error"] = done.stderr.strip().splitlines()[-1][:300]
    return found


def kind_of(name: str) -> str:
    """``"transformer"`` or ``"CNN"``."""
    return "transformer" if name in TRANSFORMERS else "CNN"


def shortfalls(name: str, found: Mapping[str, Any]) -> list[str]:
    """List the targets that a network misses, in words; empty if it meets all."""
    short = []
    if "error" in found:
        short.append(str(found["error"]))
    if found.get("inspect_seconds", 0) > INSPECT_SECONDS:
        short.append(f"inspected in {found['inspect_seconds']} s")
    if found.get("reach", 1.0) < REACH[kind_of(name)]:
        short.append(f"{found['reach']:.1%} reachable")
    if found.get("failed"):
        short.append(f"{len(found['failed'])} of 4 trials failed: {found['failed'][0]}")
    return [*short, *found.get("faults", [])]


def report(results: Mapping[str, Mapping[str, Any]], where: Mapping[str, Any]) -> None:
    """Write the tables."""
    short = {name: shortfalls(name, found) for name, found in results.items()}
    right = sum(not reasons for reasons in short.values())
    fast = sum(found.get("inspect_seconds", 1e9) <= INSPECT_SECONDS for found in results.values())
    reach = sum(found.get("reach", 0.0) >= REACH[kind_of(name)] for name, found in results.items())
    crashed = [name for name, found in results.items() if "killed" in str(found.get("error"))]
    header = ("network", "kind", "params", "inspect s", "reachable", "short of")
    rows = [
        (
            name,
            kind_of(name),
            f"{found.get('params', 0) / 1e6:.1f} M",
            found.get("inspect_seconds", "-"),
            f"{found['reach']:.1%}" if "reach" in found else "-",
            "; ".join(short[name]).replace("|", "/") or "",
        )
        for name, found in results.items()
    ]
    text = (
        f"{len(results)} networks: {right} meet every target; {fast} inspected within {INSPECT_SECONDS} s of processor "
        f"time; {reach} ({reach / len(results):.1%}, target 95 %) with 85 % (CNN) or 80 % (transformer) of the FLOPs "
        f"reachable; processes killed: {', '.join(crashed) or 'none'}.\n\n{table(header, rows)}"
    )
    saved = {"environment": where, "networks": dict(results)}
    write("outside_zoo", "Architectures from outside", saved, text)


def main() -> None:
    """Examine every network not examined yet, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only networks whose name contains one of these, again")
    parser.add_argument("--one", metavar="NAME", help="examine one network in this process")
    parser.add_argument("--again", action="store_true", help="repeat the networks that fell short")
    parser.add_argument(
        "--inspections", action="store_true", help="repeat inspections alone, and keep what else is known"
    )
    chosen = parser.parse_args()
    if chosen.one:
        run_one(chosen.one, chosen.inspections)
        return
    name_operators()
    results: dict[str, Any] = json.loads(FOUND.read_text())["networks"] if FOUND.exists() else {}
    everything = [*(f"timm/{name}" for name in TIMM), *(f"torchvision/{name}" for name in TORCHVISION)]
    where = environment(COMMAND)
    for name in everything:
        named = any(part in name for part in chosen.names)
        repeat = chosen.again and shortfalls(name, results.get(name, {}))
        if named or repeat or (name not in results and not chosen.names):
            known = results.get(name, {}) if chosen.inspections else {}
            results[name] = known | in_a_process(name, chosen.inspections)
            print(name, shortfalls(name, results[name]) or "ok", file=sys.stderr, flush=True)
            Path(FOUND).write_text(json.dumps({"environment": where, "networks": results}, indent=1))
    report({name: results[name] for name in everything if name in results}, where)


if __name__ == "__main__":
    main()
