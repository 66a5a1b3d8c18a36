"""Results that are read back: from ``result.json``, or from the journal next to it where that is damaged or missing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from autoprune.errors import FileFormatError
from autoprune.files.access import as_path, shortened
from autoprune.journal.sqlite_file import FILE_NAME as JOURNAL
from autoprune.result.audit_report import Audit
from autoprune.result.builders import SavedWeights
from autoprune.result.from_journal import fields_from_journal
from autoprune.result.outline import Outline
from autoprune.result.saving import PLAIN, RESULT, files_of, read_result, reading, require_consistent
from autoprune.result.trials import Trial
from autoprune.search_spaces import space_from_json

log = logging.getLogger(__name__)


def load_fields(path: str | Path, model: nn.Module | None) -> dict[str, Any]:
    """Read the fields of a result, see `SearchResult.load`.

    Raises:
        FileNotFoundError: If there is neither a result nor a journal.
        FileFormatError: If the one is corrupted or foreign, and the other is not there or no better.
        TypeError: If `model` is none.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a dense nn.Module of the class that was pruned, got {type(model).__name__}")
    folder = as_path(path)
    if folder.name == JOURNAL and folder.is_file():  # it stands for its folder, as result.json does
        folder = folder.parent
    file = folder / RESULT if folder.is_dir() else folder
    has_journal = (file.parent / JOURNAL).exists() and (folder.is_dir() or file.name == RESULT)
    if not file.exists():
        if not has_journal:
            raise FileNotFoundError(
                f"path must be a folder written by result.save, or the run_dir of a search, got {shortened(folder)}: "
                f"no {RESULT} and no {JOURNAL} there"
            )
        return fields_from_journal(file.parent)
    try:
        data = read_result(file)
        with reading(file):
            return _fields(data, SavedWeights(file.parent, model, files_of(data)))
    except FileFormatError as error:
        if not has_journal:
            raise
        return _instead(file, error)


def _instead(file: Path, error: FileFormatError) -> dict[str, Any]:
    """Read the journal next to a result that cannot be read."""
    try:
        found = fields_from_journal(file.parent, (f"{error}; this is read from the journal next to it",))
    except FileFormatError as second:
        raise FileFormatError(f"{error}; the journal next to it cannot be read either: {second}") from error
    log.warning("%s; reading the journal next to it", error)
    return found


def _fields(data: Mapping[str, Any], builder: SavedWeights) -> dict[str, Any]:
    trials = tuple(Trial.from_json(trial) for trial in data["trials"])
    dense = Trial.from_json(data["dense"])
    space = space_from_json(data["space"])
    require_consistent(trials, dense, space.sizes.tolist(), data)
    by_id = {trial.id: trial for trial in trials}
    return {
        "trials": trials,
        "front": tuple(by_id[i] for i in data["front"]),
        "dense": dense,
        "space": space,
        "notes": tuple(data["notes"]),
        "limits": data["limits"],
        "outline": Outline.from_json(data["outline"]) if data.get("outline") else None,
        "audit": Audit.from_json(data["audit"]) if data.get("audit") else None,
        "_builder": builder,
        **{name: data[name] for name in PLAIN},
    }
