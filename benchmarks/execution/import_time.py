"""Time of ``import autoprune`` over that of ``import torch``, both with their compiled files at hand.

Run ``python -m benchmarks.execution.import_time`` from the root of the repository, half a minute; exits with 1 when a
target is missed. Torch's objects are frozen before ours are imported: whichever import comes next sets off a pass of
the garbage collector over all of them, and that takes as long as half of ours.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

COMMAND = "python -m benchmarks.execution.import_time"
REPEATS, MOST_SHARE = 5, 0.5
IMPORTS = """
import gc, time
start = time.process_time()
import torch
theirs = time.process_time() - start
gc.freeze()
start = time.process_time()
import autoprune
print((time.process_time() - start) / theirs)
"""


def share() -> float:
    """Measure it in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", IMPORTS]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=clean).stdout)


def main() -> int:
    share()  # compiles
    found = float(np.median([share() for _ in range(REPEATS)]))
    print(f"import autoprune takes {found:.2f} of the time of import torch (at most {MOST_SHARE})")
    return int(found > MOST_SHARE)


if __name__ == "__main__":
    sys.exit(main())
