"""Random networks over tokens whose code takes sizes from shapes, some of their modules delivered as graphs.

Run ``python -m benchmarks.structure.fuzz_rewriting`` from the root of the repository, about two hours on one thread for
2,000 networks (``--networks 100`` for a look); it goes on where it stopped. It exits with 1 when a network is wrong or
its residual width stays.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings

from benchmarks.support.common import RESULTS, environment, table, write
from tests.rewriting import TOKEN_SPECS, Rewritten, TokenSpec, check_tokens

COMMAND = "python -m benchmarks.structure.fuzz_rewriting"
FOUND = RESULTS / "fuzz_rewriting.json"
CHUNK = 50


def run_chunk(number: int) -> dict[str, Any]:
    """Check `CHUNK` networks of one seed: numbers of networks, graphs and groups, and what failed."""
    total, failures = Rewritten(), Counter[str]()

    @seed(number)
    @settings(max_examples=CHUNK, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(TOKEN_SPECS)
    def run(spec: TokenSpec) -> None:
        try:
            found = check_tokens(spec, candidates=1)
        except Exception as error:  # whatever a random network brings to light is a finding
            failures[f"{spec!r}: {type(error).__name__}: {str(error)[:200]}"] += 1
            return
        total.add(found)
        if found.stuck:
            failures[f"{spec!r}: its residual width stays"] += 1

    began = time.process_time()
    run()
    return {**asdict(total), "failures": dict(failures), "seconds": round(time.process_time() - began, 1)}


def report(chunks: Mapping[str, Mapping[str, Any]], where: Mapping[str, Any]) -> bool:
    """Write the table, and return whether the target is met."""

    def total(key: str) -> float:
        return sum(chunk[key] for chunk in chunks.values())

    failures = sum((Counter(chunk["failures"]) for chunk in chunks.values()), Counter[str]())
    rows = [
        ("networks right", total("networks") - total("stuck")),
        ("networks wrong, or short of their residual width", sum(failures.values())),
        ("modules delivered as graphs", total("graphs")),
        ("groups of units", total("groups")),
        ("processor seconds a network", f"{total('seconds') / (CHUNK * len(chunks)):.1f}"),
    ]
    text = (
        "One random pruning of each network: outputs equal the masked dense network in 64-bit floats, at the sizes "
        "traced and at others; dense is bit-identical, FLOPs and parameters equal those counted, and every parameter "
        f"gets a gradient in training.\n\n{table(('', ''), rows)}\n\n"
        + "".join(f"- `{failure}`\n" for failure in failures)
        + f"\nTarget (all right) {'NOT met' if failures else 'met'}."
    )
    write(
        "fuzz_rewriting",
        "Random networks with rewritten modules",
        {"environment": where, "met": not failures, "chunks": dict(chunks)},
        text,
    )
    return not failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=2000)
    networks = parser.parse_args().networks
    torch.set_num_threads(1)
    where = environment(f"{COMMAND} --networks {networks}")
    chunks: dict[str, Any] = json.loads(FOUND.read_text())["chunks"] if FOUND.exists() else {}
    met = not any(chunk["failures"] for chunk in chunks.values())
    for number in range(-(-networks // CHUNK)):
        if str(number) not in chunks:
            chunks[str(number)] = run_chunk(number)
            met = report(chunks, where)
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
