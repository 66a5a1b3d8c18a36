"""Folder of a result: ``result.json`` lists the files, and is replaced last, so that a kill leaves old or new."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from autoprune.arguments import flag, one_of
from autoprune.budget import Budget
from autoprune.errors import FileFormatError
from autoprune.files.access import MIB, UNFINISHED, as_path, make_folder, shortened, write_json
from autoprune.files.formats import Format
from autoprune.pareto import Direction
from autoprune.result.builders import WeightsFile, built, weights_file
from autoprune.result.form import RESULT_FORM
from autoprune.result.outline import OUTLINE
from autoprune.result.recipe import write
from autoprune.result.shared_tensors import FILES as DENSE
from autoprune.result.shared_tensors import SharedTensors
from autoprune.result.trials import Trial

if TYPE_CHECKING:
    from autoprune.result.search_result import SearchResult

RESULT = "result.json"
PLAIN = ("budget", "metric", "higher_is_better", "stopped", "seconds", "seed")
"""Fields that are written as they are."""
FORMAT = Format("autoprune-result", 1, "a result")
WEIGHTS = "trial-*.safetensors"
MOST_BYTES = 1024 * MIB
"""Largest size of a result: 10,000 trials of 250 dimensions take a tenth of it."""

_WAY_OUT = "save it again"
_MOST_NAME = 100


def save_result(result: SearchResult, path: str | Path, weights: str = "front", replace: bool = False) -> Path:
    """Write a result to a folder, see `SearchResult.save`; returns the folder.

    Raises:
        ValueError: If `weights` is unknown.
        FileExistsError: If the folder holds a result already and `replace` is false, or it is a file.
        OSError: If it cannot be written; an earlier result in it is as it was.
    """
    one_of("weights", weights, ("best", "front", "none"))
    replace = flag("replace", replace)
    folder = as_path(path)
    if (folder.exists() and not folder.is_dir()) or (not replace and (folder / RESULT).exists()):
        raise FileExistsError(
            f"path must be a folder without a result in it, got {shortened(folder)}; pass another path, or "
            "replace=True to put this result in the place of that one"
        )
    kept = result.front if weights == "front" else ()
    if weights == "best" and result.front:
        kept = (result.best(),)
    builder = result._builder
    shared = builder.shared(kept) if builder is not None and len(kept) > 1 else None
    write_result(folder, content_of(result), kept, partial(built, builder), shared)
    return folder


def content_of(result: SearchResult) -> dict[str, Any]:
    """JSON-ready dictionary of everything but weights; NaN becomes null."""
    return {
        **FORMAT.stamp(),
        **{name: getattr(result, name) for name in PLAIN},
        "notes": list(result.notes),
        "limits": dict(result.limits),
        "space": result.space.to_json(),
        "dense": result.dense.to_json(),
        "trials": [trial.to_json() for trial in result.trials],
        "front": [trial.id for trial in result.front],
        "audit": None if result.audit is None else result.audit.to_json(),
        OUTLINE: None if result.outline is None else result.outline.to_json(),
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
    return FORMAT.read_json(file, "path must be a folder written by result.save", _WAY_OUT, MOST_BYTES, RESULT_FORM)


def reading(file: Path) -> AbstractContextManager[None]:
    """Make a context that turns all errors of a damaged result into one."""
    return FORMAT.reading(file, _WAY_OUT)


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
