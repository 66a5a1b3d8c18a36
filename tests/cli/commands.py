"""Commands of the shell run in this process, on a model and data in a file of their own."""

from click.testing import Result
from typer.testing import CliRunner

from autoprune.cli.app import app

CODE = """
import autoprune
import torch
from torch import nn

def build(width=16):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3),
    )
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model

def load():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(120, 1, 4, 4, generator=generator)
    return x, x.mean((1, 2, 3)).mul(4).round().clamp(-1, 1).long() + 1

def noise():
    return torch.ones(2, 1, 4, 4)

def wide(width):
    return build(width)

def broken():
    raise ValueError("a bug of the user")

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 4, C // 4).permute(2, 0, 3, 1, 4)
        return self.out(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))

def tied():
    return nn.Sequential(nn.Linear(6, 16), Tied(), nn.Linear(16, 3))

model = build(4)
coarse = autoprune.Channels(options=(1.0, 0.5))
"""
MODEL, DATA = "cli_example.py:build", "cli_example.py:load"
SEARCH = ("search", MODEL, "--data", DATA, "--budget", "flops <= 60%", "--trials", "12", "--optimizer", "random")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: object) -> str:
    found = run(*arguments)
    assert found.exit_code == 0, found.output
    return found.stdout


def error(*arguments: object) -> str:
    found = run(*arguments)
    assert (found.exit_code, found.stdout) == (2, ""), found.output
    *before, last = found.stderr.splitlines()
    assert not any(line.startswith(("error", "Traceback")) for line in before)
    assert last.startswith("error: ")
    return last.removeprefix("error: ")
