"""Groups that no output depends on are reduced to their least at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autoprune
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example


class TwoHeads(nn.Module):
    """A trunk with a head that is asked for, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.wanted = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))
        self.other = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        return {"logits": self.wanted(x), "embedding": self.other(x)}


class Written(nn.Module):
    """Three layers: one is written into a buffer that is returned, one is detached, and one reaches no output."""

    def __init__(self) -> None:
        super().__init__()
        self.placed, self.detached, self.lost = (
            nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4)) for width in (10, 12, 14)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 8)
        out[:, :4] = self.placed(x)
        out.narrow(1, 4, 4).add_(self.detached(x).detach())
        self.lost(x).mul_(2)
        return out


@pytest.mark.slow
def test_groups_of_an_output_that_is_not_asked_for_are_unread():
    torch.manual_seed(0)
    model = TwoHeads().eval()
    x = torch.randn(4, 8)
    assert analyse(Example(model, (x,))).unread == frozenset()
    only = analyse(Example(model, (x,), forward=lambda m, batch: m(batch)["logits"]))
    assert only.unread == {"other.0", "other.2"}


@pytest.mark.slow
def test_what_is_written_into_an_output_or_detached_is_read():
    torch.manual_seed(0)
    assert analyse(Example(Written().eval(), (torch.randn(4, 8),))).unread == {"lost.0", "lost.2"}


@pytest.mark.slow
def test_a_search_takes_them_away_first_and_loses_nothing_by_it():
    torch.manual_seed(0)
    model = TwoHeads().eval()
    x = torch.randn(96, 8)
    result = autoprune.search(model, "flops <= 75%", x, example=autoprune.Call(outputs="logits"), trials=6, seed=0)
    pruned = [trial for trial in result.trials if any(trial.candidate)]
    assert {name: pruned[0].decoded[name] for name in ("trunk.0", "wanted.0", "other.0", "other.2")} == {
        "trunk.0": 16,
        "wanted.0": 24,
        "other.0": 2,
        "other.2": 1,
    }
    assert "no output depends on other.0, other.2, which go first" in result.notes
    dense = 8 * 16 + 16 * 24 + 24 * 3 + 16 * 32 + 32 * 5
    assert result.dense.costs["flops"] == dense
    assert pruned[0].score > 0.999  # because that alone takes half of the FLOPs away
