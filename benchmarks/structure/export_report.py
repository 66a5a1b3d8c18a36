"""Report of `benchmarks.structure.export_parity`: its table, and its targets with what was found."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

WHICH, TARGETS = ("dense", "pruned"), ("onnx", "torch")
SIZES = (("onnx", "tensors"), ("onnx", "bytes"), ("torch", "bytes"))
HEADER = [
    *("network", "kind", "", "ONNX differs by", "program differs by", "weights", "weights in ONNX", "ONNX file"),
    *("program file", "ms", "any"),
]


def rows(found: Mapping[str, Any], order: Sequence[str]) -> Iterator[list[str]]:
    """Rows of the table, two for each network."""
    for name in sorted(found, key=order.index):
        one = found[name]
        for which in ("dense", "pruned"):
            own = one[which]
            onnx_file, program = own["onnx"], own["torch"]
            share = own["weights"] / one["dense"]["weights"]
            yield [
                f"`{name}`" if which == "dense" else "",
                one["kind"] if which == "dense" else "",
                which if which == "dense" else f"{one['flops']:.0%} of FLOPs",
                *(f"{each['relative']:.0e}" if "relative" in each else "refused" for each in (onnx_file, program)),
                f"{own['weights'] / 1e3:,.0f}" + ("" if which == "dense" else f" ({share:.2f})"),
                *(
                    _size(one, which, target, key)
                    for target, key in (("onnx", "tensors"), ("onnx", "bytes"), ("torch", "bytes"))
                ),
                f"{one['ms'][which]:.2f}" if "ms" in one else "",
                ", ".join(onnx_file.get("dynamic", program.get("dynamic", []))),
            ]


def _size(one: Mapping[str, Any], which: str, target: str, key: str) -> str:
    """Size in kB, of a pruned one also as a share of the dense one's."""
    size, dense = one[which][target].get(key), one["dense"][target].get(key)
    if size is None:
        return ""
    return f"{size / 1e3:,.0f}" + ("" if which == "dense" or not dense else f" ({size / dense:.2f})")


def summary(found: Mapping[str, Any]) -> str:
    """State the targets and what was found."""
    every = [(target, own[which][target]) for own in found.values() for which in WHICH for target in TARGETS]
    refused = sum("error" in each for _, each in every)
    worst = {target: max(each.get("relative", 0.0) for name, each in every if name == target) for target in TARGETS}
    complete = [own for own in found.values() if "ms" in own]
    off = [100 * _off(own, "tensors") for own in complete]
    whole = [100 * _off(own, "bytes") for own in complete]
    speed = [own["ms"]["dense"] / own["ms"]["pruned"] for own in complete]
    slower = [f"`{name}`" for name, own in found.items() if "ms" in own and own["ms"]["dense"] < own["ms"]["pruned"]]
    return (
        f"{len(found)} networks of {len({own['kind'] for own in found.values()})} kinds: {len(every) - refused} of "
        f"{len(every)} files written, {refused} refused. Largest difference, as a share of an output's largest value: "
        f"{worst['onnx']:.1e} under onnxruntime, {worst['torch']:.1e} of programs loaded again (target: 1e-4); "
        f"{max(each.get('absolute', 0.0) for _, each in every):.1e} absolute.\n\n"
        "The weights in a pruned ONNX file are smaller in proportion to the model's within "
        f"{max(off):.1f} points (median {statistics.median(off):.1f}; target: 5). Whole files are within 5 points for "
        f"{sum(gap <= 5 for gap in whole)} of {len(whole)}, and within {max(whole):.0f} for all: the graph of a "
        "network of a few thousand parameters takes most of its file, and does not shrink.\n\n"
        f"At half of the FLOPs onnxruntime is {statistics.median(speed):.2f} times as fast in the median "
        f"({min(speed):.2f} to {max(speed):.2f}). Widths are whatever meets the share of the FLOPs, and slower than "
        f"before are {', '.join(slower) or 'none'}.\n\n"
        "Sizes are in kB, with the share of the dense one in brackets; ms is processor time for 8 samples."
    )


def _off(own: Mapping[str, Any], key: str) -> float:
    """Difference between the share that a file keeps of its size, and the model of its weights."""
    weights = own["pruned"]["weights"] / own["dense"]["weights"]
    return abs(own["pruned"]["onnx"][key] / own["dense"]["onnx"][key] - weights)
