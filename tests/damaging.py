"""Every kind of structured file, what may befall it, and what must then hold for its reader."""

import contextlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import autoprune
from autoprune.audit.training_log import FILE as LOG
from autoprune.audit.training_log import Trainings
from autoprune.costs.latency.model import Latency
from autoprune.data.batch import default_forward
from autoprune.errors import AutopruneError
from autoprune.evaluators.training.checkpoint import read_checkpoint, write_checkpoint
from autoprune.files.tensor_file import HASH, content_hash, read_tensors, write_tensors
from autoprune.importance.calibration import Calibration
from autoprune.importance.database.build import build_database
from autoprune.importance.database.database import Database
from autoprune.journal.journal import Journal
from autoprune.journal.sqlite_file import FILE_NAME
from autoprune.result import SearchResult
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.study.calibration_check import FILE_NAME as CHOICE
from autoprune.study.calibration_check import Choice

MOST_SECONDS = 10
MOST_CHARACTERS = 500
VALUES: tuple[Any, ...] = (None, True, -1, 0.5, 2**70, 1e308, "", "text", "x" * 2_000, [], [[]], {}, {"a": 1}, [None])
"""Replacements of any value."""

IDENTITY = {"weights": "a", "data": "b", "space": "c", "metric": "accuracy", "evaluator": "e", "steps": None, "seed": 0}
SETTING = dict.fromkeys(("model", "device", "machine", "runtime", "date"), "any") | {
    "inputs": ["float32 1x8"],
    "batch": 1,
    "threads": 1,
    "versions": {"torch": "2.9"},
}


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4))


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: Of the file, in a folder.
        read: Reads the folder as a user would, and looks at what it gave.
        edits: Contents with a value of another type in one place, without end.
    """

    name: str
    read: Callable[[Path], object]
    edits: Callable[[Path, np.random.Generator], Iterator[bytes]]


def make_all(folder: Path) -> None:
    """One file of each kind, in a folder of its own."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    run = folder / "journal"
    result = autoprune.search(
        model(), "flops <= 60%", (x, x[:, :4].argmax(1)), trials=6, execution=autoprune.Execution(run_dir=str(run))
    )
    result.save(folder / "result")
    for name in ("recipe", "checkpoint", "table", "log", "database"):
        (folder / name).mkdir()
    autoprune.save(result.build(), folder / "recipe" / "small.safetensors")
    state = {"step": 3, "weights": {"a": torch.ones(3)}, "identity": {"lr": 0.1}, "position": (0, 1)}
    write_checkpoint(folder / "checkpoint" / "supernet.safetensors", state)
    grid = {"family": "linear", "kind": "matmul", "axes": [[1, 16], [1, 6]], "aligned": 1}
    grid |= {name: [[0.1, 0.2], [0.3, 0.4]] for name in ("ms", "low", "high")}
    correction = dict.fromkeys(("constant_ms", "median_error", "p95_error", "margin"), 0.1)
    table = {
        "format": "autoprune-latency",
        "version": 1,
        "setting": SETTING,
        "dense_ms": 1.0,
        "notes": ["measured"],
        "correction": {
            **correction,
            "spearman": None,
            "factors": {"matmul": 1.0, "unaligned matmul": 1.0},
            "networks": 6,
        },
        "groups": [["0", 16], ["2", 6]],
        "parts": [{"family": "linear", "count": 1, "sizes": [[0, [[0, 1]]], [0, [[1, 1]]]]}],
        "tables": [grid],
        "networks": {"widths": [[16, 6], [8, 3]], "ratio": [1.0, 0.5], "uncertainty": [0.01, 0.01]},
    }
    (folder / "table" / "table.json").write_text(json.dumps(table))
    lines = [IDENTITY]
    lines += [
        {"key": ["a", i], "record": {"score": 0.5, "signal": 1.0, "seconds": 1.0, "reason": ""}} for i in range(4)
    ]
    (folder / "log" / LOG).write_text("".join("\n" + json.dumps(line) for line in lines))
    dense = model()
    calibration = Calibration(dense, analyse(Example(dense, (x[:1],))), [x], default_forward)
    build_database(calibration, folder / "database" / "layers.safetensors")
    Choice("l2", {"bn": True, "bias": True, "least_squares": True, "renew": False}, "why").save(str(folder / "choice"))
    for name in KINDS:
        KINDS[name].read(folder / name)


def _read_recipe(folder: Path) -> object:
    return autoprune.load(folder / "small.safetensors", model())(torch.ones(1, 8))


def _read_result(folder: Path) -> object:
    result = autoprune.SearchResult.load(folder, model())
    return str(result), result.best(), [result.build(trial) for trial in result.front[:1]], result.to_json()


def _read_journal(folder: Path) -> object:
    result = SearchResult.from_journal(folder)
    with Journal.open(folder) as journal:
        found = [journal.values(trial.id) for trial in result.trials]
    return str(result), result.front and result.best(), found


def _read_table(folder: Path) -> object:
    latency = Latency.load(folder / "table.json")
    return str(latency), latency.predict(np.array([[16.0, 6.0], [3.0, 2.0]]))


def _read_database(folder: Path) -> object:
    database = Database.load(folder / "layers.safetensors")
    return database.note, [table.loss(1) for table in database.tables.values()]


def _read_log(folder: Path) -> object:
    with Trainings.open(str(folder), IDENTITY) as trainings:
        return ("a", 0) in trainings


def _edited(tree: Any, rng: np.random.Generator) -> Any:
    """A parsed JSON with one value in it, anywhere, replaced or left out."""
    places = list(_places(tree, ()))
    place = places[rng.integers(len(places))]
    copied = json.loads(json.dumps(tree))
    inner = copied
    for key in place[:-1]:
        inner = inner[key]
    choice = int(rng.integers(len(VALUES) + 1))
    if choice == len(VALUES):
        del inner[place[-1]]
    else:
        inner[place[-1]] = VALUES[choice]
    return copied


