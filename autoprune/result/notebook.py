"""HTML of a result and of an audit for notebooks: plain tables, everything escaped, no script, nothing loaded."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from autoprune.result.tables import front_rows, headline, notes_of, shown_of

if TYPE_CHECKING:
    from autoprune.result.audit_report import Audit
    from autoprune.result.search_result import SearchResult

MOST_NOTE = 1_000
"""Most characters of a note that are shown."""

_CELL = "text-align:right;padding:.1em .8em;white-space:nowrap"


def result_html(result: SearchResult, why_empty: str) -> str:
    """Make the table of the front, with the notes folded up; see `SearchResult`."""
    shown = shown_of(result)
    notes = notes_of(result, why_empty)
    return _framed([_paragraph(headline(result, len(shown))), _table(front_rows(result, shown)), _folded(notes)])


def audit_html(audit: Audit) -> str:
    """Make the tables and the conclusions of an audit; see `Audit`."""
    return _framed([_paragraph(audit.headline()), *map(_table, audit.tables()), *map(_paragraph, audit.texts())])


def _framed(parts: Sequence[str]) -> str:
    return f"<div style='overflow-x:auto'>{''.join(parts)}</div>"


def _paragraph(text: str) -> str:
    return f"<p style='margin:.3em 0'>{escape(text[:MOST_NOTE])}</p>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Make a table from text, the header first."""
    lines = []
    for tag, row in zip(["th", *["td"] * (len(rows) - 1)], rows, strict=True):
        cells = "".join(f"<{tag} style='{_CELL}'>{escape(cell)}</{tag}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f"<table style='border-collapse:collapse'>{''.join(lines)}</table>"


def _folded(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    title = "1 note" if len(notes) == 1 else f"{len(notes)} notes"
    return f"<details><summary>{title}</summary>{''.join(map(_paragraph, notes))}</details>"
