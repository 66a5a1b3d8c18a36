"""The space that suits a model, by its structure."""

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.errors import NothingToPruneError
from autoprune.search_spaces import Blocks, Channels, Depth, Suited
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from tests.candidates import uniform_order
from tests.searching import quick
from tests.small_transformer import TOKENS, transformer
from zoo import ZOO


def of_transformer() -> Structure:
    return analyse(Example(transformer("plain", 2), (torch.randn(2, *TOKENS),)))


def of_zoo(name: str) -> Structure:
    return analyse(Example(ZOO[name].build(), ZOO[name].inputs()))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (of_transformer, (Blocks(alike=False), Depth())),
        (lambda: of_zoo("preactivation_resnet"), (Channels(), Depth())),
        (lambda: of_zoo("mlp"), (Channels(),)),
    ],
    ids=["transformer", "residual network", "perceptron"],
)
def test_widths_and_depth_where_there_are_any(found, expected):
    structure = found()
    order = uniform_order(structure)
    assert Suited().parts(structure, order) == expected
    space = Suited().bind(structure, order)
    assert len(space.dimensions) == sum(len(each.bind(structure, order).dimensions) for each in expected)


def test_a_model_without_either_is_refused():
    structure = analyse(Example(nn.Linear(3, 2), (torch.ones(2, 3),)))
    with pytest.raises(NothingToPruneError):
        Suited().bind(structure, {})


def test_the_result_of_a_search_says_what_was_chosen():
    model = transformer("plain", 2)
    x = torch.randn(24, *TOKENS, generator=torch.Generator().manual_seed(0))
    result = quick(model, "params <= 80%", x, space="auto", trials=4)
    assert any(note.startswith("search over channels: 4 groups") and "depth: 4 parts" in note for note in result.notes)
    built = result.build("params <= 80%")
    assert sum(p.numel() for p in built.parameters()) <= 0.8 * sum(p.numel() for p in model.parameters())
    assert np.isfinite(result.best().score)
