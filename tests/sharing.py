"""Evaluators that share computation or do not, on chains of blocks, and what they execute."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import autoprune
from autoprune.protocols import Measurement
from tests.contexts import study_of


def data_for(*shapes, samples=60, size=16):
    """Batches without labels, the last one incomplete."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(samples, *shape, generator=generator) for shape in shapes]
    starts = range(0, samples, size)
    return autoprune.Data(validation=[(*(x[i : i + size] for x in inputs), None) for i in starts])


def context_of(model, *shapes):
    return study_of(model, data_for(*shapes)).context


def relatives(space, n=6, seed=0):
    """Candidates that differ from the dense one, or from a random one, in a single dimension; shape (2 n, d)."""
    rng = np.random.default_rng(seed)
    rows = np.repeat([np.zeros_like(space.sizes), rng.integers(0, space.sizes)], n, axis=0)
    dims = rng.integers(len(space.sizes), size=2 * n)
    rows[np.arange(2 * n), dims] = rng.integers(1, space.sizes[dims])
    return rows


def prepared(kind, context, share_bytes):
    evaluator = kind(share_bytes=share_bytes)
    evaluator.prepare(context)
    return evaluator


def cache_of(evaluator):
    return evaluator._adapted._cache


def assert_identical(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert isinstance(a, Measurement), a
        assert isinstance(b, Measurement), b
        for field in ("signal", "metric", "distortion"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


def counted(call):
    """Multiply-accumulates that a call executes, and what it returns."""
    with FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops() // 2, result


class Block(nn.Module):
    """One residual block; subclasses do something in addition."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.norm(self.conv1(x))))


def chain(block, count=3):
    torch.manual_seed(0)
    blocks = [block() for _ in range(count)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(8 * 64, 10)).eval()
