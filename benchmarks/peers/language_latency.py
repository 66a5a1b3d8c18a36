"""SmolLM2-135M at equal measured latency, without training: ours in three spaces against published methods.

A pass over one sequence of 128 tokens is timed, in float32 on one thread, dense and pruned network in turn. Published
methods remove shares of the parameters, and their loss at a latency is read off a line through what they reach; ours
are given the latency as a budget, by a table that is measured first and kept in the folder. Text and calibration are
those of `benchmarks.peers.language`, first draw. Each cell is written when it is done; cells that are there are not
computed again. Needs what that benchmark needs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import autoprune
from benchmarks.evaluators.depth import relative_latency
from benchmarks.peers.language.__main__ import judged
from benchmarks.peers.language.case import Case
from benchmarks.peers.language.methods import PEERS
from benchmarks.peers.language.ours import SPACES, given_text
from benchmarks.peers.language.report import KINDS, best_variant
from benchmarks.peers.language.texts import calibration, held_out
from benchmarks.peers.language_model import load
from benchmarks.support.common import RESULTS, environment, table, write

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.peers.language_latency"
NAME = "language_latency"
TOKENS = 128
COMPARED = ("ShortGPT", "ReplaceMe", "FLAP", "ZipLM")
OURS = ("product", "channels", "depth")
PARAMETERS = (0.9, 0.8, 0.7, 0.6)  # shares that published methods leave
LATENCIES = (0.9, 0.8, 0.7)
NEAR = 0.06  # of the dense latency, between what is told of a method and the nearest of its networks
MOST_LOST = 0.04  # of the dense loss
Found = dict[str, Any]


def published(case: Case, method: str, share: float) -> nn.Module:
    """The network of a published method, in the variant that did best in the benchmark of parameters."""
    variants = PEERS[method]
    known = json.loads((RESULTS / "language_peers.json").read_text())
    return variants[best_variant(known, method) if len(variants) > 1 else next(iter(variants))](case, share)


def ours(case: Case, space: str, share: float, latencies: Path) -> nn.Module:
    """The best network that a search under a latency budget finds."""
    call = autoprune.Call(inputs={"input_ids": case.ids[:1, :TOKENS]}, cost_batch=1)
    if not latencies.exists():
        autoprune.profile(case.model, call, path=latencies)
    result = autoprune.search(
        case.model,
        f"latency <= {share:.0%}",
        given_text(case),
        example=call,
        costs={"latency_ms": str(latencies)},
        metric="next_token",
        space=SPACES[space],
        trials=case.evaluations,
        seed=case.seed,
    )
    case.kept["notes"] = list(result.notes)
    with torch.no_grad():
        return result.build()


@torch.no_grad()
def measure(case: Case, make: Callable[[], nn.Module], texts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Prune, time next to the dense network, and judge once."""
    case.kept.pop("notes", None)
    began = time.process_time()
    with torch.enable_grad():
        network = make().eval()
    seconds = time.process_time() - began
    latency = relative_latency(network.float(), case.model, case.ids[:1, :TOKENS])
    told = {"notes": case.kept["notes"]} if "notes" in case.kept else {}
    return {"latency": latency, "cpu_seconds": round(seconds, 1), **judged(network, case.dtype, dict(texts)), **told}


def curve(found: Found, method: str, kind: str) -> tuple[list[float], list[float]]:
    """Latencies of a method's networks and the dense one, rising, and the least rise of the loss down to each."""
    cells = [cell for name, cell in found["cells"].items() if name.startswith(f"{method} | ")]
    points = sorted([(1.0, 0.0), *((cell["latency"], cell[kind] - found["dense"][kind]) for cell in cells)])
    return [latency for latency, _ in points], list(np.minimum.accumulate([rise for _, rise in points]))


def rise_at(found: Found, method: str, kind: str, latency: float) -> float:
    """Rise of the loss at a latency, by a line between networks; NaN beyond the fastest, or far from all of them."""
    known, rises = curve(found, method, kind)
    if min(abs(latency - each) for each in known[:-1]) > NEAR:  # the last is the dense network
        return float("nan")
    return float(np.interp(latency, known, rises, left=np.nan))


