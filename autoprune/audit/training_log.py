"""Log of the finished trainings of an audit, so that none is repeated: in memory, or in a file with a line for each."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from autoprune.data.subsets import fingerprint
from autoprune.evaluators import Context
from autoprune.execution import Outcome
from autoprune.files.access import DAMAGE, MIB, explaining, make_folder, parse_json, require_file, shortened, sound
from autoprune.files.schema import require_form
from autoprune.metrics.statistics import Evaluation
from autoprune.protocols import Failure

log = logging.getLogger(__name__)

FILE = "audit.jsonl"
MOST_BYTES = 256 * MIB
"""Largest size of a log."""
Key = tuple[str | int, ...]
_IDENTITY = {"weights": str, "data": str, "space": str, "metric": str, "evaluator": str, "seed": int}
_LINE = {"key": [(str, int)], "record": {"score": float, "signal": float, "seconds": float, "reason": str}}


@dataclass(frozen=True)
class Record:
    """Record of a training, or of a cheap score.

    Attributes:
        score: Mean of the metric; NaN if it failed.
        signal: Mean of the signal; NaN if it failed.
        seconds: Wall time.
        reason: Reason of a failure.
    """

    score: float = math.nan
    signal: float = math.nan
    seconds: float = 0.0
    reason: str = ""


class Trainings:
    """Records by key. Failures are not written, so that a resumed audit tries them again."""

    def __init__(self, known: Mapping[Key, Record], file: IO[str] | None = None) -> None:
        self._known = dict(known)
        self._file = file

    @classmethod
    @contextmanager
    def open(cls, run_dir: str | Path | None, identity: Mapping[str, Any]) -> Iterator[Trainings]:
        """Continue the file in a folder, or begin it; without a folder keep records in memory.

        Raises:
            ValueError: If the file is of another audit; names what differs.
            FileFormatError: If it is no log of an audit.
            OSError: If it cannot be written.
        """
        if run_dir is None:
            yield cls({})
            return
        path = make_folder(run_dir, "run_dir") / FILE
        recorded, known = _read(path) if path.exists() else ({}, {})
        if recorded:
            _require_same(recorded, identity, path)
        with explaining(path, "run_dir"):
            opened = path.open("a", encoding="utf-8")
        with opened as file:
            if not recorded:
                _append(file, identity)
            if known:
                log.info("%d trainings and scores were read from %s", len(known), path)
            yield cls(known, file)

    def recall(self, key: Key, measure: Callable[[], Outcome]) -> Record:
        """Return the record under a key, which is measured and written if there is none yet."""
        if key not in self._known:
            outcome = measure()
            found = Evaluation.of(outcome)
            if isinstance(outcome, Failure) or found.metric is None or found.signal is None:
                return Record(seconds=outcome.seconds, reason=outcome.reason or "the score is not finite")
            self._known[key] = Record(found.metric, found.signal, outcome.seconds)
            if self._file is not None:
                _append(self._file, {"key": list(key), "record": asdict(self._known[key])})
        return self._known[key]

    def __contains__(self, key: Key) -> bool:
        return key in self._known


def audit_identity(context: Context, evaluator: str, steps: int | None, seed: int) -> dict[str, Any]:
    """Identity of trained scores, without the recipe, which cannot be compared; JSON-ready."""
    return {
        "weights": fingerprint(context.model.state_dict()),
        "data": context.subsets.fingerprint,
        "space": fingerprint(context.space.to_json()),
        "metric": context.judge.name,
        "evaluator": evaluator,
        "steps": steps,
        "seed": seed,
    }


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, Record]]:
    """Read the identity and the records of a log; damaged lines, such as the last one after a crash, are left out."""
    file = require_file(path, "run_dir must hold a log of autoprune.audit", MOST_BYTES)
    lines = [line for line in file.read_bytes().splitlines() if line]
    with sound(f"{shortened(path)} is no log of an audit, or is damaged", "remove it, or pass another run_dir"):
        identity: dict[str, Any] = parse_json(lines[0]) if lines else {}
        require_form(identity, _IDENTITY if lines else {})
    known: dict[Key, Record] = {}
    for line in lines[1:]:
        try:
            found = parse_json(line)
            require_form(found, _LINE)
            known[tuple(found["key"])] = Record(**found["record"])
        except DAMAGE:
            log.warning("a line of %s was cut short or is damaged; what it held is done again", path)
    return identity, known


def _append(file: IO[str], line: Mapping[str, Any]) -> None:
    with explaining(Path(file.name), "run_dir"):
        file.write("\n" + json.dumps(line))  # on a new line, because a crash may have cut the last one short
        file.flush()
        os.fsync(file.fileno())


def _require_same(recorded: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    differing = [name for name, value in now.items() if recorded.get(name) != value]
    if differing:
        raise ValueError(
            f"run_dir must hold the same audit to go on with it, but {path} differs in {', '.join(differing)}; pass "
            "what it was started with, or another run_dir"
        )
