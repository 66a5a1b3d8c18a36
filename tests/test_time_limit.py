"""An analysis that takes longer than it may ends with a sentence, and leaves everything as it was."""

import itertools
import time

import pytest
import torch
from torch import nn

import autoprune
from autoprune.structure import time_limit
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.time_limit import doing, limited, look
from tests.small_transformer import TOKENS, Attention, transformer
from zoo import draw


class Clock:
    """A clock that stands at 0 for a number of looks, and then at 1."""

    def __init__(self, looks: float = float("inf")):
        self.looked, self.looks = 0, looks

    def monotonic(self) -> float:
        self.looked += 1
        return 0.0 if self.looked <= self.looks else 1.0


@pytest.fixture
def model() -> nn.Module:
    return transformer("tied", blocks=1)


@pytest.mark.slow
def test_without_a_limit_nobody_looks_at_the_clock(model, monkeypatch):
    monkeypatch.setattr(time_limit, "time", None)
    assert analyse(Example(model, draw((TOKENS,)))).groups


@pytest.mark.slow
def test_wherever_it_ends_it_says_what_it_was_doing_and_leaves_no_trace(model, monkeypatch):
    inputs = draw((TOKENS,))
    clock = Clock()
    monkeypatch.setattr(time_limit, "time", clock)
    whole = analyse(Example(model, inputs), until=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random, fused = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    said = []
    for looks in [1, *(clock.looked * i // 6 for i in range(1, 6)), clock.looked - 1]:
        monkeypatch.setattr(time_limit, "time", Clock(looks))
        with pytest.raises(TimeoutError, match="time was over while") as raised:
            analyse(Example(model, inputs), until=0.5)
        said.append(str(raised.value))
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.backends.mha.get_fastpath_enabled() == fused
        assert type(model[1].attention) is Attention
    assert [key for key, _ in itertools.groupby(said)] == [
        "time was over while the forward pass was traced",
        "time was over while it was found out how far the code follows smaller widths",
        f"time was over while smaller models were compared with the dense one, of {len(whole.groups)} groups in all",
        "time was over while smaller models without some residual branches were compared with the dense one",
    ]
    monkeypatch.undo()
    again = analyse(Example(model, inputs))
    assert [group.name for group in again.groups] == [group.name for group in whole.groups]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_a_forward_that_catches_everything_does_not_catch_the_end():
    class Trying(nn.Linear):
        def forward(self, x):
            while True:
                try:
                    y = super().forward(x)
                except Exception:
                    continue
                if x.shape[0] == 0:
                    return y

    began = time.monotonic()
    with pytest.raises(TimeoutError, match="traced"):
        analyse(Example(Trying(4, 4), (torch.ones(2, 4),)), until=began + 0.3)
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_an_isolated_analysis_ends_as_well(model):
    with pytest.raises(TimeoutError, match="time was over while the forward pass was traced"):
        analyse(Example(model, draw((TOKENS,))), checks="isolated", until=time.monotonic())


def test_a_search_names_the_argument_and_the_way_out(model, monkeypatch):
    monkeypatch.setattr("autoprune.study.setup.LEAST_ANALYSIS_SECONDS", 0.0)
    with pytest.raises(TimeoutError, match=r"max_seconds=0\.001 was over before it was known .*; give more time"):
        autoprune.search(model, "flops <= 60%", example=draw((TOKENS,)), max_seconds=1e-3)


def test_limits_end_with_what_is_inside():
    with limited(time.monotonic() + 100):
        doing("something")
    with pytest.raises(TimeoutError, match="while nothing"), limited(time.monotonic() - 1):
        doing("nothing")
    look()
