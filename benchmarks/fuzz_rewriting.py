"""Random networks over tokens whose code takes sizes from shapes, some of their modules delivered as graphs.

Run ``python -m benchmarks.fuzz_rewriting`` from the root of the repository, about two hours on one thread for 2,000
networks (``--networks 100`` for a look); exits with 1 when one is wrong or its residual width stays.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import torch
from hypothesis import HealthCheck, given, seed, settings

from benchmarks.common import environment, table, write
from tests.rewriting import TOKEN_SPECS, Rewritten, TokenSpec, check_tokens

COMMAND = "python -m benchmarks.fuzz_rewriting"
CHUNK = 50


def run_chunk(number: int, count: int, total: Rewritten, failures: Counter[str]) -> None:
    """Check `count` networks of one seed, counting into `total` and `failures`."""

    @seed(number)
    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
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

    run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=2000)
    networks = parser.parse_args().networks
    torch.set_num_threads(1)
    where = environment(f"{COMMAND} --networks {networks}")
    total, failures = Rewritten(), Counter[str]()
    began = time.process_time()
    for number in range(-(-networks // CHUNK)):
        run_chunk(number, min(CHUNK, networks - number * CHUNK), total, failures)
        print(f"{total}, {len(failures)} failures", file=sys.stderr, flush=True)
    rows = [
        ("networks right", total.networks - total.stuck),
        ("networks wrong, or short of their residual width", sum(failures.values())),
        ("modules delivered as graphs", total.graphs),
        ("groups of units", total.groups),
        ("processor seconds a network", f"{(time.process_time() - began) / networks:.1f}"),
    ]
    text = (
        "One random pruning of each network: outputs equal the masked dense network in 64-bit floats, at the sizes "
        "traced and at others; dense is bit-identical, FLOPs and parameters equal those counted, and every parameter "
        f"gets a gradient in training.\n\n{table(('', ''), rows)}\n\n"
        + "".join(f"- `{failure}`\n" for failure in failures)
        + f"\nTarget (all right) {'NOT met' if failures else 'met'}."
    )
    results = {"environment": where, "met": not failures, "networks": total.networks, "failures": dict(failures)}
    write("fuzz_rewriting", "Random networks with rewritten modules", results, text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
