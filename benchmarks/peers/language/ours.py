"""A search of autoprune with what the peers are given."""

from __future__ import annotations

import torch
from torch import nn

import autoprune
from autoprune.search_spaces import Channels, Depth, Product, Settings
from benchmarks.peers.language.case import Case

STREAM = ("model.embed_tokens*",)  # stays as wide as it is: the embedding is not counted, so must not pay
FITTED, COMPARED, LEFT = 48, 12, 4  # of the 64 sequences: weights, candidates, and a look at the finished front
BATCH = 4
DATABASE = "layer database"
SPACES: dict[str, Settings] = {
    DATABASE: Channels(ignore=STREAM, criterion="obs"),  # as below, ranked and planned by it
    "channels": Channels(ignore=STREAM),  # neurons, and key-value groups with their heads
    "depth": Depth(),  # attention and feed-forward parts, each kept or dropped
    "product": Product(Channels(ignore=STREAM), Depth()),
}


def search(case: Case, share: float, space: str) -> nn.Module:
    """The best network that a search finds on the calibration sequences alone, its weights re-fitted on them.

    Args:
        case: Model and calibration sequences; `case.evaluations` is the number of trials.
        share: Of the parameters that may stay; the budget counts those of the embedding, too.
        space: A name in `SPACES`.
    """
    embedding = case.model.get_submodule("model.embed_tokens").get_parameter("weight").numel()
    data = autoprune.Data(
        [{"input_ids": part} for part in case.ids.split(BATCH)],
        calibration_samples=FITTED,
        validation_samples=COMPARED,
        test_samples=LEFT,
    )
    limit = f"params <= {embedding + case.most(share)}"
    result = autoprune.search(
        case.model,
        limit,
        data,
        metric="next_token",
        space=SPACES[space],
        start=autoprune.Start(prior="database" if space == DATABASE else "auto"),
        trials=case.evaluations,
        seed=case.seed,
    )
    case.kept["evaluations"] = float(len(result.trials))
    case.kept["notes"] = list(result.notes)
    with torch.no_grad():
        return result.build()
