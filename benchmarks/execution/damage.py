"""Damaged files by the ten thousand: is each read, or refused in a sentence that names it, and does nothing hang?

Run ``python -m benchmarks.execution.damage`` from the root of the repository (about 8 minutes on one thread); exits
with 1 when a reader raises anything else than `AutopruneError`, `ValueError`, `TypeError` or `OSError` with a sentence
of at most 500 characters that names the file or argument, takes more than 10 seconds, or leaves a file behind. Of every
kind of file: the content cut at each twentieth, 200 bits turned one at a time, and values replaced by others of 14
kinds.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.support.common import environment, table, write
from tests.damaging import KINDS, counted, flips, make_all, truncations

COMMAND = "python -m benchmarks.execution.damage"
INPUTS, FLIPS, CUTS = 20_000, 200, 20


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=INPUTS, help="in all; what cuts and flips leave are edits")
    inputs = parser.parse_args().inputs
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    where, rows, failures = environment(COMMAND), [], []
    edits = max(inputs // len(KINDS) - FLIPS - CUTS, 1) + 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_all(folder)
        for kind_name, kind in KINDS.items():
            rng = np.random.default_rng(0)
            content = (folder / kind_name / kind.name).read_bytes()
            for damage, contents, most in (
                ("cut", truncations(content), CUTS),
                ("bit turned", flips(content, rng), FLIPS),
                ("value edited", kind.edits(folder / kind_name, rng), edits),
            ):
                counts, wrong, slowest = counted(kind, folder / kind_name, contents, most)
                failures += [f"{kind_name}, {damage}: {why}" for why in wrong]
                rows.append((kind_name, damage, sum(counts.values()), *counts.values(), f"{slowest:.2f}"))
                print(rows[-1], file=sys.stderr, flush=True)
    met = not failures
    total = sum(row[2] for row in rows)
    text = (
        f"{total} damaged files. A file is *read* where the damage changes nothing that its form tells, such as a "
        "digit of a score, and *refused* by an error that names it.\n\n"
        f"{table(('file', 'damage', 'inputs', 'read', 'refused', 'wrong', 'slowest (s)'), rows)}\n\n"
        + "".join(f"- `{failure}`\n" for failure in failures[:50])
        + f"\nTargets {'met' if met else 'NOT met'}."
    )
    results = {"environment": where, "met": met, "inputs": total, "rows": rows, "failures": failures[:50]}
    if inputs == INPUTS:
        write("damage", "Damaged files", results, text)
    else:
        print(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
