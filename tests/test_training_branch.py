"""Operations that only training runs follow the widths, so that built models train; or a note says otherwise."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoprune
from autoprune.costs import StructuralCosts
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from tests.candidates import random_pruning, state_of
from tests.small_networks import Net, conv, reasons, slots_of


def auxiliary(s: Net, x: Tensor) -> Any:
    h = F.dropout(s.norm(s.a(x)).relu(), 0.5, s.training)
    y = s.head(s.b(h).relu().mean((2, 3)))
    return (y, s.aux(s.squeeze(h).flatten(1))) if s.training else y


def with_head() -> nn.Module:
    parts = {"a": conv(3, 8), "norm": nn.BatchNorm2d(8), "b": conv(8, 8, groups=4), "head": nn.Linear(8, 4)}
    return Net(auxiliary, **parts, squeeze=conv(8, 5, 6), aux=nn.Linear(5, 4))


def assert_trains(model: nn.Module, structure: Structure, x: Tensor) -> None:
    for seed in range(5):
        built = structure.build(model, random_pruning(structure, np.random.default_rng(seed))).train()
        outputs = built(x)
        leaves = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(out.sum() for out in leaves).backward()


@pytest.mark.slow
def test_an_auxiliary_head_follows_and_its_classes_stay():
    model, x = with_head(), torch.randn(2, 3, 8, 8)
    before = state_of(model)
    structure = analyse(Example(model, (x,)))
    assert state_of(model) == before
    assert (structure.untrained, structure.untouched) == ("", ())
    assert slots_of(structure)["squeeze"] == (5, "aux.weight:1 squeeze.bias:0 squeeze.weight:0")
    assert "squeeze.weight:1" in slots_of(structure)["a"][1]
    assert "returned by the model in training" in reasons(structure, "aux.weight")
    assert_trains(model, structure, x)


@pytest.mark.slow
def test_costs_are_those_of_the_evaluation_pass():
    model, x = with_head(), torch.randn(2, 3, 8, 8)
    structure = analyse(Example(model, (x,)))
    flops = StructuralCosts(structure).flops(structure.sizes[None].astype(float))[0]
    assert flops == 36 * 27 * 8 + 16 * 9 * 2 * 8 + 32


def test_ordinary_layers_add_nothing_to_what_evaluation_runs():
    def forward(s: Net, x: Tensor) -> Tensor:
        y = F.dropout(s.norm(s.a(x)).relu(), 0.3, s.training).flatten(2).transpose(1, 2)
        return s.head(s.attention(y)[:, 0])

    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    model = Net(forward, a=conv(3, 8), norm=nn.BatchNorm2d(8), attention=layer, head=nn.Linear(8, 2))
    from autoprune.structure.tracing.trace import trace

    record = trace(Example(model.train(), (torch.randn(2, 3, 6, 6),)), training=True)
    assert record.training == []
    assert record.untrained == ""


@pytest.mark.parametrize("kept", [False, True])
def test_what_training_leaves_in_an_attribute_is_an_end_and_what_it_drops_is_none(kept: bool):
    def forward(s: Net, x: Tensor) -> Tensor:
        h = s.a(x)
        if s.training:
            shares = h.softmax(1)
            if kept:
                s.shares = shares
        return s.head(h.mean((2, 3)))

    from autoprune.structure.tracing.trace import trace

    model = Net(forward, a=conv(3, 8), head=nn.Linear(8, 4))
    record = trace(Example(model, (torch.randn(2, 3, 6, 6),)), training=True)
    (softmax,) = record.training
    assert record.training_ends == (softmax.results() if kept else [])


def test_a_parameter_that_masks_only_in_training_follows():
    def forward(s: Net, x: Tensor) -> Tensor:
        h = s.a(x)
        if s.training:
            mask = torch.arange(h.shape[1], device=h.device) % 3 == 0
            h = torch.where(mask[:, None], s.mask, h)
        return s.head(h.relu().mean(1))

    model = Net(forward, a=nn.Linear(6, 12), mask=nn.Parameter(torch.randn(12)), head=nn.Linear(12, 2))
    x = torch.randn(2, 9, 6)
    structure = analyse(Example(model, (x,)))
    assert structure.untouched == ()
    assert "mask:0" in slots_of(structure)["a"][1]
    assert_trains(model, structure, x)


def wants_targets(s: Net, x: Tensor) -> Tensor:
    if s.training:
        raise ValueError("targets must be given in training")
    return s.head(s.a(x).relu())


def sized(s: Net, x: Tensor) -> Any:
    h = s.a(x).relu()
    return (s.head(h), h.view(len(x), 4, 2).sum(2)) if s.training else s.head(h)


def features(s: Net, x: Tensor) -> Any:
    h = s.a(x).relu()
    return (s.head(h), h) if s.training else s.head(h)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "word"), [(wants_targets, "targets must be given"), (features, "keep most")], ids=["targets", "features"]
)
def test_what_cannot_be_followed_is_said(run: Any, word: str):
    model, x = Net(run, a=nn.Linear(6, 8), head=nn.Linear(8, 2)), torch.randn(4, 6)
    found = autoprune.inspect(model, x)
    assert [group.name for group in found.groups] == ["a"]
    assert word in found.structure.untrained
    assert "training" in str(found)
    result = autoprune.search(model, "flops <= 60%", example=x, trials=2, optimizer="random", evaluator="adaptive_bn")
    assert any(word in note for note in result.notes)


def test_a_size_in_python_that_only_training_needs_is_found_out():
    model = Net(sized, a=nn.Linear(6, 8), head=nn.Linear(8, 2))
    structure = analyse(Example(model, (torch.randn(4, 6),)))
    assert structure.untrained or "a" not in slots_of(structure)
