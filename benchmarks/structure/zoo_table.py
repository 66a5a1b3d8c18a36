"""Prunable and frozen parts of each network of the zoo, with the reasons: writes ``docs/zoo.md``.

Run ``python -m benchmarks.structure.zoo_table`` from the root of the repository, about 2 minutes on one thread. FLOPs
are counted on the dense and on the narrowest model, not predicted.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from autoprune.protocols import Pruning
from autoprune.structure.analysis import analyse, best_choices
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.structure.tracing.trace import trace
from benchmarks.support.common import table
from tests.counting import reach
from zoo import ZOO, Entry
from zoo.entries import AnyEntry
from zoo.hf import HF_ZOO
from zoo.tasks import TASK_ZOO

DOCUMENT = Path(__file__).parents[2] / "docs" / "zoo.md"
EXPECTED = ("returned by the model", "reads the model's input", "looked up by index")
"""Reasons that hold for the ends of every network."""

INTRODUCTION = """# The zoo: what can be pruned, and what stays

Written by `python -m benchmarks.structure.zoo_table` (torch {torch}, one thread). Classes of transformers have small
random configurations: two layers, widths of 16 to 64.

- *reachable*: share of the FLOPs (multiply-accumulates) that goes when every group keeps as few units as it
  may; *body*: the same without the layer that makes the logits of words, for models that have one.
- *stays*: why dimensions of parameters stay, by how many of them, besides those that hold in every network: what reads
  the input, what is returned and what is looked up by index.
- *seconds*: processor time of the trace and the propagation, and of the whole analysis with its checks.
- *traced on*: the meta device, or real values where the network reads some.
"""


class Row(NamedTuple):
    """One network, in the words of the table."""

    network: str
    kind: str
    groups: int
    units: int
    reachable: str
    body: str
    stays: str
    seconds: str
    traced_on: str


def measure(entry: Entry | AnyEntry, kind: str) -> Row:
    """Analyse one network and count what is left of it."""
    model, inputs = entry.build(), entry.inputs()
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})

    def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return entry.forward(model, kwargs or args) if isinstance(entry, AnyEntry) else model(*args)

    traced, _ = timed(lambda: best_choices(trace(Example(model, args, kwargs, forward))))
    analysed, structure = timed(lambda: analyse(Example(model, args, kwargs, forward=forward)))
    narrowest = structure.build(
        model, Pruning({group.name: tuple(range(group.multiple)) for group in structure.groups})
    )
    share = reach(model, narrowest, lambda built: forward(built, *args, **kwargs))
    return Row(
        f"`{entry.name}`",
        kind,
        len(structure.groups),
        int(structure.sizes.sum()),
        f"{share.whole:.1%}",
        f"{share.body:.1%}",
        stays(structure),
        f"{traced:.1f}, {analysed:.1f}",
        structure.device,
    )


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a call, and what it returned."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def stays(structure: Structure, most: int = 3) -> str:
    """The most frequent reasons that do not hold for every network, without the paths of modules."""
    reasons: Counter[str] = Counter()
    for frozen in structure.frozen:
        if not frozen.reason.startswith(EXPECTED):
            reasons[re.sub(r" in [\w.]*\d[\w.]*| in \w+(\.\w+)+", "", frozen.reason)] += 1
    named = [f"{reason} ({count})" for reason, count in reasons.most_common(most)]
    if structure.untouched:
        named.append(f"not read in evaluation mode ({len(structure.untouched)})")
    return "; ".join(named).replace("|", "\\|") or "-"


def main() -> None:
    """Measure all networks and write the document."""
    torch.set_num_threads(1)
    kinds = [(ZOO, "convolutional"), (TASK_ZOO, ""), (HF_ZOO, "")]
    rows = [measure(entry, kind or ", ".join(sorted(entry.tags))) for zoo, kind in kinds for entry in zoo.values()]
    header = [name.replace("_", " ") for name in Row._fields]
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(INTRODUCTION.format(torch=torch.__version__) + "\n" + table(header, rows) + "\n")
    print(DOCUMENT.read_text())


if __name__ == "__main__":
    main()
