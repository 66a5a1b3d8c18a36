"""The comparison with other methods: what it derives from scores, and that its own methods meet their budgets."""

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.peers import methods as peer_methods
from benchmarks.peers.report import NAMES, STAGES, interval, missed
from benchmarks.support.trained import Trained
from zoo import resnet

BEST, OTHER = "autoprune auto", "uniform L2"


@pytest.fixture(scope="module")
def case():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet(8, width=8).eval()
        parts = {name: (torch.randn(32, 3, 16, 16), torch.arange(32) % 10) for name in ("train", "validation", "test")}
    return peer_methods.Case(Trained(model, parts, "untrained"), seed=0)


def runs_with(accuracies):
    """One run for each method and seed from ``{method: [accuracy before, accuracy after] of each seed}``."""
    return [
        {
            "pair": "net",
            "seed": seed,
            "method": method,
            "budgets": {b: {s: {"accuracy": a} for s, a in zip(STAGES, pair, strict=True)} for b in NAMES},
        }
        for method, seeds in accuracies.items()
        for seed, pair in enumerate(seeds)
    ]


def test_the_interval_is_that_of_a_paired_t_test():
    ours, theirs = np.random.default_rng(0).normal(80, 3, (2, 5))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert interval(ours - theirs) == pytest.approx((expected.low, expected.high))


def test_ours_must_be_ahead_before_and_at_most_half_a_point_behind_after():
    fine = runs_with({BEST: [(0.81, 0.896), (0.80, 0.896)], OTHER: [(0.80, 0.9), (0.80, 0.9)]})
    assert missed(fine, [OTHER], BEST) == []
    level_before = runs_with({BEST: [(0.80, 0.9)], OTHER: [(0.80, 0.9)]})
    assert [line.split(" fine")[0].split()[-1] for line in missed(level_before, [OTHER], BEST)] == ["before"] * 3
    behind_after = runs_with({BEST: [(0.81, 0.894)], OTHER: [(0.80, 0.9)]})
    assert [line.split(" fine")[0].split()[-1] for line in missed(behind_after, [OTHER], BEST)] == ["after"] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [lambda case: peer_methods.uniform(case, "l1"), peer_methods.eagleeye, peer_methods.fastnas],
    ids=["uniform", "EagleEye", "FastNAS"],
)
def test_networks_meet_their_budgets_by_an_independent_counter(case, method, monkeypatch):
    monkeypatch.setattr(peer_methods, "TRIALS", 2)
    monkeypatch.setattr(peer_methods, "RATIOS", (1.0, 0.75, 0.5, 0.25))
    pruned = method(case)
    assert list(pruned.networks) == list(peer_methods.BUDGETS)
    for share, network in pruned.networks.items():
        assert case.macs(network) <= share * case.dense_macs


@pytest.mark.slow
def test_random_strategies_lie_in_the_band_below_the_budget(case, monkeypatch):
    monkeypatch.setattr(peer_methods, "TRIALS", 20)
    study = case.study(peer_methods.every_width("l1"))
    drawn = peer_methods.random_strategies(study, 0.3, np.random.default_rng(0))
    share = peer_methods.shares(study, drawn)
    assert len(drawn) == 20
    assert (share <= 0.3).all()
    assert (share > 0.3 - peer_methods.BAND).all()
