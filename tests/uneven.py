"""Small models of transformers whose layers are pruned to different widths.

Run as a module, it loads models in a process of its own: ``python -m tests.uneven FOLDER NAME...`` writes the answers
of the model in each folder FOLDER/NAME next to it.
"""

import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import autoprune
from autoprune.result.recipe import attach
from autoprune.search_spaces import Channels
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from zoo.hf import HF_ZOO

SHARES = (0.5, 1.0, 0.75)


def uneven(name: str, shares: tuple[float, ...] = SHARES, dropped: tuple[str, ...] = ()) -> nn.Module:
    """A model of the zoo; its groups keep these shares of their units, one after the other, chosen at random.

    Args:
        name: In the zoo.
        shares: Of the units.
        dropped: Branches that are left out.
    """
    entry = HF_ZOO[name]
    model = entry.build()
    structure = analyse(Example(model, (), entry.inputs(), forward=lambda model, **given: entry.forward(model, given)))
    generator = np.random.default_rng(0)
    order = {group.name: generator.permutation(group.size).tolist() for group in structure.groups}
    space = Channels(options=tuple(sorted({1.0, *shares}, reverse=True))).bind(structure, order)
    candidate = [
        int(np.argmin([abs(units - share * dimension.options[0]) for units in dimension.options]))
        for share, dimension in zip(cycle(shares), space.dimensions, strict=False)
    ]
    pruning = replace(space.pruning(candidate), dropped=dropped)
    return attach(structure.build(model, pruning), structure.edit(pruning), model).eval()


def answers(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Outputs of a model for inputs of the zoo, and what it generates, if it is a decoder."""
    inputs = HF_ZOO[name].inputs()
    with torch.no_grad():
        found = {"outputs": HF_ZOO[name].forward(model, inputs)}
        if "decoder" in HF_ZOO[name].tags:
            found["generated"] = model.generate(inputs["input_ids"], max_new_tokens=6, do_sample=False)
    return found


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    for name in names:
        loaded = autoprune.from_pretrained(Path(folder) / name)
        save_file(answers(loaded, name.partition("-")[0]), Path(folder) / f"{name}.safetensors")
