"""Wrong arguments by the thousand: is each refused in a sentence that names it, and does nothing hang?

Run ``python -m benchmarks.execution.hostile_calls`` from the root of the repository (about 8 minutes on one thread);
exits with 1 when a public call raises anything else than `AutopruneError`, `ValueError`, `TypeError` or `OSError`, a
command ends in a traceback, a message has more than 700 characters, holds the values of a tensor or names neither the
argument nor the file, an answer takes more than 10 seconds, or a wrong value is taken that is not right by design
(`tests.hostile_calls` says which are). Every value of every kind for every argument of every call alone, two or three
at once, and every word for every option of every command.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks.support.common import environment, table, write
from tests.hostile import settled
from tests.hostile_calls import make_calls, outcome, several, single
from tests.hostile_commands import answer, commands, make_module

COMMAND = "python -m benchmarks.execution.hostile_calls"
TOGETHER = 5_000
SEEDS = 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--together", type=int, default=TOGETHER, help="calls with several wrong values")
    together = parser.parse_args().together
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    where, tally = environment(COMMAND), _Tally()
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        sys.path.insert(0, name)
        calls = make_calls(Path(name))
        make_module(Path(name))
        drawn = several(calls, np.random.default_rng(0))
        tally.add("one value", ((str(w), w.call, partial(outcome, calls[w.call], w)) for w in single(calls)))
        tally.add(
            "several values",
            ((str(w), w.call, partial(outcome, calls[w.call], w)) for w in islice(drawn, together)),
        )
        tally.add("a word", ((str(c), f"autoprune {c.name}", partial(answer, c)) for c in commands()))
        left = sorted(os.listdir())
    text = (
        f"{tally.total} calls and command lines with wrong arguments. One is *taken* where its values are right by "
        "design, such as None for an option, and *refused* by an error that names the argument or the file.\n\n"
        f"{tally.table()}\n\n"
        + (f"Tried again, because it took more than 10 s at first: {', '.join(tally.again)}.\n\n" * bool(tally.again))
        + "".join(f"- `{failure}`\n" for failure in tally.failures[:50])
        + f"\nTargets {'NOT met' if tally.failures else 'met'}."
    )
    results = {
        "environment": where,
        "met": not tally.failures,
        "calls": tally.total,
        "rows": tally.rows(),
        "failures": tally.failures[:50],
        "again": tally.again,
        "left": left,
    }
    if together == TOGETHER:
        write("hostile_calls", "Wrong arguments", results, text)
    else:
        print(text)
    return 1 if tally.failures else 0


class _Tally:
    """Fates of calls, by call and kind of mistake."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.again: list[str] = []
        self._counts: dict[tuple[str, str], Counter[str]] = {}
        self._slowest: dict[tuple[str, str], float] = {}

    def add(self, kind: str, tried: Iterable[tuple[str, str, Callable[[], tuple[str, str]]]]) -> None:
        """Try calls; each has a name, whose call it is, and what makes it."""
        for name, whose, make in tried:
            began = time.monotonic()
            fate, why, again = settled(make)
            key = (whose, kind)
            self._counts.setdefault(key, Counter())[fate] += 1
            if again:
                self.again.append(name)
            else:
                self._slowest[key] = max(self._slowest.get(key, 0.0), time.monotonic() - began)
            if fate == "WRONG":
                self.failures.append(f"{name}: {why}"[:300].replace("\n", " "))
        print(kind, self.total, len(self.failures), file=sys.stderr, flush=True)

    @property
    def total(self) -> int:
        return sum(sum(counts.values()) for counts in self._counts.values())

    def rows(self) -> list[tuple[object, ...]]:
        return [
            (*key, sum(counts.values()), *(counts[fate] for fate in ("accepted", "refused", "WRONG")), f"{slowest:.1f}")
            for (key, counts), slowest in zip(self._counts.items(), self._slowest.values(), strict=True)
        ]

    def table(self) -> str:
        return table(("call", "mistake", "tried", "taken", "refused", "wrong", "slowest (s)"), self.rows())


if __name__ == "__main__":
    sys.exit(main())