def latency_at(found: Found, method: str, kind: str) -> float:
    """Latency at which a method has lost `MOST_LOST` of the dense loss, by a line between its networks."""
    known, rises = curve(found, method, kind)
    return float(np.interp(-MOST_LOST * found["dense"][kind], [-rise for rise in rises], known))


def report(found: Found) -> str:
    cells, dense = found["cells"], found["dense"]
    names = list(dict.fromkeys(name.partition(" | ")[0] for name in cells))
    peers = [name for name in names if name in COMPARED]
    parts = [
        "SmolLM2-135M, one draw of calibration text. Latency of a pass over 128 tokens as a share of the dense one's, "
        f"measured in turn; dense loss {', '.join(f'{dense[kind]:.3f} on {kind}' for kind in KINDS)}."
    ]
    rows = [
        [
            name.replace(" | ", ", "),
            f"{cell['latency']:.1%}",
            *(f"{cell[kind] - dense[kind]:.3f}" for kind in KINDS),
            cell["cpu_seconds"],
        ]
        for name, cell in cells.items()
    ]
    parts.append(table(["network", "latency", *(f"rise on {kind}, nats" for kind in KINDS), "seconds"], rows))
    for kind in KINDS:
        rows = [[name, *(f"{rise_at(found, name, kind, share):.3f}" for share in LATENCIES)] for name in names]
        if "product" in names and peers:
            best = [np.nanmin([rise_at(found, name, kind, share) for name in peers]) for share in LATENCIES]
            own = [rise_at(found, "product", kind, share) for share in LATENCIES]
            shares = [f"{a / b:.2f}" for a, b in zip(own, best, strict=True)]
            rows.append(["product over the best published", *shares])
        head = [f"rise on {kind} at a latency of", *(f"{share:.0%}" for share in LATENCIES)]
        parts.append(table(head, rows))
    several = [name for name in names if len(curve(found, name, KINDS[0])[0]) > 2]
    rows = [[name, *(f"{latency_at(found, name, kind):.1%}" for kind in KINDS)] for name in several]
    parts.append(f"Latency at which {MOST_LOST:.0%} of the loss are lost:\n\n" + table(["", *KINDS], rows))
    notes = [
        f"{name.replace(' | ', ', ')}: {' '.join(cell['notes'])}" for name, cell in cells.items() if "notes" in cell
    ]
    return "\n\n".join(parts + notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=[*COMPARED, *OURS], choices=[*COMPARED, *OURS])
    parser.add_argument("--latencies", type=float, nargs="+", default=list(LATENCIES), help="budgets of ours")
    parser.add_argument("--evaluations", type=int, default=20, help="candidates of a search")
    parser.add_argument("--table", type=Path, default=Path("runs") / "smollm2-latency.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load()
    options.table.parent.mkdir(parents=True, exist_ok=True)
    texts = held_out(tokenizer)
    stored = RESULTS / f"{NAME}.json"
    found: Found = json.loads(stored.read_text()) if stored.exists() else {"cells": {}}
    found["environment"] = environment(COMMAND)
    case = Case(model, calibration(tokenizer, 0), 0, options.evaluations)
    if "dense" not in found:
        found["dense"] = judged(case.copy(), case.dtype, texts)
    for method in options.methods:
        for share in PARAMETERS if method in COMPARED else options.latencies:
            name = f"{method} | {share:.0%} of the {'parameters' if method in COMPARED else 'latency'}"
            if name in found["cells"]:
                continue
            if method in COMPARED:
                make = partial(published, case, method, share)
            else:
                make = partial(ours, case, method, share, options.table)
            found["cells"][name] = measure(case, make, texts)
            print(name, found["cells"][name], flush=True)
            write(NAME, "A language model at equal latency", found, report(found))


if __name__ == "__main__":
    main()
