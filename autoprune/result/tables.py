"""Results as plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from autoprune.result.trials import Trial

if TYPE_CHECKING:
    from pandas import DataFrame

    from autoprune.result import SearchResult

MOST_ROWS = 20
WIDTH = 100
MOST_EXPONENT = 700
"""Largest loss whose exponential is a float."""


def front_table(result: SearchResult, why_empty: str) -> str:
    """Format the front as a table that fits a terminal, with the dense model for comparison and the notes.

    Args:
        result: Of a search.
        why_empty: Reason for an empty front.
    """
    shown = shown_of(result)
    header, *rows = front_rows(result, shown)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    rule = "  ".join("-" * width for width in widths)
    notes = [line for note in notes_of(result, why_empty) for line in wrap(note, WIDTH, subsequent_indent="  ")]
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], "", headline(result, len(shown)), *notes])


def headline(result: SearchResult, shown: int) -> str:
    """Summarise a search in one line, with the number of trials on the front that are not among those `shown`."""
    failed = sum(trial.status == "failed" for trial in result.trials)
    hidden = len(result.front) - shown
    return (
        f"{len(result.trials)} trials in {result.seconds:.0f} s under {result.budget}"
        + (f", {failed} failed" if failed else "")
        + f"; {len(result.front)} on the front"
        + (f", {hidden} between them not shown" if hidden else "")
    )


def notes_of(result: SearchResult, why_empty: str) -> tuple[str, ...]:
    """Notes of a result with the verdict of its audit, and first the reason for an empty front."""
    notes = result.notes if result.audit is None else (*result.notes, result.audit.verdict())
    return (f"the front is empty: {why_empty}", *notes) if why_empty else notes


def shown_of(result: SearchResult) -> list[Trial]:
    """Choose trials of the front for a table: all, or `MOST_ROWS` that are evenly spread."""
    return _spread(result.front, MOST_ROWS)


def front_rows(result: SearchResult, shown: Sequence[Trial]) -> list[list[str]]:
    """Make the header of the front's table, a row for each trial shown, and one for the dense model."""
    names = list(result.limits)
    header = ["trial", *names, "of dense", result.metric, "95 % interval", "held out"]
    rows = [_row(result, trial, names) for trial in (*shown, result.dense)]
    if result.metric == "next_token":
        beside = header.index(result.metric) + 1
        header.insert(beside, "perplexity")
        for row, trial in zip(rows, (*shown, result.dense), strict=True):
            row.insert(beside, f"{math.exp(min(trial.score, MOST_EXPONENT)):.4g}")
    if (worst := result.worst_score) is not None:
        header.append("score limit")
        for row, trial in zip(rows, (*shown, result.dense), strict=True):
            row.append("met" if result.direction.meets(trial.score, worst) else "missed")
    for name in [name for name in names if any(name in trial.predicted for trial in shown)]:
        beside = header.index(name) + 1
        header.insert(beside, "predicted")
        for row, trial in zip(rows, (*shown, result.dense), strict=True):
            row.insert(beside, engineering(trial.predicted[name]) if name in trial.predicted else "")
    return [header, *rows]


def frame_of(result: SearchResult) -> DataFrame:
    """Make a pandas DataFrame of all trials, see `SearchResult.to_frame`.

    Raises:
        ImportError: If pandas is missing.
    """
    front = {trial.id for trial in result.front}
    trials = result.trials
    plain = ("signal", "distortion", "test_score", "status", "feasible", "reason")
    predicted = dict.fromkeys(name for trial in trials for name in trial.predicted)
    columns: dict[str, Sequence[Any]] = {
        "trial": [trial.id for trial in trials],
        **{name: [trial.costs.get(name, math.nan) for trial in trials] for name in result.dense.costs},
        **{f"predicted_{name}": [trial.predicted.get(name, math.nan) for trial in trials] for name in predicted},
        "score": [trial.score for trial in trials],
        "low": [trial.interval[0] for trial in trials],
        "high": [trial.interval[1] for trial in trials],
        **{name: [getattr(trial, name) for trial in trials] for name in plain},
        "front": [trial.id in front for trial in trials],
        **{d.name: [trial.decoded[d.name] for trial in trials] for d in result.space.dimensions},
    }
    return data_frame(columns, "result.to_frame()")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of equal length in columns, the first one to the left, with a rule under the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in (rows[0], ["-" * width for width in widths], *rows[1:])
    ]
    return "\n".join(lines)


def data_frame(content: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]], caller: str) -> DataFrame:
    """Make a pandas DataFrame of rows, or of columns by name.

    Raises:
        ImportError: If pandas is missing.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(f"{caller} needs pandas; pip install pandas") from error
    return pd.DataFrame(content)


def _spread(front: Sequence[Trial], most: int) -> list[Trial]:
    """Choose at most `most` trials, evenly spread, both ends included."""
    if len(front) <= most:
        return list(front)
    picks = {round(i * (len(front) - 1) / (most - 1)) for i in range(most)}
    return [trial for i, trial in enumerate(front) if i in picks]


def _row(result: SearchResult, trial: Trial, names: Sequence[str]) -> list[str]:
    cost = trial.costs[names[0]]
    dense = result.dense.costs[names[0]]
    held_out = "" if trial.test_score is None else f"{trial.test_score:.4f}"
    return [
        "dense" if trial.id < 0 else str(trial.id),
        *(engineering(trial.costs[name]) for name in names),
        f"{cost / dense:.1%}" if dense else "",
        f"{trial.score:.4f}",
        "" if math.isnan(trial.interval[0]) else f"{trial.interval[0]:.4f} to {trial.interval[1]:.4f}",
        held_out,
    ]


def engineering(value: float) -> str:
    """Format a cost with three digits and a decimal prefix, for example ``"1.23M"``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{prefix}" if value / factor < 999.5 else f"{value / factor:.0f}{prefix}"
    return f"{value:.4g}"
