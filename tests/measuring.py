"""A small network, its latency on the simulated machine, and the memory that any network takes."""

import torch
from torch import nn

from autoprune.costs.latency.model import Latency
from autoprune.costs.latency.profile import profile_structure
from autoprune.costs.operations.allocations import allocation_of
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from tests.machine import Machine

INPUTS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 40, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(40, 5),
        ).eval()


def measured(clock=None, batch=3, path=None, networks=15, seed=0, model=None) -> Latency:
    model = model or small()
    example = Example(model, (INPUTS,))
    clock = clock or Machine(drift=1e-5, cold=1.3, per_pass=2e-5)
    return profile_structure(
        example.resized(batch), analyse(example), clock=clock, path=path, networks=networks, seed=seed
    )


def peak_bytes(module: nn.Module, inputs: torch.Tensor) -> int:
    """Weights, buffers, inputs, and the most that the profiler sees allocated."""
    state = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return state + inputs.nbytes + allocation_of(lambda: module(inputs), torch.device("cpu")).peak