def _places(tree: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _json_edits(name: str) -> Callable[[Path, np.random.Generator], Iterator[bytes]]:
    def edits(folder: Path, rng: np.random.Generator) -> Iterator[bytes]:
        tree = json.loads((folder / name).read_text())
        while True:
            yield json.dumps(_edited(tree, rng)).encode()

    return edits


def _line_edits(folder: Path, rng: np.random.Generator) -> Iterator[bytes]:
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines() if line]
    while True:
        yield "\n".join(map(json.dumps, _edited(lines, rng))).encode()


def _header_edits(name: str, key: str) -> Callable[[Path, np.random.Generator], Iterator[bytes]]:
    """Edits of the JSON in the header, with the hash of the edited content."""

    def edits(folder: Path, rng: np.random.Generator) -> Iterator[bytes]:
        metadata, state = read_tensors(folder / name, "path must be a file", 2**30)
        other = folder.parent / f"{name}.edited"
        while True:
            text = json.dumps(_edited(json.loads(metadata[key]), rng))
            write_tensors(other, state, {**metadata, HASH: content_hash(state, text), key: text})
            yield other.read_bytes()

    return edits


def _row_edits(folder: Path, rng: np.random.Generator) -> Iterator[bytes]:
    """Edits of one column in one row, or of a place in the JSON that it holds."""
    other = folder.parent / "edited.sqlite"
    while True:
        other.write_bytes((folder / FILE_NAME).read_bytes())
        connection = sqlite3.connect(other)
        table = ("meta", "trials", "evaluations")[rng.integers(3)]
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        column = columns[rng.integers(len(columns))]
        rows = connection.execute(f"SELECT rowid, {column} FROM {table}").fetchall()
        row, value = rows[rng.integers(len(rows))]
        with contextlib.suppress(sqlite3.IntegrityError, OverflowError), connection:
            connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (_other_value(value, rng), row))
        connection.close()
        yield other.read_bytes()


def _other_value(value: Any, rng: np.random.Generator) -> Any:
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.integers(3):
        parsed = json.loads(value)
        return json.dumps(_edited(parsed, rng)) if parsed else "[1]"
    chosen = VALUES[rng.integers(len(VALUES))]
    return json.dumps(chosen) if isinstance(chosen, list | dict) else chosen


KINDS = {
    "recipe": Kind("small.safetensors", _read_recipe, _header_edits("small.safetensors", "recipe")),
    "result": Kind("result.json", _read_result, _json_edits("result.json")),
    "journal": Kind(FILE_NAME, _read_journal, _row_edits),
    "table": Kind("table.json", _read_table, _json_edits("table.json")),
    "log": Kind(LOG, _read_log, _line_edits),
    "choice": Kind(CHOICE, lambda folder: Choice.load(str(folder)), _json_edits(CHOICE)),
    "checkpoint": Kind(
        "supernet.safetensors",
        lambda folder: read_checkpoint(folder / "supernet.safetensors"),
        _header_edits("supernet.safetensors", "state"),
    ),
    "database": Kind("layers.safetensors", _read_database, _header_edits("layers.safetensors", "content")),
}


def truncations(content: bytes) -> Iterator[bytes]:
    """The content cut at each twentieth."""
    for twentieth in range(20):
        yield content[: len(content) * twentieth // 20]


def flips(content: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """The content with one bit turned, without end."""
    while True:
        damaged = bytearray(content)
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        yield bytes(damaged)


class TooSlowError(BaseException):
    """A reader did not come back; no ``except`` of ours takes it."""


def outcome(kind: Kind, folder: Path, content: bytes) -> tuple[str, str]:
    """``"read"``, ``"refused"`` or ``"WRONG"`` for a reader that is given `content`, and why."""
    file = folder / kind.name
    whole = file.read_bytes()
    file.write_bytes(content)
    before = {path.name for path in folder.iterdir()}

    def stop(*_: Any) -> None:
        raise TooSlowError

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    try:
        kind.read(folder)
        found = "read", ""
    except (AutopruneError, ValueError, TypeError, OSError) as error:
        named = any(path.name in str(error) for path in folder.iterdir()) or _names_an_argument(str(error))
        sound = len(str(error)) <= MOST_CHARACTERS and named
        found = ("refused" if sound else "WRONG"), f"{type(error).__name__}: {error}"
    except BaseException as error:  # of any kind is what this looks for
        found = "WRONG", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        file.write_bytes(whole)
    left = {path.name for path in folder.iterdir()} - before
    return ("WRONG", f"left {sorted(left)}") if left else found


def _names_an_argument(message: str) -> bool:
    return any(message.startswith(name) for name in ("budget", "no trial", "run_dir", "trial ", "path "))


def counted(kind: Kind, folder: Path, contents: Iterator[bytes], most: int) -> tuple[dict[str, int], list[str], float]:
    """Count the `contents` that were read, refused and mistaken; with the errors, and the seconds of the slowest."""
    counts, wrong, slowest = {"read": 0, "refused": 0, "WRONG": 0}, [], 0.0
    for _, content in zip(range(most), contents, strict=False):
        began = time.monotonic()
        found, why = outcome(kind, folder, content)
        slowest = max(slowest, time.monotonic() - began)
        counts[found] += 1
        if found == "WRONG":
            wrong.append(why[:300])
            if keep := os.environ.get("KEEP_DAMAGED"):
                Path(keep, f"{kind.name}.{len(wrong)}").write_bytes(content)
    return counts, wrong, slowest
