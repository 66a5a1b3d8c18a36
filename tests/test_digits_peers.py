"""The benchmarks of zeros in small convolutional networks: methods keep to budgets, and training to zeros."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks.peers import sparsity_digits, sparsity_units
from benchmarks.peers.sparsity_digits import METHODS, Case, hold_zeros
from benchmarks.support.trained import Trained, train
from zoo import resnet

SHARE = 0.8


@pytest.fixture(scope="module")
def network() -> Trained:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet(8, width=4).eval()
        part: tuple[Tensor, Tensor] = (torch.randn(64, 3, 8, 8), torch.arange(64) % 10)
    return Trained(model, dict.fromkeys(("train", "validation", "test"), part), "untrained")


@pytest.fixture(scope="module")
def case(network: Trained, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(network, seed=0, trials=4, folder=tmp_path_factory.mktemp("zeros"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_to_the_number_of_elements(case: Case, method: str):
    found = sparsity_digits.judged(case, SHARE, method)
    allowed = case.nonzero(SHARE)
    assert 0.9 * allowed < found["nonzero"] <= allowed
    assert (found["nonzero"] == allowed) == ("search" not in method)
    assert all(math.isfinite(value) for value in found.values())


def test_zeros_stay_in_training(network: Trained):
    torch.manual_seed(0)
    model = resnet(8, width=4)
    weight = model.get_parameter("fc.weight")
    before = weight.detach().clone()
    with torch.no_grad():
        weight[:, ::2] = 0.0
    hold_zeros(model)
    train(model, network.data["train"], 3, 0.01)
    assert not weight[:, ::2].any()
    assert (weight[:, 1::2] != before[:, 1::2]).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", sparsity_units.KINDS)
def test_every_kind_of_pruning_meets_its_budget(network: Trained, kind: str):
    found = sparsity_units.judged(network, kind, "stored_bytes", 0.5, seed=0, trials=4)
    assert 0 < found["stored_bytes"] <= 0.5
    assert (found["flops"] < 1) == ("units" in kind)
    assert (found["stored_bytes"] > found["nonzero_params"] + 0.02) == ("zeros" in kind)


def test_reports_are_written_of_what_is_there():
    scores = {f"{score} {when}": 0.5 for score in ("accuracy", "loss") for when in ("before", "after")}
    cells = {sparsity_digits.key_of("resnet20", 0, 0.8, method): scores for method in METHODS}
    text = sparsity_digits.report({"cells": cells, "dense": {"resnet20 0": (0.9, 0.3)}, "trials": 4})
    assert "## resnet20, 80% zeros, 1 seeds" in text
    assert "mobilenet_v2" not in text
    cell = {**scores, **dict.fromkeys(sparsity_units.COSTS, 0.2)}
    found = {"cells": {"nonzero_params | 0.2 | zeros alone | 0": cell}, "dense": {"0": (0.9, 0.3)}, "trials": 4}
    assert "| nonzero_params <= 20% | 0 | zeros alone | 20.0% |" in sparsity_units.report(found)
