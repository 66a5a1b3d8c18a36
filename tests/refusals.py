"""Searches with a mistake in their arguments, and the sentence that is expected of them."""

import re

import pytest
import torch

import autoprune
from autoprune import Channels
from tests.searching import grouped

GENERATOR = torch.Generator().manual_seed(0)
EIGHTHS = Channels(step=0.125, min_fraction=0.125)
X, Y = torch.randn(120, 64, generator=GENERATOR), torch.randint(0, 10, (120,), generator=GENERATOR)


def search(model, budget="flops <= 50%", data=(X, Y), trials=2, **options):
    return autoprune.search(model, budget, data, trials=trials, **grouped(**options))


def refused(error, *parts):
    """Expect an error whose message holds all parts, in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(part) for part in parts))
