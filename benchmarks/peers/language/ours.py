"""A search of autoprune with what the peers are given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import autoprune
from autoprune.data.written import write_text
from autoprune.search_spaces import Channels, Depth, Product, Settings
from benchmarks.peers.language.case import Case

STREAM = ("model.embed_tokens*",)  # stays as wide as it is: the embedding is not counted, so must not pay
FITTED, COMPARED, LEFT = 48, 12, 4  # of the 64 sequences: weights, candidates, and a look at the finished front
EACH = (52, 8, 4)  # likewise where the model writes 64 others, of each kind
SEPARATOR = 0  # token between the texts that the model was trained on
BATCH = 4
DATABASE = "layer database"
SPACES: dict[str, Settings] = {
    DATABASE: Channels(ignore=STREAM, criterion="obs"),  # as below, ranked and planned by it
    "channels": Channels(ignore=STREAM),  # neurons, and key-value groups with their heads
    "depth": Depth(),  # attention and feed-forward parts, each kept or dropped
    "product": Product(Channels(ignore=STREAM), Depth()),
}


def search(case: Case, share: float, space: str, written: bool = False) -> nn.Module:
    """The best network that a search finds on the calibration sequences alone, its weights re-fitted on them.

    Args:
        case: Model and calibration sequences; `case.evaluations` is the number of trials.
        share: Of the parameters that may stay; the budget counts those of the embedding, too.
        space: A name in `SPACES`.
        written: Add as many sequences that the dense model writes itself, which takes a part of the seconds told.
    """
    embedding = case.model.get_submodule("model.embed_tokens").get_parameter("weight").numel()
    limit = f"params <= {embedding + case.most(share)}"
    result = autoprune.search(
        case.model,
        limit,
        with_own_text(case) if written else given_text(case),
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


def given_text(case: Case) -> autoprune.Data:
    """The calibration sequences, divided by the search."""
    return autoprune.Data(
        [{"input_ids": part} for part in case.ids.split(BATCH)],
        calibration_samples=FITTED,
        validation_samples=COMPARED,
        test_samples=LEFT,
    )


def with_own_text(case: Case) -> autoprune.Data:
    """Data whose parts are half of the calibration text, and half of text that the dense model writes."""
    if "written" not in case.kept:
        case.kept["written"] = write_text(case.fast, SEPARATOR, *case.ids.shape, seed=case.seed)
    own = case.kept["written"]
    assert isinstance(own, Tensor)
    parts = []
    for news, text in zip(case.ids.split(EACH), own.split(EACH), strict=True):
        pairs = zip(news.split(BATCH), text.split(BATCH), strict=True)
        parts.append([{"input_ids": ids} for pair in pairs for ids in pair])
    samples = {f"{part}_samples": 2 * n for part, n in zip(("calibration", "validation", "test"), EACH, strict=True)}
    return autoprune.Data(*parts, **samples)
