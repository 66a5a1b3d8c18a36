"""Forget one coupling at a time: do the checks notice whenever what is built would be wrong?

Run ``python -m benchmarks.structure.edges`` from the root of the repository, about 5 minutes on one thread; exits with
1 when a coupling that matters is missed. Every coupling between labels that the analysis of five networks finds is left
out, one at a time. It matters if anything built from the structure that is left raises, or differs from the dense model
with the removed units masked (an oracle that shares no code with the checks).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.structure.analysis import best_choices
from autoprune.structure.checks.checks import Checker
from autoprune.structure.example import Example
from autoprune.structure.labels import Propagation
from autoprune.structure.structure import assemble
from autoprune.structure.tracing.trace import trace
from autoprune.structure.units import find_units
from benchmarks.support.common import environment, table, write
from tests.candidates import gap, oracle_outputs, outputs_of, random_pruning
from zoo import ZOO
from zoo.tasks import TASK_ZOO

COMMAND = "python -m benchmarks.structure.edges"
NETWORKS = ("resnet20", "mobilenet_v3", "densenet", "shufflenet_v2", "einsum_vit")
PRUNINGS = 3
TOLERANCE = 1e-5


def forgetful(flow: Propagation) -> Iterator[tuple[str, Propagation]]:
    """The labels without one coupling each, and the operation that makes it."""
    for i, edge in enumerate(flow.edges):
        yield flow.record.ops[edge.op].where(), dataclasses.replace(flow, edges=flow.edges[:i] + flow.edges[i + 1 :])


def goes_wrong(model: nn.Module, args: tuple[Tensor, ...], checker: Checker) -> bool:
    """Return whether a module built from unchecked labels raises or differs from the oracle."""
    structure = assemble(checker.flow, find_units(checker.flow), attributes=checker.sizes.attributes)
    rng = np.random.default_rng(0)
    for _ in range(PRUNINGS):
        pruning = random_pruning(structure, rng)
        try:
            found = outputs_of(structure.build(model, pruning), args)
            expected = oracle_outputs(model, structure.edit(pruning), args)
            if gap(found, expected) > TOLERANCE * max(1.0, *(out.abs().max().item() for out in expected)):
                return True
        except Exception:  # a wrong size raises whatever the layer at hand raises
            return True
    return False


def examine(name: str) -> tuple[int, int, list[str]]:
    """Couplings of one network, how many of them matter, and those of them that the checks miss."""
    entry = {**ZOO, **TASK_ZOO}[name]
    model, args = entry.build(), entry.inputs()
    example = Example(model, args)
    whole, _ = best_choices(trace(example))
    assert not Checker(whole, example, (), seed=0).failures(), "nothing is wrong with all couplings"
    matter, missed = 0, []
    for where, flow in forgetful(whole):
        checker = Checker(flow, example, (), seed=0)
        # Which groups are to blame does not count here.
        caught = bool(checker.sizes.settle()) or checker.error({}) is not None
        # An edge that the search for sizes puts back is as good as caught; what it builds is then right.
        if goes_wrong(model, args, checker):
            matter += 1
            missed += [] if caught else [where]
    return len(whole.edges), matter, missed


def main() -> int:
    torch.set_num_threads(1)
    where = environment(COMMAND)
    found = {}
    for name in NETWORKS:
        found[name] = examine(name)
        print(name, found[name], file=sys.stderr, flush=True)
    rows = [(name, edges, matter, matter - len(missed)) for name, (edges, matter, missed) in found.items()]
    met = not any(missed for _, _, missed in found.values())
    text = (
        f"{table(('network', 'couplings', 'of these, wrong without it', 'of these, caught by the checks'), rows)}\n\n"
        "A coupling without which nothing goes wrong is implied by others.\n\n"
        f"Target (all caught) {'met' if met else 'NOT met'}."
    )
    write("edges", "Forgotten couplings", {"environment": where, "met": met, "found": found}, text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
