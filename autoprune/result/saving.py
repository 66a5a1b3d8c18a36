"""Folder of a result: ``result.json`` lists the files, and is replaced last, so that a kill leaves old or new."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.budget import Budget
from autoprune.errors import FileFormatError
from autoprune.files.access import MIB, UNFINISHED, make_folder, write_json
from autoprune.files.formats import Format
from autoprune.journal.sqlite_file import FILE_NAME as JOURNAL
from autoprune.metrics.statistics import EVALUATION_FORM
from autoprune.pareto import Direction
from autoprune.protocols import FAILED, OK, PENDING, RACED
from autoprune.result.builders import WeightsFile, weights_file
from autoprune.result.recipe import write
from autoprune.result.shared_tensors import FILES as DENSE
from autoprune.result.shared_tensors import SharedTensors
from autoprune.result.trials import Trial

RESULT = "result.json"
FORMAT = Format("autoprune-result", 1, "a result")
WEIGHTS = "trial-*.safetensors"
MOST_BYTES = 1024 * MIB
"""Largest size of a result: 10,000 trials of 250 dimensions take a tenth of it."""

_MOST_NAME = 100
_NUMBER = (float, None)
TRIAL_FORM = {
    "id": int,
    "status": frozenset({OK, RACED, FAILED, PENDING}),
    "reason": str,
    "test_score": _NUMBER,
    "feasible?": bool,
    "candidate": [int],
    "decoded": {str: object},
    "costs": {str: float},
    "predicted?": {str: float},
    "cost_intervals?": {str: [float]},
    "score": _NUMBER,
    "interval": [_NUMBER],
    "signal": _NUMBER,
    "evaluations": [EVALUATION_FORM],
}
_TRAINED = {"trial": int, "cost": float, "trained": _NUMBER, "reason": str} | {
    name: {str: _NUMBER} for name in ("scores", "signals")
}
_AUDIT = {
    "rows": [_TRAINED],
    "evaluators": [str],
    "notes": [str],
    "variants": {str: [(float, [float])]},  # what it costs, and the scores
    "metric": str,
    "higher_is_better": bool,
    "samples": int,
    "cost": str,
    "steps": (int, None),
    "winner": int,
    "seconds": float,
}
_FORM = {
    "budget": str,
    "metric": str,
    "higher_is_better": bool,
    "stopped": str,
    "seconds": float,
    "seed": int,
    "notes": [str],
    "limits": {str: float},
    "space": {str: object},
    "dense": TRIAL_FORM,
    "trials": [TRIAL_FORM],
    "front": [int],
    "audit?": (_AUDIT, None),
    "weights?": {str: {"file": str, "sha256": str}},
}


def write_result(
    folder: Path,
    content: Mapping[str, Any],
    kept: Iterable[Trial],
    build: Callable[[Trial], nn.Module],
    shared: SharedTensors | None = None,
) -> None:
    """Write weights, then ``result.json``; then delete files of an earlier save that it does not name.

    Files of an earlier save keep their names until the new ``result.json`` is written: a new file whose name is taken
    gets another one.

    Raises:
        OSError: If a file cannot be written; the earlier save is then as it was.
    """
    make_folder(folder)
    found = folder / RESULT
    named = _named_in(found) if found.exists() else set()
    weights = {}
    for trial in kept:
        file = _free(weights_file(folder, trial), named)
        weights[str(trial.id)] = {"file": file.name, "sha256": write(build(trial), file, shared)}
    if shared is not None:
        shared.write(folder)
    write_json(found, {**content, "weights": weights}, indent=1)
    keep = {entry["file"] for entry in weights.values()} | ({shared.file_name} if shared is not None else set())
    for pattern in (WEIGHTS, DENSE, UNFINISHED):
        for file in folder.glob(pattern):
            if file.name not in keep:
                file.unlink(missing_ok=True)


def _named_in(file: Path) -> set[str]:
    """Files that a result names; none if it is damaged."""
    try:
        return {entry.name for entry in files_of(read_result(file)).values()}
    except (FileFormatError, OSError):
        return set()


def _free(file: Path, named: set[str]) -> Path:
    """Return the name, or a similar one that an earlier save does not use."""
    number = 0
    free = file
    while free.name in named:
        number += 1
        free = file.with_name(f"{file.stem}-{number}{file.suffix}")
    return free


def read_result(file: Path) -> dict[str, Any]:
    """Read a ``result.json`` and check its form.

    Raises:
        FileFormatError: If it is corrupted or foreign.
    """
    return FORMAT.read_json(file, "path must be a folder written by result.save", _way_out(file), MOST_BYTES, _FORM)


def reading(file: Path) -> AbstractContextManager[None]:
    """Make a context that turns all errors of a damaged result into one."""
    return FORMAT.reading(file, _way_out(file))


def _way_out(file: Path) -> str:
    journal = (file.parent / JOURNAL).exists()
    return "the journal next to it may be whole: `autoprune front` reads it" if journal else "save it again"


def files_of(data: Mapping[str, Any]) -> dict[int, WeightsFile]:
    """Read the files of weights by trial.

    Raises:
        ValueError: If a file lies elsewhere than in the folder.
    """
    found = {
        int(trial): WeightsFile(entry["file"], entry["sha256"]) for trial, entry in data.get("weights", {}).items()
    }
    for entry in found.values():
        if Path(entry.name).name != entry.name or not fnmatchcase(entry.name, WEIGHTS) or len(entry.name) > _MOST_NAME:
            raise ValueError(f"weights name {entry.name!r:.60}, which is no file of its folder")
    return found


def require_consistent(trials: Sequence[Trial], dense: Trial, sizes: Sequence[int], data: Mapping[str, Any]) -> None:
    """Refuse trials outside of the space, and limits and a budget that do not belong to them.

    Raises:
        ValueError: Names the mismatch.
    """
    if not data["limits"]:
        raise ValueError("limits must name a cost")
    for trial in (dense, *trials):
        if len(trial.candidate) != len(sizes) or not all(
            0 <= i < n for i, n in zip(trial.candidate, sizes, strict=True)
        ):
            raise ValueError(f"trial {trial.id} is no candidate of the space")
        if missing := dense.costs.keys() - trial.costs.keys() or data["limits"].keys() - trial.costs.keys():
            raise ValueError(f"trial {trial.id} has no cost {sorted(missing)[0]!r:.60}")
    if len({trial.id for trial in trials}) != len(trials):
        raise ValueError("two trials have the same number")
    budget = Budget.parse(data["budget"]).judged_by(data["metric"], Direction(data["higher_is_better"]), dense.costs)
    budget.resolve(dense.costs)
