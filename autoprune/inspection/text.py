"""Plain text of an `Inspection` for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoprune.inspection.inspection import Inspection

WIDTH = 100
GROUPS_SHOWN = 40
REASONS_SHOWN = 3

MEANINGS = {
    "flops": "multiply-accumulates of one sample",
    "params": "",
    "memory_bytes": "weights, buffers and peak of activations, {samples}",
}
SHARES = (
    "flops, params: share of the dense model that goes when this group alone keeps as little as it may (above: when "
    "every group does). A layer between two groups counts for both."
)
BRANCHES = (
    'Residual branches and blocks that space="depth" may drop, with the share of the dense model that goes with each'
)
BRANCHES_SHOWN = 6
STAYS = "What stays, and the share of the params there (which may still shrink along another dimension)"


def as_text(found: Inspection) -> str:
    """Format in at most `WIDTH` columns; long lists are shortened."""
    return "\n".join(
        [headline(found), "", *_costs(found), *_groups(found), *_branches(found), *_stays(found), *_notes(found)]
    )


def headline(found: Inspection) -> str:
    """Summarise in one line: the numbers of units and of groups."""
    units = sum(group.units for group in found.groups)
    groups = len(found.groups)
    what = f"{units} removable units in {groups} group{'s' * (groups > 1)}" if units else "nothing can be pruned"
    if branches := len(found.branches):
        also = f"{branches} branch{'es' * (branches > 1)} that may be dropped"
        what = f"{what}, {also}" if units else also
    return f"{found.model}: {what}"


def _costs(found: Inspection) -> list[str]:
    lines = [f"  {'cost':12}    dense  removable"]
    for name, dense in found.dense.items():
        share = percent(found.removable[name])
        lines.append(f"  {name:12}  {amount(name, dense):>7}    {share:>7}  {meaning(found, name)}".rstrip())
    return lines


def meaning(found: Inspection, cost: str) -> str:
    """Say what a cost counts, and of how many samples."""
    samples = "one sample" if found.cost_batch == 1 else f"{found.cost_batch} samples"
    return MEANINGS[cost].format(samples=samples)


def _groups(found: Inspection) -> list[str]:
    if not found.groups:
        return []
    shown = found.groups[:GROUPS_SHOWN]
    width = min(max(len("group"), *(len(group.name) for group in shown)), WIDTH - 40)
    lines = ["", f"  {'group':{width}}   units  layers    flops   params"]
    lines.append("  " + "-" * (len(lines[-1]) - 2))
    for group in shown:
        shares = f"{percent(group.flops_share):>7}  {percent(group.params_share):>7}"
        lines.append(f"  {_shorten(group.name, width):{width}}  {group.units:>6}  {group.layers:>6}  {shares}")
    if len(found.groups) > len(shown):
        lines.append(f"  ... and {len(found.groups) - len(shown)} more")
    return [*lines, "", *_wrap(SHARES, "  ")]


def _branches(found: Inspection) -> list[str]:
    if not found.branches:
        return []
    shown = found.branches[:BRANCHES_SHOWN]
    width = min(max(len("branch"), *(len(branch.name) for branch in shown)), WIDTH - 24)
    lines = ["", *_wrap(BRANCHES, "  "), f"  {'branch':{width}}    flops   params"]
    for branch in shown:
        shares = f"{percent(branch.flops_share):>7}  {percent(branch.params_share):>7}"
        lines.append(f"  {_shorten(branch.name, width):{width}}  {shares}")
    if (rest := len(found.branches) - len(shown)) > 0:
        lines.append(f"  ... and {rest} more: see .branches")
    return lines


def _stays(found: Inspection) -> list[str]:
    lines = ["", f"  {STAYS}"]
    for part in found.frozen[:REASONS_SHOWN]:
        lines += _wrap(f"{part.reason}: {some(part.tensors)}", f"  {percent(part.params_share):>7}  ")
        lines += _wrap(f"-> {part.remedy}", " " * 11) if part.remedy else []
    if (rest := len(found.frozen) - REASONS_SHOWN) > 0:
        lines.append(f"           ... and {rest} more reason{'s' * (rest > 1)}: see .frozen")
    if found.untouched:
        lines += _wrap(unread(found), " " * 11)
    if not found.frozen and not found.untouched:
        lines.append(" " * 11 + ("nothing" if found.groups else "the model has no parameters"))
    return lines


def _notes(found: Inspection) -> list[str]:
    return [line for note in notes(found) for line in ("", *_wrap(note, "  "))]


def notes(found: Inspection) -> list[str]:
    """Further remarks: sizes that follow the units, and the device of the trace."""
    lines = []
    if found.limits:
        lines.append(f"Removable is what a search can reach: {found.limits}.")
    if found.attributes:
        lines.append(f"Sizes kept in Python that follow the units: {some(found.attributes)}.")
    if found.graphs:
        lines.append(f"Their code ties sizes, so they are delivered as graphs of what they ran: {some(found.graphs)}.")
    if found.undropped:
        name, why = next(iter(found.undropped.items()))
        lines.append(
            f"Not dropped: {len(found.undropped)} more residual branches, such as that of {name or 'the model'}: {why}."
        )
    if why := found.structure.untrained:
        lines.append(f"What only training runs was not followed, and may not fit a pruned model: {why}.")
    if missing := found.structure.terms.uncounted:
        lines.append(
            f"FLOPs leave out {some(missing)}: no formula says what it costs, and budgets on flops are refused."
        )
    if found.structure.device != "meta":
        lines.append(
            f"Traced on real values ({found.structure.device}), because the model cannot run on the meta device; its "
            f"tensors took {amount('memory_bytes', found.trace_bytes)} at the most, besides parameters and buffers."
        )
    return lines


def unread(found: Inspection) -> str:
    """Name the parameters that the forward pass did not read."""
    count = human(sum(found.untouched.values()))
    return f"{count} params that the forward pass did not read: {some(list(found.untouched))}"


def amount(cost: str, value: float) -> str:
    """Format a cost with its unit."""
    return f"{human(value).upper()}B" if cost == "memory_bytes" else human(value)


def human(number: float) -> str:
    """Format a number with three digits and a decimal prefix, as in budgets: 2580000 is ``2.58M``."""
    power = 0
    while number >= 999.5 and power < 4:
        number = number / 1000
        power = power + 1
    digits = 0 if power == 0 else (number < 99.95) + (number < 9.995)  # three digits in all
    return f"{number:.{digits}f}{('', 'k', 'M', 'G', 'T')[power]}"


def percent(share: float) -> str:
    """Format a share in [0, 1] as a percentage."""
    return f"{100 * share:.1f} %"


def some(names: Sequence[str], count: int = 3) -> str:
    """List the first few names, and the number of the others."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _shorten(name: str, width: int) -> str:
    """Leave out the middle of a name that is too long: its ends identify it."""
    half = (width - 3) // 2
    return name if len(name) <= width else f"{name[:half]}...{name[-half:]}"


def _wrap(text: str, first: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first))
