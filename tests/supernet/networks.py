"""Small supernets, and training data that stop a training in the middle."""

import numpy as np
import torch
from torch import nn

import autoprune
from autoprune.evaluators import Supernet
from tests.contexts import study_of


class Plain(nn.Sequential):
    """Linear layers; a hidden unit whose weights and bias are zero is as good as removed."""

    def __init__(self):
        super().__init__(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


class Dropping(nn.Sequential):
    """Draws in training, and normalises."""

    def __init__(self):
        super().__init__(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 4))


def made(kind, *args):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(*args).eval()


def rows(n=90, seed=0):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :4].argmax(1)


def context_of(kind=Dropping, data=None, **settings):
    data = autoprune.Data(validation=rows(), batch_size=16) if data is None else data
    return study_of(made(kind), data, evaluator="adaptive_bn", **settings).context


def prepared(context, **settings):
    evaluator = Supernet(**settings)
    evaluator.prepare(context)
    return evaluator


def weights(evaluator):
    """The weights of the largest candidate."""
    return evaluator.build(np.zeros(len(evaluator._context.space.sizes), dtype=np.int64)).state_dict()


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


class Augmented(torch.utils.data.Dataset):
    """Adds noise from the global generator of PyTorch, and raises or dies when it has given `most` samples."""

    def __init__(self, most=10**9, end=None):
        self.most, self.end = most, end

    def __len__(self):
        return 45

    def __getitem__(self, i):
        self.most -= 1
        if self.most < 0:
            self.end()
        x, y = rows()
        return x[i] + 0.1 * torch.randn(6), y[i]


def interrupt():
    raise KeyboardInterrupt
