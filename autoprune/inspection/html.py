"""Web page of an `Inspection`: all groups and all reasons, readable on light and on dark screens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from autoprune.inspection.text import (
    BRANCHES,
    REASONS_SHOWN,
    SHARES,
    STAYS,
    amount,
    headline,
    meaning,
    notes,
    percent,
    some,
    unread,
)

if TYPE_CHECKING:
    from autoprune.inspection.inspection import BranchShare, FrozenPart, GroupShare, Inspection

MOST_GROUPS = 40
"""Most groups that a notebook shows."""

SCOPED = """
.autoprune-inspection { --line: #8884; --soft: #8882; --bar: #2a78d6; }
.autoprune-inspection .number { display: block; text-align: right; white-space: nowrap; }
.autoprune-inspection td, .autoprune-inspection th { text-align: left; padding: .1em .7em .1em 0; }
.autoprune-inspection .bar { background: var(--soft); width: 6rem; height: .6rem; border-radius: 2px; }
.autoprune-inspection .bar i { display: block; background: var(--bar); height: 100%; border-radius: 2px; }
.autoprune-inspection .wide { overflow-x: auto; }
"""
"""Style of a notebook's cell, which holds for its own elements alone."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --bar: #2a78d6; --dim: #6b6b6b; }
@media (prefers-color-scheme: dark) { :root { --bar: #5aa0f2; --dim: #a5a5a5; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
.number { display: block; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.bar { background: var(--soft); width: 6rem; height: .6rem; border-radius: 2px; }
.bar i { display: block; background: var(--bar); height: 100%; border-radius: 2px; }
.note, .remedy { color: var(--dim); } .remedy::before { content: "\\2192\\00a0"; }
"""


def as_html(found: Inspection) -> str:
    """Make a page without scripts that loads nothing; every name in it is escaped."""
    title = escape(headline(found))
    groups, branches = _groups(found.groups), _branches(found.branches)
    parts = [
        f"<h1>{title}</h1>",
        _costs(found),
        *([f"<h2>Groups</h2>{groups}<p class='note'>{escape(SHARES)}</p>"] if found.groups else []),
        *([f"<h2>Branches</h2>{branches}<p class='note'>{escape(BRANCHES)}.</p>"] if found.branches else []),
        f"<h2>{escape(STAYS.partition(',')[0])}</h2>{_stays(found)}",
        *(f"<p class='note'>{escape(note)}</p>" for note in notes(found)),
    ]
    head = (
        "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{STYLE}</style>"
    )
    body = "\n".join(parts)
    return f"<!doctype html>\n<html lang='en'>\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n"


def as_cell(found: Inspection) -> str:
    """Make a part of a page for notebooks: costs, the first groups, and what stays, with long lists folded up."""
    shown = found.groups[:MOST_GROUPS]
    more = f", the first {MOST_GROUPS} of {len(found.groups)}" if len(shown) < len(found.groups) else ""
    parts = [f"<style>{SCOPED}</style><p><b>{escape(headline(found))}</b></p>", _costs(found)]
    if shown:
        parts.append(f"<details><summary>Groups{more}</summary>{_groups(shown)}</details>")
    if found.branches:
        parts.append(f"<details><summary>Branches</summary>{_branches(found.branches[:MOST_GROUPS])}</details>")
    parts.append(f"<details><summary>{escape(STAYS.partition(',')[0])}</summary>{_stays(found)}</details>")
    parts += [f"<p>{escape(note)}</p>" for note in notes(found)]
    return f"<div class='autoprune-inspection'>{''.join(parts)}</div>"


def _costs(found: Inspection) -> str:
    rows = [
        (escape(name), _right(amount(name, dense)), *_share(found.removable[name]), escape(meaning(found, name)))
        for name, dense in found.dense.items()
    ]
    return _table(("cost", _right("dense"), _right("removable"), "", ""), rows)


def _groups(groups: Sequence[GroupShare]) -> str:
    rows = [
        (
            f"<code>{escape(group.name)}</code>",
            *(_right(str(number)) for number in (group.units, group.layers)),
            *_share(group.flops_share),
            *_share(group.params_share),
        )
        for group in groups
    ]
    return _table(("group", *map(_right, ("units", "layers", "flops")), "", _right("params"), ""), rows)


def _branches(branches: Sequence[BranchShare]) -> str:
    rows = [
        (f"<code>{escape(branch.name)}</code>", *_share(branch.flops_share), *_share(branch.params_share))
        for branch in branches
    ]
    return _table(("branch", _right("flops"), "", _right("params"), ""), rows)


def _stays(found: Inspection) -> str:
    if not found.frozen and not found.untouched:
        return f"<p>{'Nothing.' if found.groups else 'The model has no parameters.'}</p>"
    parts = [f"<p>{escape(unread(found))}.</p>"] if found.untouched else []
    header = (_right("params"), "why, and what helps")
    if rest := found.frozen[REASONS_SHOWN:]:
        more = _table(header, map(_row, rest))
        parts.insert(0, f"<details><summary>{len(rest)} more</summary>{more}</details>")
    if found.frozen:
        parts.insert(0, _table(header, map(_row, found.frozen[:REASONS_SHOWN])))
    return "\n".join([*parts, "<p class='note'>What is listed may still shrink along another dimension.</p>"])


def _row(part: FrozenPart) -> tuple[str, str]:
    why = f"{escape(part.reason)}: <code>{escape(some(part.tensors))}</code>"
    help_ = f"<div class='remedy'>{escape(part.remedy)}</div>" if part.remedy else ""
    return _right(percent(part.params_share)), why + help_


def _right(text: str) -> str:
    return f"<span class='number'>{escape(text)}</span>"


def _share(share: float) -> tuple[str, str]:
    return _right(percent(share)), f"<div class='bar'><i style='width:{100 * share:.1f}%'></i></div>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a table whose cells are HTML already."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<div class='wide'><table>{line(header, 'th')}{body}</table></div>"
