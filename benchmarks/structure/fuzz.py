"""Random networks by the thousand: is what is built from every one right, and how much of them stays?

Run ``python -m benchmarks.structure.fuzz`` from the root of the repository, about 10 minutes on one thread; exits with
1 when a network fails or too much stays. Networks come in chunks of their own seeds, so that one failure, shrunk to its
smallest form and printed as code, costs the rest of its chunk and no more.
"""

from __future__ import annotations

import sys
import time
from collections import Counter

import numpy as np
import torch
from hypothesis import HealthCheck, given, seed, settings

from benchmarks.support.common import environment, table, write
from tests.fuzzing import MOST_FROZEN, SPECS, Spec, Tally, check, kinds

COMMAND = "python -m benchmarks.structure.fuzz"
NETWORKS, CHUNK = 2000, 100


def run_chunk(number: int, total: Tally, used: Counter[str], seconds: list[float]) -> str | None:
    """Check one chunk, counting into `total`, `used` and `seconds`; the smallest failing network as code, if any."""
    failing: list[Spec] = []

    @seed(number)
    @settings(max_examples=CHUNK, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(SPECS)
    def run(spec: Spec) -> None:
        began = time.perf_counter()
        try:
            total.add(check(spec))
        except Exception:  # noted, and raised again
            failing.append(spec)
            raise
        seconds.append(time.perf_counter() - began)
        used.update(kinds(spec.layers))

    try:
        run()
    except Exception as error:  # whatever a random network brings to light is a finding
        return f"{failing[-1]!r}: {type(error).__name__}: {str(error)[:200]}"  # shrinking ends with the smallest
    return None


def main() -> int:
    torch.set_num_threads(1)
    where = environment(COMMAND)
    total, used, seconds, failures = Tally(), Counter[str](), [], []
    for number in range(NETWORKS // CHUNK):
        failure = run_chunk(number, total, used, seconds)
        failures += [] if failure is None else [failure]
        print(f"{total}, {len(failures)} failures", file=sys.stderr, flush=True)
    share = total.frozen / total.producers
    met = not failures and share <= MOST_FROZEN
    rows = [
        ("networks right", total.networks),
        ("networks wrong (shrunk)", len(failures)),
        ("layers that make channels", total.producers),
        ("of these, some channel stays", f"{total.frozen} ({share:.1%})"),
        ("seconds a network, median", f"{np.median(seconds):.2f}"),
        ("seconds a network, slowest", f"{max(seconds):.1f}"),
    ]
    text = (
        "Two random prunings of each network: outputs equal the masked dense network in 64-bit floats, dense is "
        "bit-identical, FLOPs and parameters equal those counted. Layers that make the outputs are left out.\n\n"
        f"{table(('', ''), rows)}\n\n{table(('layer', 'times used'), used.most_common())}\n\n"
        + "".join(f"- `{failure}`\n" for failure in failures)
        + f"\nAll targets {'met' if met else 'NOT met'}."
    )
    results = {
        "environment": where,
        "met": met,
        "networks": total.networks,
        "producers": total.producers,
        "frozen": total.frozen,
        "used": dict(used),
        "failures": failures,
    }
    write("fuzz", "Random networks", results, text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
