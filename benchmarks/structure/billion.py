"""A Llama of a billion random parameters in bfloat16: database of two layers, their front, a search of 5 candidates.

Run ``python -m benchmarks.structure.billion`` from the root of the repository. Times are processor times, memory is the
peak of the process. Weights are random, so only time and memory mean anything. Each part is written when it is done.
"""

from __future__ import annotations

import resource
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import autoprune
from autoprune.data.batch import default_forward
from autoprune.importance.calibration import Calibration
from autoprune.importance.database.build import equations_of
from autoprune.importance.database.database import Table
from autoprune.importance.database.downdates import remove_greedily
from autoprune.importance.database.influence import losses_of
from autoprune.importance.database.parts import RIDGE
from autoprune.optimizers.knapsack.multiple_choice import choose_options, total
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.structure.units import Group
from benchmarks.support.common import environment, table, write

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.structure.billion"
MOST_GB = 12.0
LAYERS, SEQUENCES, TOKENS, TRIALS = 21, 4, 32, 5
PRICED = ("layers.0.", "layers.10.")
LEVELS = 9


def llama() -> nn.Module:
    """TinyLlama's shape with 21 layers, 1.06 billion parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    config = LlamaConfig(**shape, num_hidden_layers=LAYERS, vocab_size=32000, use_cache=False)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def batches(n: int, seed: int) -> list[dict[str, Tensor]]:
    drawn = torch.randint(0, 32000, (n, TOKENS), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part} for part in drawn.split(2)]


def priced(model: nn.Module, structure: Structure) -> dict[str, Any]:
    """Database of the groups of two layers, and the front of all layers if the others had these tables, too."""
    groups = tuple(group for group in structure.groups if any(part in group.name for part in PRICED))
    data = batches(SEQUENCES, 1)
    began = time.process_time()
    calibration = Calibration(model, structure, data, default_forward)
    tables = {}
    for each in equations_of(calibration, {group.name for group in groups}):
        removal, errors = remove_greedily(each.parts, RIDGE)
        tables[each.group] = Table(removal, errors, losses_of(each.parts, removal, errors, RIDGE))
    built = time.process_time()
    losses, costs = [], []
    for group in groups:
        kept = np.linspace(group.size, group.size // 4, LEVELS).astype(int).tolist()
        losses.append([tables[group.name].loss(n) for n in kept])
        costs.append([n * weights_of_unit(model, group) for n in kept])
    repeats = LAYERS // len(PRICED)
    whole = repeats * sum(each[0] for each in costs)
    shares = (0.9, 0.8, 0.7, 0.6, 0.5)
    chosen = choose_options(losses * repeats, costs * repeats, [share * whole for share in shares])
    expected = total([np.array(each) for each in losses * repeats], chosen).tolist()
    return {
        "groups": len(groups),
        "database seconds": built - began,
        "front seconds": time.process_time() - built,
        "front": {f"{share:.0%}": loss for share, loss in zip(shares, expected, strict=True)},
    }


def weights_of_unit(model: nn.Module, group: Group) -> int:
    """Parameters that go with a unit."""
    parts = [(slot, model.get_parameter(slot.tensor)) for slot in group.slots]
    return sum(slot.indices.shape[1] * weight.numel() // weight.shape[slot.dim] for slot, weight in parts)


def searched(model: nn.Module) -> dict[str, Any]:
    """A search of all layers within 80 % of the parameters."""
    data = autoprune.Data(*(batches(SEQUENCES, seed) for seed in (1, 2, 3)))
    began = time.process_time()
    result = autoprune.search(
        model,
        "params <= 80%",
        data,
        space=autoprune.Channels(ignore=["*embed*"], criterion="l2"),
        start=autoprune.Start(prior="criterion"),
        trials=TRIALS,
        execution=autoprune.Execution(progress=False),
    )
    each = [trial.evaluations[-1].seconds for trial in result.trials if trial.evaluations]
    return {"seconds": time.process_time() - began, "trials": len(each), "seconds a trial": float(np.mean(each))}


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def report(found: dict[str, Any]) -> str:
    rows = [
        [part, name, f"{value:.3g}" if isinstance(value, float) else str(value)]
        for part, row in found.items()
        if part != "environment"
        for name, value in row.items()
    ]
    return (
        f"Llama of {LAYERS} layers in bfloat16, {SEQUENCES} sequences of {TOKENS} tokens in each part of the data. The "
        f"database is of two layers; its front takes their tables for the others. At most {MOST_GB:.0f} GB are allowed."
        f"\n\n{table(['part', '', ''], rows)}"
    )


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"environment": environment(COMMAND)}

    def keep(part: str, row: dict[str, Any]) -> None:
        found[part] = {**row, "peak of memory, GB": peak_gb()}
        write("billion", "A language model of a billion parameters", found, report(found))

    model = llama()
    keep("model", {"parameters": sum(each.numel() for each in model.parameters())})
    began = time.process_time()
    structure = analyse(Example(model, (), batches(1, 0)[0]))
    keep("structure", {"seconds": time.process_time() - began, "groups": len(structure.groups)})
    keep("two layers", priced(model, structure))
    keep("search", searched(model))


if __name__ == "__main__":
    main()
