"""Labels that a dense network gets right mostly."""

import torch

import autoprune
from zoo import ZOO

SAMPLES, BATCH = 400, 40


def make_data():
    """Labels that the dense network gets right mostly, so that candidates differ."""
    inputs = torch.randn(2 * SAMPLES + 64, 64, generator=torch.Generator().manual_seed(0))
    labels = ZOO["mlp"].build()(inputs).argmax(1)
    parts = [(inputs[rows], labels[rows]) for rows in (slice(0, 64), slice(64, 464), slice(464, None))]
    return autoprune.Data(*parts, batch_size=BATCH)
