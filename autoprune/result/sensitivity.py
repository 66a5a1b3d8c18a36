"""Sensitivity: loss of each option of each dimension when it alone is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autoprune.arguments import one_of
from autoprune.protocols import OK, FloatArray
from autoprune.result.tables import aligned, data_frame
from autoprune.result.trials import Trial, or_nan

if TYPE_CHECKING:
    from pandas import DataFrame

    from autoprune.result import SearchResult

TABLES = ("distortion", "signal", "metric")


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Losses of changing one dimension of the dense model at a time, from the trials that did.

    Attributes:
        table: What was measured: ``"distortion"`` in nats or relative squared error, else the change against the dense
            model of the search ``"signal"`` or of the ``"metric"``, turned so that higher is worse.
        names: The dimensions, length d.
        options: Their options, option 0 dense.
        losses: Mean loss, shape (d, k) with k the most options of any; 0 for dense, NaN where it was not measured.
        stderr: Standard error of each loss, shape (d, k), over samples paired with those of the dense model; NaN where
            it is unknown.
    """

    table: str
    names: tuple[str, ...]
    options: tuple[tuple[Any, ...], ...]
    losses: FloatArray
    stderr: FloatArray

    def of(self, candidate: tuple[int, ...]) -> float:
        """Sum of the losses of the options of a candidate, length d; NaN if one of them was not measured."""
        return float(self.losses[np.arange(len(self.names)), candidate].sum())

    def to_frame(self) -> DataFrame:
        """Make a row for each option: dimension, index, option, loss, stderr.

        Raises:
            ImportError: If pandas is missing.
        """
        rows = [
            {"dimension": name, "index": i, "option": option, "loss": self.losses[j, i], "stderr": self.stderr[j, i]}
            for j, (name, options) in enumerate(zip(self.names, self.options, strict=True))
            for i, option in enumerate(options)
        ]
        return data_frame(rows, "sensitivity.to_frame()")

    def __str__(self) -> str:
        """Format a line for each dimension: its options that were measured alone, with their losses."""
        found = [
            [
                part
                for option, loss in zip(options, losses, strict=False)
                if np.isfinite(loss)
                for part in _cells(option, loss)
            ]
            for options, losses in zip(self.options, self.losses, strict=True)
        ]
        most = max(map(len, found))
        rows = [["dimension", *["option", "loss"] * (most // 2)]]
        rows += [[name, *cells, *[""] * (most - len(cells))] for name, cells in zip(self.names, found, strict=True)]
        return f"{self.table} of one dimension at a time, where measured\n\n{aligned(rows)}"


def sensitivity_of(result: SearchResult, table: str = "distortion") -> Sensitivity:
    """Collect the losses of single dimensions; see `SearchResult.sensitivity`."""
    one_of("table", table, TABLES)
    options = tuple(dimension.options for dimension in result.space.dimensions)
    losses = np.full((len(options), max(map(len, options))), np.nan)
    losses[:, 0] = 0.0
    stderr = losses.copy()
    for trial in result.trials:
        changed = np.flatnonzero(trial.candidate)
        if trial.status == OK and len(changed) == 1:
            where = changed[0], trial.candidate[changed[0]]
            losses[where], stderr[where] = loss_of(result, trial, table)
    return Sensitivity(table, tuple(d.name for d in result.space.dimensions), options, losses, stderr)


def loss_of(result: SearchResult, trial: Trial, table: str) -> tuple[float, float]:
    """Loss of a trial against the dense model, higher is worse, and its standard error; NaN where it is unknown."""
    if not trial.evaluations:
        return np.nan, np.nan
    measured = trial.evaluations[-1]
    dense = result.dense
    if table == "distortion":
        return or_nan(measured.distortion), or_nan(measured.distortion_stderr)
    if table == "signal":
        alone = measured.signal_stderr if measured.signal_change_stderr is None else measured.signal_change_stderr
        return trial.signal - dense.signal, or_nan(alone)
    return result.direction.worse_by(trial.score, dense.score), or_nan(measured.metric_change_stderr)


def _cells(option: Any, loss: float) -> tuple[str, str]:
    return f"{option:.4g}" if isinstance(option, float) else str(option), f"{loss:.3g}"
