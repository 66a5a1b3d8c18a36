"""Mistakes that a careful reviewer would look for, made one at a time: does a test fail at each?

Run ``python -m benchmarks.suite.mutants`` from the root of the repository (about 40 minutes on one thread); exits with
1 when more than two of the mutants survive. Each is one small change of the source, applied in a copy of the tree,
which the named tests alone then judge: it is *killed* if one of them fails or takes longer than the limit. A mutant
whose text no longer stands exactly once in its module is an error, so the list follows the code.

Fates are kept in ``results/mutants.json`` as they are found, by the text of the mutant: an interrupted run goes on
where it stopped, and a mutant that was changed runs again. ``--only 3 17`` runs some by number, whether or not their
fate is known, ``--again`` all of them, which is right after the code or the tests changed, and ``--check`` looks at the
texts alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.suite.mutant_cases import MUTANTS, Mutant
from benchmarks.support.common import RESULTS, environment, table, write

COMMAND = "python -m benchmarks.suite.mutants"
FOUND = RESULTS / "mutants.json"
ROOT = Path(__file__).parents[2]
COPIED = (
    "autoprune",
    "evaluators",
    "search_spaces",
    "tests",
    "docs",
    "benchmarks",
    "examples",
    "zoo",
    "pyproject.toml",
    "README.md",
)
LIMIT_SECONDS = 300  # of one processor, so that other programs on the machine decide no fate
LIMIT_WALL_SECONDS = 3600  # for tests that wait for ever
MOST_SURVIVORS = 2


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mutants, from 1, to run again")
    parser.add_argument("--again", action="store_true", help="forget the fates that are known")
    parser.add_argument("--check", action="store_true", help="look for the texts, and run nothing")
    options = parser.parse_args()
    misplaced = [f"{number}: {why}" for number, mutant in enumerate(MUTANTS, 1) if (why := why_not(mutant))]
    if misplaced or options.check:
        print("\n".join(misplaced) or f"{len(MUTANTS)} mutants fit")
        return int(bool(misplaced))
    where = environment(COMMAND)
    fates = {} if options.again else known_fates()
    numbers = options.only or [number for number, mutant in enumerate(MUTANTS, 1) if text_of(mutant) not in fates]
    with tempfile.TemporaryDirectory() as name:
        copy_to(Path(name))
        for number in numbers:
            mutant = MUTANTS[number - 1]
            began = time.monotonic()
            fate = fate_of(mutant, Path(name))
            fates[text_of(mutant)] = {"fate": fate, "seconds": round(time.monotonic() - began)}
            print(number, mutant.mistake, fate, file=sys.stderr, flush=True)
            report(fates, where)
    return 0 if report(fates, where) else 1


def text_of(mutant: Mutant) -> str:
    """Key of a mutant in the results, which changes with anything about it."""
    return json.dumps(asdict(mutant))


def known_fates() -> dict[str, dict[str, Any]]:
    """Read the fates of an earlier run, of mutants that are still in the list."""
    found: dict[str, dict[str, Any]] = json.loads(FOUND.read_text())["fates"] if FOUND.exists() else {}
    return {text: found[text] for text in map(text_of, MUTANTS) if text in found}


def report(fates: Mapping[str, Mapping[str, Any]], where: Mapping[str, Any]) -> bool:
    """Write what is known so far, and return whether the target is met by all mutants."""
    rows = [
        (number, mutant.module, mutant.mistake, fates[text]["fate"], fates[text]["seconds"])
        for number, mutant in enumerate(MUTANTS, 1)
        if (text := text_of(mutant)) in fates
    ]
    survived = [row for row in rows if row[3] == "survived"]
    met = len(survived) <= MOST_SURVIVORS and len(rows) == len(MUTANTS)
    missing = len(MUTANTS) - len(rows)
    text = (
        f"{len(rows) - len(survived)} of {len(rows)} killed; at most {MOST_SURVIVORS} of {len(MUTANTS)} may survive"
        f"{f', and {missing} were not run yet' if missing else ''}.\n\n"
        f"{table(('', 'module', 'mistake', 'fate', 'seconds'), rows)}\n\nTarget {'met' if met else 'NOT met'}."
    )
    write("mutants", "Mutants", {"environment": where, "met": met, "fates": fates}, text)
    return met


def file_of(module: str, root: Path) -> Path:
    """File of a module, by its name alone."""
    return root.joinpath(*module.split(".")).with_suffix(".py")


def why_not(mutant: Mutant) -> str:
    """Reason why a mutant cannot be made; empty if it can."""
    file = file_of(mutant.module, ROOT)
    if not file.exists():
        return f"there is no module {mutant.module}"
    count = file.read_text().count(mutant.old)
    missing = [test for test in mutant.tests if len(files_of(test, ROOT)) != 1]
    if missing:
        return f"there is no test file {missing[0]}"
    return "" if count == 1 else f"{mutant.old!r} stands {count} times in {mutant.module}"


def files_of(test: str, root: Path) -> list[str]:
    """Pytest's names of a test file, wherever it lies in the folder of tests."""
    name, separator, part = test.partition("::")
    found = sorted((root / "tests").rglob(f"{name}.py"))
    return [f"{file.relative_to(root)}{separator}{part}" for file in found]


def copy_to(folder: Path) -> None:
    """Copy what tests need, links as links."""
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, folder)


def fate_of(mutant: Mutant, folder: Path) -> str:
    """Run the tests of a mutant in a copy of the tree, which is left as it was."""
    file = file_of(mutant.module, folder)
    before = file.read_text()
    file.write_text(before.replace(mutant.old, mutant.new))
    try:
        return _fate([name for test in mutant.tests for name in files_of(test, folder)], folder)
    finally:
        file.write_text(before)


def _fate(tests: Sequence[str], folder: Path) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    variables = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=LIMIT_WALL_SECONDS,
            check=False,
            preexec_fn=_limit,
        )
    except subprocess.TimeoutExpired:
        return "killed: too slow"
    if done.returncode == -signal.SIGXCPU:
        return "killed: too slow"
    if done.returncode not in (0, 1):  # nothing was tested, or the mutant is no Python
        raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    if not done.returncode:
        return "survived"
    first = re.search(r"^(?:FAILED|ERROR) \S*?([^/\s]+\.py::[^\s\[]+)", done.stdout, re.MULTILINE)
    return f"killed by {first[1]}" if first else "killed"


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS + 10))


if __name__ == "__main__":
    sys.exit(main())
