"""Every method by name, with what its paper leaves open as variants; the better one on the first seed is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from benchmarks.peers.language.case import Case
from benchmarks.peers.language.depth import angular, last_blocks, short_gpt
from benchmarks.peers.language.evopress import evo_press
from benchmarks.peers.language.flap import flap
from benchmarks.peers.language.multipruner import multi_pruner
from benchmarks.peers.language.ours import DATABASE, SPACES, search
from benchmarks.peers.language.replaceme import replace_me
from benchmarks.peers.language.slicegpt import slice_gpt
from benchmarks.peers.language.taylor import llm_pruner
from benchmarks.peers.language.ziplm import zip_lm

Method = Callable[[Case, float], nn.Module]
OURS = "autoprune"
OURS_WRITTEN = "autoprune, own text"  # the dense model writes as much text again

PEERS: dict[str, dict[str, Method]] = {
    "last blocks": {
        "all but the final one": partial(last_blocks, spared=1),
        "the very last": partial(last_blocks, spared=0),
    },
    "ShortGPT": {"block influence": short_gpt},
    "angular": {
        "last token": partial(angular, last_token=True),
        "all tokens": partial(angular, last_token=False),
    },
    "ReplaceMe": {
        "least squares": partial(replace_me, ridge=0.0),
        "ridge 0.01": partial(replace_me, ridge=0.01),
    },
    "FLAP": {
        "as in the paper": partial(flap, squared=False),
        "heads squared, as in its code": partial(flap, squared=True),
    },
    "SliceGPT": {
        "one rotation": partial(slice_gpt, rotations="one"),
        "a rotation each, after norms": partial(slice_gpt, rotations="each"),
        "a rotation each, before norms": partial(slice_gpt, rotations="each", normed=False),
    },
    "LLM-Pruner": {
        f"{'element' if element else 'vector'}, {groups} groups{', all blocks' if ends else ''}": partial(
            llm_pruner, groups=groups, element=element, ends=ends
        )
        for element, groups, ends in ((True, 3, False), (True, 2, False), (False, 3, False), (True, 3, True))
    },
    "ZipLM": {
        "3 groups, dense inputs": partial(zip_lm, groups=3, damping=1e-2, sequential=False),
        "2 groups, dense inputs": partial(zip_lm, groups=2, damping=1e-2, sequential=False),
        "3 groups, dense inputs, damping 1e-4": partial(zip_lm, groups=3, damping=1e-4, sequential=False),
        "3 groups, pruned inputs": partial(zip_lm, groups=3, damping=1e-2, sequential=True),
    },
    "MultiPruner": {"lazy": multi_pruner},
    "EvoPress": {"damping 1e-4": partial(evo_press, damping=1e-4)},
}
METHODS = PEERS | {
    OURS: {space: partial(search, space=space) for space in SPACES},
    OURS_WRITTEN: {space: partial(search, space=space, written=True) for space in ("channels", DATABASE)},
}
