"""A residual network whose branches matter unequally, and its calibration."""

import torch
from torch import nn

from autoprune.data.batch import default_forward
from autoprune.importance.calibration import Calibration
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example


class Residual(nn.Module):
    """Branches whose last weights are scaled by their number; the head is linear."""

    def __init__(self, branches, norm=nn.LayerNorm):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(
            nn.Sequential(norm(12), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 12)) for _ in range(branches)
        )
        self.head = nn.Linear(12, 5)
        with torch.no_grad():
            for i, part in enumerate(self.parts):
                part[-1].weight.mul_(1 + i)

    def forward(self, x):
        for part in self.parts:
            x = x + part(x)
        return self.head(x)


def calibration_of(model):
    x = torch.randn(24, 12, generator=torch.Generator().manual_seed(1))
    structure = analyse(Example(model, (x[:2],)))
    return Calibration(model, structure, [(x, torch.zeros(24, dtype=torch.long))], default_forward)
