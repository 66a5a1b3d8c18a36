"""Contexts that evaluators are prepared with: searches set up on small networks."""

import numpy as np
import torch
from torch import nn

import autoprune
from autoprune.testing.contexts import study_for
from zoo import ZOO


def study_of(model, data, evaluator="adaptive_bn", budget="flops <= 100%", space="channels", metric="auto"):
    return study_for(model, budget, data, evaluator=evaluator, space=space, metric=metric)


def prepared(evaluator, context):
    """The evaluator itself, after it has taken in `context`."""
    evaluator.prepare(context)
    return evaluator


def halved(context):
    """Every dimension at half of its options, shape (d,)."""
    return np.array(context.space.sizes) // 2


def classes_context(name, evaluator):
    shape, generator = ZOO[name].inputs()[0].shape[1:], torch.Generator().manual_seed(0)
    data = torch.randn(120, *shape, generator=generator), torch.randint(0, 4, (120,), generator=generator)
    return study_of(ZOO[name].build(), autoprune.Data(validation=data, batch_size=16), evaluator).context


class Regression(nn.Module):
    """Takes its input by name."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, *, x):
        return {"out": self.last(self.second(self.first(x).relu()).tanh())}


def squared_error(forward, batches):
    return sum(float((forward(batch)["out"] - batch["labels"]).square().sum()) for batch in batches)


def settled_regression():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Regression().eval()


def regression_context(evaluator):
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"x": torch.randn(n, 6, generator=generator), "labels": torch.randn(n, 2, generator=generator)}
        for n in (16, 16, 16, 5)
    ]
    metric = autoprune.Metric(squared_error, higher_is_better=False, per_sample=False)
    data = autoprune.Data(calibration=rows, validation=rows, test=rows)
    return study_of(settled_regression(), data, evaluator, metric=metric).context
