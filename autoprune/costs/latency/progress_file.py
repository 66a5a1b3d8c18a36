"""Measurements of an unfinished latency table, in a file next to it, so that an interrupted run continues."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple
from hashlib import sha256
from pathlib import Path
from typing import Any

from autoprune.costs.latency.grids import Bench, Points
from autoprune.costs.latency.setting import Setting
from autoprune.costs.latency.timing import Timing
from autoprune.costs.operations.parts import Part
from autoprune.errors import FileFormatError
from autoprune.files.access import DAMAGE, MIB, brief, read_json, require_file, write_json
from autoprune.files.schema import require_form
from autoprune.protocols import IntArray

log = logging.getLogger(__name__)

MOST_BYTES = 256 * MIB
"""Largest size of a file of progress."""

_FORM = {
    "setting": object,
    "reference_ms": float,
    "dense_ms": float,
    "widths": [[int]],
    "networks": [[float]],
    "timings": [object],
    "known": {str: [[([int], float)]]},
}


class Progress:
    """Measurements so far, kept in a file next to the table, and read from it if the run is resumed.

    Args:
        path: Of the table; None keeps nothing.
        setting: The conditions that times hold for.
        parts: Operations of the model.
        widths: Of the networks to measure, shape (n, groups).
        bench: Measures the parts.
    """

    def __init__(
        self, path: str | Path | None, setting: Setting, parts: Sequence[Part], widths: IntArray, bench: Bench
    ) -> None:
        self._file = None if path is None else Path(f"{path}.partial")
        self._setting = setting
        self._model = sha256(repr(parts).encode()).hexdigest()  # other models may have the same class and inputs
        self._widths = widths.tolist()
        self._bench = bench
        self.dense_ms = 0.0
        self.networks: list[tuple[float, float]] = []
        self.timings: list[Timing] = []
        bench.save = self.save
        if self._file is not None and self._file.exists():
            self._read(self._file)

    def save(self) -> None:
        """Write all measurements; a kill leaves the old file or the new one."""
        if self._file is None:
            return
        known = {key: [[list(at), *ms] for at, ms in points.items()] for key, points in self._bench.known.items()}
        data = {
            "setting": self._identity(),
            "reference_ms": self._bench.reference_ms,
            "dense_ms": self.dense_ms,
            "widths": self._widths,
            "networks": self.networks,
            "timings": [astuple(timing) for timing in (*self.timings, *self._bench.timings)],
            "known": known,
        }
        write_json(self._file, data)

    def remove(self) -> None:
        """Drop the file, because the table is complete."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _identity(self) -> list[Any]:
        own = self._setting
        where = [own.device, own.machine, own.threads, own.runtime, dict(own.versions)]
        return [own.model, self._model, list(own.inputs), own.batch, *where]

    def _read(self, file: Path) -> None:
        try:
            require_file(file, "what is measured so far must be a file", MOST_BYTES)
            data = read_json(file, MOST_BYTES)
            require_form(data, _FORM)
            if data["setting"] != self._identity():
                log.warning("%s is of another model, machine, runtime or setting, and is replaced", file)
                return
            points: dict[str, Points] = {
                key: {tuple(at): (ms, low, high) for at, ms, low, high in rows} for key, rows in data["known"].items()
            }
            networks = [(ratio, uncertainty) for ratio, uncertainty in data["networks"]]
            timings = [Timing(*row) for row in data["timings"]]
            reference_ms, dense_ms, widths = data["reference_ms"], data["dense_ms"], data["widths"]
        except FileFormatError:  # no regular file; replacing it would raise for that, too
            raise
        except DAMAGE as error:
            log.warning("%s cannot be read, and is replaced: %s", file, brief(error))
            return
        self._bench.known.update(points)
        self._bench.reference_ms, self.dense_ms, self.timings = reference_ms, dense_ms, timings
        self.networks = networks if widths == self._widths else []  # others were drawn with another seed or number
        log.info("going on with %s: %d families measured already", file, len(points))
