"""One search of SmolLM2-135M at 70 % of its parameters: time by the clock, set-up, memory, and the network it finds.

Text and budget are those of `benchmarks.peers.language`, first draw. Needs what that benchmark needs; give it the
machine for itself.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

import autoprune
from autoprune.result import SearchResult
from benchmarks.peers.language.__main__ import judged
from benchmarks.peers.language.case import Case
from benchmarks.peers.language.ours import SPACES, given_text
from benchmarks.peers.language.texts import calibration, held_out
from benchmarks.peers.language_model import load
from benchmarks.support.common import environment, table, write

COMMAND = "python -m benchmarks.peers.language_search"
SHARE = 0.7


class Begun:
    """Time of the first trial."""

    def __init__(self) -> None:
        self.at = 0.0

    def on_trial(self, trial: autoprune.Trial) -> None:
        """Note it."""
        self.at = self.at or time.perf_counter()

    def on_end(self, result: SearchResult) -> None:
        """Do nothing: a callback has this method."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    model, tokenizer = load()
    case = Case(model, calibration(tokenizer, 0), 0, chosen.trials)
    embedding = model.get_submodule("model.embed_tokens").get_parameter("weight").numel()
    begun = Begun()
    start, processor = time.perf_counter(), time.process_time()
    result = autoprune.search(
        model,
        f"params <= {embedding + case.most(SHARE)}",
        given_text(case),
        metric="next_token",
        space=SPACES["product"],
        trials=chosen.trials,
        execution=autoprune.Execution(callbacks=[begun]),
    )
    end, processor = time.perf_counter(), time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with torch.no_grad():
        losses = judged(result.build(), torch.bfloat16, held_out(tokenizer))
    found = {
        "environment": environment(COMMAND),
        "trials": len(result.trials),
        "threads": chosen.threads,
        "minutes": (end - start) / 60,
        "minutes to the first trial": (begun.at - start) / 60,
        "processor minutes": processor / 60,
        "peak memory, GiB": peak,
        "loss": losses,
        "notes": list(result.notes),
    }
    rows = [[name, f"{found[name]:.1f}"] for name in found if name.startswith(("minutes", "processor", "peak"))]
    rows += [[f"loss on {kind}, nats", f"{loss:.3f}"] for kind, loss in losses.items()]
    text = table([f"{found['trials']} trials, {chosen.threads} threads", ""], rows)
    write("language_search", "One search of a language model", found, f"{text}\n\n" + "\n\n".join(result.notes))


if __name__ == "__main__":
    main()
