"""Hash what a candidate changes before each resume point: candidates with equal digests compute the same up to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from autoprune.evaluators.activation_cache.resume_points import NEVER, Cut, Flow
from autoprune.evaluators.protocol import Context
from autoprune.protocols import IntArray
from autoprune.structure.branches.branch import Branch
from autoprune.structure.branches.handover import runs_of
from autoprune.structure.slicing.slicing import Edit

WHOLE = ""  # the name of the whole model
Mark = tuple[int, str, bool]


def digests_of(
    edit: Edit, marks: Sequence[Mark], cuts: Sequence[Cut], branches: Sequence[Branch] = ()
) -> dict[str, bytes]:
    """Digest of what the candidate changes before each cut, by its name; that of the whole candidate under `WHOLE`.

    A layer before dropped blocks may be re-fitted to stand for them, so it counts as changed by them all.
    """
    runs = {run.fed_by: run.blocks for run in runs_of(branches, edit.dropped)}
    digests = {}
    digest = hashlib.blake2b(digest_size=16)
    left = iter(marks)
    mark = next(left, None)
    for cut, end in (*((cut.name, cut.end) for cut in cuts), (WHOLE, NEVER + 1)):
        while mark is not None and mark[0] < end:
            _describe(edit, runs, mark, digest.update)
            mark = next(left, None)
        digests[cut] = digest.digest()
    return digests


def first_operations(context: Context, flow: Flow) -> IntArray:
    """First operation that each dimension changes, shape (d,)."""
    sizes = context.space.sizes
    candidates = np.vstack([np.zeros_like(sizes), np.diag(sizes - 1)])
    dense, *changed = (context.structure.edit(context.space.pruning(c)) for c in candidates.tolist())
    firsts = []
    for edit in changed:
        places = [flow.first_read(name) for name in {*edit.slices, *edit.zeroed}]
        before = (run.fed_by for run in runs_of(context.structure.branches, edit.dropped))
        places += [flow.enters.get(name, 0) for name in (*edit.dropped, *before)]
        for name, values in edit.attributes.items():
            if values != dense.attributes.get(name):
                places.append(flow.enters.get(name, 0))
        firsts.append(min(places, default=NEVER))
    return np.array(firsts, dtype=np.int64)


def marks_of(context: Context, flow: Flow) -> list[Mark]:
    """First use of each tensor and module that candidates may change: operation, name, and whether it is a tensor."""
    structure = context.structure
    tensors = ((flow.first_read(name), name, True) for name in {*structure.units_of, *structure.weights})
    changed = {each.module for each in structure.attributes} | {each.module for each in structure.numbered}
    changed |= {name for branch in structure.branches for name in (*branch.modules, branch.fed_by) if name}
    modules = ((flow.enters.get(name, -1), name, False) for name in changed)
    return sorted([*tensors, *modules])


def _describe(edit: Edit, runs: Mapping[str, tuple[str, ...]], mark: Mark, write: Callable[[bytes], None]) -> None:
    """Feed the change that an edit makes to a tensor or a module to a hash."""
    _, name, tensor = mark
    if not tensor:
        sizes = sorted(edit.attributes.get(name, {}).items())
        write(repr((name, sizes, edit.dropped.get(name), runs.get(name))).encode())
    elif name in edit.slices or name in edit.zeroed:
        write(repr((name, edit.zeroed.get(name, 0), edit.patterns.get(name))).encode())
        for dim, index in sorted(edit.slices.get(name, {}).items()):
            write(repr((dim, len(index))).encode())
            write(index.tobytes())
