"""Additivity: fit of the losses of whole candidates to sums of the losses of single dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from autoprune.protocols import OK, FloatArray
from autoprune.result.sensitivity import TABLES, loss_of, sensitivity_of
from autoprune.result.tables import aligned, data_frame

if TYPE_CHECKING:
    from pandas import DataFrame

    from autoprune.result import SearchResult

FEWEST = 5
"""Least number of trials for a fit."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Joint losses against sums of single ones.

    Attributes:
        summed: Sum of the losses of each trial's options alone, shape (n,).
        joint: Loss of each trial, shape (n,).
    """

    summed: FloatArray
    joint: FloatArray

    @property
    def r2(self) -> float:
        """Share of the variance of the joint losses that the line through the sums explains; NaN if undefined."""
        return float(np.corrcoef(self.summed, self.joint)[0, 1] ** 2) if self._defined else np.nan

    @property
    def slope(self) -> float:
        """Slope of that line, with an intercept: above 1 where joint losses grow faster than the sums."""
        return float(np.polyfit(self.summed, self.joint, 1)[0]) if self._defined else np.nan

    @property
    def spearman(self) -> float:
        """Rank correlation; 1 if the sums order candidates right, which is enough to choose one of them."""
        from scipy.stats import spearmanr

        return float(spearmanr(self.summed, self.joint).statistic) if self._defined else np.nan

    @property
    def _defined(self) -> bool:
        return len(self.joint) >= FEWEST and bool(np.ptp(self.summed) > 0 and np.ptp(self.joint) > 0)


@dataclass(frozen=True, eq=False)
class Additivity:
    """Additivity of the losses of single dimensions; ``additivity["distortion"].r2``.

    Attributes:
        fits: For ``"distortion"``, ``"signal"`` and ``"metric"``.
    """

    fits: Mapping[str, Fit]

    def __getitem__(self, table: str) -> Fit:
        return self.fits[table]

    def to_frame(self) -> DataFrame:
        """Make a row for each table: its name, trials, r2, slope, spearman.

        Raises:
            ImportError: If pandas is missing.
        """
        rows = [
            {"table": table, "trials": len(fit.joint), "r2": fit.r2, "slope": fit.slope, "spearman": fit.spearman}
            for table, fit in self.fits.items()
        ]
        return data_frame(rows, "additivity.to_frame()")

    def __str__(self) -> str:
        rows = [["joint against summed", "trials", "R2", "slope", "Spearman"]]
        for table, fit in self.fits.items():
            rows.append([table, str(len(fit.joint)), f"{fit.r2:.3f}", f"{fit.slope:.3f}", f"{fit.spearman:.3f}"])
        return aligned(rows)


def additivity_of(result: SearchResult) -> Additivity:
    """Compare sums with joint losses; see `SearchResult.additivity`."""
    joint = [t for t in result.trials if t.status == OK and t.feasible and np.count_nonzero(t.candidate) >= 2]
    fits = {}
    missing = set()
    for table in TABLES:
        single = sensitivity_of(result, table)
        pairs = np.array([(single.of(t.candidate), loss_of(result, t, table)[0]) for t in joint]).reshape(-1, 2)
        known = pairs[np.isfinite(pairs).all(axis=1)]
        fits[table] = Fit(known[:, 0], known[:, 1])
        missing |= {
            f"{name}={options[i]}"
            for t in joint
            for name, options, losses, i in zip(single.names, single.options, single.losses, t.candidate, strict=True)
            if np.isnan(losses[i])
        }
    most = max(len(fit.joint) for fit in fits.values())
    if most < FEWEST:
        unmeasured = f"; not measured alone: {', '.join(sorted(missing)[:8])}{', ...' * (len(missing) > 8)}"
        raise ValueError(
            f"additivity needs at least {FEWEST} feasible trials that change two or more dimensions, to options that "
            f"were also measured alone, got {most} of {len(joint)}{unmeasured if missing else ''}; "
            "search with an optimizer that measures single dimensions, or with more trials"
        )
    return Additivity(fits)
