"""Studies of searches that do not run, and contexts to test evaluators in: small networks with data, and traced."""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.data.sampling import seeded
from autoprune.data.subsets import Data
from autoprune.evaluators.protocol import Context
from autoprune.execution import execution_of
from autoprune.search import search
from autoprune.search_spaces import Settings
from autoprune.structure.call import call_of
from autoprune.study.convergence import Deadline
from autoprune.study.request import Request
from autoprune.study.setup import set_up
from autoprune.study.start import start_of
from autoprune.study.study import Study

SAMPLES = 120


def study_for(model: nn.Module, budget: Any, data: Any = None, **options: Any) -> Study:
    """Set up the search that `autoprune.search` would run with the same arguments, without running it.

    Args:
        model: As for `autoprune.search`.
        budget: As above.
        data: As above.
        options: Its other arguments; those left out have its defaults.

    Raises:
        TypeError: If `options` names an argument that it does not have.
    """
    given = inspect.signature(search).bind(model, budget, data, **options)
    given.apply_defaults()
    as_given = given.arguments
    groups = {
        "start": start_of(as_given["start"]),
        "example": call_of(as_given["example"]),
        "execution": execution_of(as_given["execution"]),
    }
    request = Request(**{**as_given, **groups})
    return set_up(request, Deadline(time.monotonic(), request.max_seconds))


def image_context(space: str | Settings = "channels", metric: Any = "accuracy") -> Context:
    """Return a convolutional network with batch norm, and labelled images of it.

    Args:
        space: As in `autoprune.search`.
        metric: As there.

    Returns:
        An equal context at every call, with a separate model. Labels are those that the dense network predicts for
        three in four images, so that scores differ between candidates.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 3, 8, 8, generator=generator)
    with seeded(0):
        model = _Images().eval()
    labels = torch.randint(0, 4, (SAMPLES,), generator=generator)
    with torch.no_grad():
        labels[: 3 * SAMPLES // 4] = model(images[: 3 * SAMPLES // 4]).argmax(1)
    return context_of(model, Data(validation=(images, labels), batch_size=16), space, metric)


def sequence_context(space: str | Settings = "channels", metric: Any = "agreement") -> Context:
    """Return a small transformer, and sequences without labels; the arguments are those of `image_context`."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randn(SAMPLES, 6, 8, generator=generator)
    with seeded(0):
        model = _Sequences().eval()
    return context_of(model, Data(validation=sequences, batch_size=16), space, metric)


def context_of(model: nn.Module, data: Any, space: str | Settings = "channels", metric: Any = "auto") -> Context:
    """Return the context of a search for any model and data; the arguments are those of `autoprune.search`."""
    return study_for(model, "nonzero_params <= 70%", data, metric=metric, space=space, evaluator="adaptive_bn").context


class _Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, padding=1)
        self.third = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.first(x)).relu()
        y = y + self.third(self.second(y).relu())
        scores: Tensor = self.head(y.mean((2, 3)))
        return scores


class _Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layer(x).mean(1))
        return scores
