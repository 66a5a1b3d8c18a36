"""Outline of a search: what the report draws from, without the model."""

from dataclasses import replace

import torch
from torch import nn

import autoprune
from autoprune.structure.structure import Attribute
from autoprune.study import outline


def test_heads_of_a_group_that_a_check_froze_are_a_constant():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    structure = autoprune.inspect(model, torch.zeros(2, 4)).structure
    (group,) = structure.groups
    heads = Attribute(1, ((group.name, 2, group.size), ("frozen", 3, 4)), "attention", "num_heads")
    (found,) = outline._heads(replace(structure, attributes=(heads,)))
    assert (found.name, found.size) == ("attention.num_heads", (1 + 3 * 4, ((0, 2),)))
