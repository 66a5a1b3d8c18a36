"""Tables of what the cells say."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.support.common import table

Found = dict[str, Any]
KINDS = ("news", "wikipedia")
TRIED = ("80%", 0)  # share and seed at which all variants of a method are tried
TITLES = {"news": "Lee documents (news, as the calibration text)", "wikipedia": "Wikipedia"}


def rows_of(found: Found) -> list[tuple[str, str, str, int, dict[str, Any]]]:
    """Method, variant, share, seed and figures of every cell."""
    rows = []
    for name, row in found["cells"].items():
        method, variant, share, seed = name.split(" | ")
        rows.append((method, variant, share, int(seed), row))
    return rows


def best_variant(found: Found, method: str) -> str:
    """The variant of least loss over both kinds of text where all were tried.

    Raises:
        ValueError: If they have not been yet.
    """
    losses = {
        variant: sum(row[kind] for kind in KINDS)
        for name, variant, share, seed, row in rows_of(found)
        if name == method and (share, seed) == TRIED
    }
    if not losses:
        raise ValueError(f"variants of {method} must be tried first; run --shares 0.8 --seeds 0 --methods {method!r}")
    return min(losses, key=losses.__getitem__)


def chosen(found: Found) -> dict[tuple[str, str], tuple[str, list[dict[str, Any]]]]:
    """Return the variant kept and its cells of all seeds, by method and share."""
    kept: dict[tuple[str, str], tuple[str, list[dict[str, Any]]]] = {}
    for method, variant, share, _, row in rows_of(found):
        only = len({name for of, name, *_ in rows_of(found) if of == method}) == 1
        if only or variant == best_variant(found, method):
            kept.setdefault((method, share), (variant, []))[1].append(row)
    return kept


def report(found: Found) -> str:
    kept = chosen(found)
    shares = sorted({share for _, share in kept}, reverse=True)
    methods = list(dict.fromkeys(method for method, _ in kept))
    dense = ", ".join(f"{found['dense'][kind]:.3f} on {kind} ({np.exp(found['dense'][kind]):.1f})" for kind in KINDS)
    text = (
        "SmolLM2-135M, structured, no training. Rise of the next-token loss in nats over the dense network, which is "
        "that of the logarithm of the perplexity; in brackets the perplexity. Mean over draws of the calibration text, "
        f"their number after x, and half their range. Dense: {dense}."
    )
    for kind in KINDS:
        header = [TITLES[kind], *(f"{share} of the parameters" for share in shares)]
        lines = [[method, *(cell(found, kept.get((method, share)), kind) for share in shares)] for method in methods]
        text += f"\n\n{table(header, lines)}"
    lines = [[method, *(variant_of(kept.get((method, share))) for share in shares)] for method in methods]
    return (
        f"{text}\n\n{against(found, kept, shares)}Variants kept, and processor seconds of pruning, passes that "
        f"cells share counted in the first of them:\n\n{table(['', *shares], lines)}"
    )


def cell(found: Found, entry: tuple[str, list[dict[str, Any]]] | None, kind: str) -> str:
    if entry is None:
        return ""
    losses = np.array([row[kind] for row in entry[1]])
    rise = losses.mean() - found["dense"][kind]
    spread = f" ± {np.ptp(losses) / 2:.3f}" if len(losses) > 1 else ""
    return f"{rise:.3f}{spread} ({np.exp(losses.mean()):.1f}) x{len(losses)}"


def variant_of(entry: tuple[str, list[dict[str, Any]]] | None) -> str:
    if entry is None:
        return ""
    variant, rows = entry
    return f"{variant}; {np.mean([row['cpu_seconds'] for row in rows]):.0f} s"


def against(found: Found, kept: dict[tuple[str, str], Any], shares: list[str], ours: str = "autoprune") -> str:
    """The rise of each of ours as a share of the best peer's, in every cell, on the seeds that ours has."""
    names = sorted({method for method, _ in kept if method.startswith(ours)})
    lines = []
    for kind in KINDS:
        rises = {key: np.mean([row[kind] for row in rows]) - found["dense"][kind] for key, (_, rows) in kept.items()}
        for name in names or [ours]:
            line = [kind, name]
            for share in shares:
                peers = {of: rise for (of, at), rise in rises.items() if at == share and not of.startswith(ours)}
                best = min(peers, key=peers.__getitem__) if peers else ""
                known = (name, share) in rises and best
                line.append(f"{rises[name, share] / peers[best]:.2f} of {best}'s" if known else f"best: {best}")
            lines.append(line)
    return f"Rise of {ours} as a share of the best peer's:\n\n{table(['', '', *shares], lines)}\n\n"
