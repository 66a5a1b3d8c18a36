"""Rules that divide zeros among weights, against plain definitions."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from autoprune.importance.masks.allocation import (
    erdos_renyi_kernel,
    global_magnitude,
    heavy_tails,
    hill_exponent,
    kept_above,
    lamp,
    owl,
    rate_distortion,
    share_out,
    standardised,
    uniform,
)

RULES = [uniform, erdos_renyi_kernel, lamp, global_magnitude, standardised, owl, heavy_tails]


@pytest.fixture
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"stem": (4, 1, 3, 3), "body": (8, 4, 3, 3), "head": (5, 8), "tail": (20, 12)}
    return {name: torch.randn(shape, generator=generator) / len(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("nonzero", [0, 17, 100, 333, 500, 604])
def test_every_rule_keeps_exactly_the_number_asked_for(rule, nonzero: int, weights: dict[str, Tensor]):
    kept = rule(weights, nonzero)
    assert list(kept) == list(weights)
    assert sum(kept.values()) == nonzero
    assert all(0 <= kept[name] <= weight.numel() for name, weight in weights.items())


def test_densities_of_erdos_renyi_fall_with_the_size_of_a_weight(weights: dict[str, Tensor]):
    del weights["tail"]
    kept = erdos_renyi_kernel(weights, 24)
    assert kept == {"stem": 6, "body": 10, "head": 8}  # 24 * (11, 18, 13) / 42, remainders to the largest


@pytest.mark.parametrize("rule", [lamp, global_magnitude])
def test_thresholds_keep_the_highest_scores_of_all(rule, weights: dict[str, Tensor]):
    scores = []
    for name, weight in weights.items():
        values = [abs(value) for value in weight.double().flatten().tolist()]
        for value in values:
            at_least = sum(other**2 for other in values if other >= value)
            scores.append((value**2 / at_least if rule is lamp else value, name))
    first = [name for _, name in sorted(scores, reverse=True)[:60]]
    assert rule(weights, 60) == {name: first.count(name) for name in weights}


def test_more_than_there_is_cannot_be_kept(weights: dict[str, Tensor]):
    with pytest.raises(ValueError, match="nonzero must be at most 604, the elements of all weights, got 605"):
        uniform(weights, 605)


def test_no_weight_falls_below_the_floor():
    weights = {"large": torch.full((10, 10), 2.0) + torch.rand(10, 10), "small": torch.rand(10, 10)}
    assert global_magnitude(weights, 100) == {"large": 100, "small": 0}
    assert global_magnitude(weights, 100, floor=0.3) == {"large": 85, "small": 15}


def test_a_floor_that_holds_several_weights_still_meets_the_number():
    weights = {name: torch.rand(10, 10) + shift for name, shift in (("a", 9.0), ("b", 0.5), ("c", 0.0))}
    kept = kept_above(weights, 60, {"a": 20, "b": 20, "c": 20})
    assert kept == {"a": 20, "b": 20, "c": 20}


def test_owl_gives_layers_with_outliers_more_within_its_spread():
    """By the formulas of the published code, for layers of one size."""
    generator = torch.Generator().manual_seed(1)
    scores = {f"layer {i}": torch.rand(20, 50, generator=generator) for i in range(4)}
    for i, own in enumerate(scores.values()):
        own.view(-1)[: 12 * i] *= 40
    kept = owl(scores, 1200, spread=0.08, above=5)
    ratios = np.array([100 * float((own > 5 * own.mean()).double().mean()) for own in scores.values()])
    scaled = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * 0.08 * 2)
    densities = scaled - scaled.mean() + 0.3
    assert list(kept.values()) == pytest.approx((1000 * densities).tolist(), abs=1)


def test_weights_of_one_part_share_a_density():
    scores = {f"{block}.{name}": torch.rand(20, 30 + 10 * i) for block in "ab" for i, name in enumerate("qk")}
    scores["b.q"].view(-1)[:50] = 100
    kept = owl(scores, 700, parts={name: name[0] for name in scores})
    density = {name: kept[name] / own.numel() for name, own in scores.items()}
    assert density["a.q"] == pytest.approx(density["a.k"], abs=2e-3)
    assert density["b.q"] == pytest.approx(density["b.k"], abs=2e-3)
    assert density["b.q"] > density["a.q"]


def test_the_exponent_of_a_power_law_is_found():
    rng = np.random.default_rng(0)
    values = (1 - rng.random(4000)) ** (-1 / 1.5)  # density with exponent 2.5
    weight = torch.diag(torch.from_numpy(np.sqrt(values)))[:1500, :1500]
    assert hill_exponent(weight) == pytest.approx(2.5, abs=0.15)


def test_weights_with_heavy_tails_keep_more():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(40, 40, generator=generator)
    scale = torch.arange(1, 41).float() ** -1.5
    kept = heavy_tails({"plain": plain, "heavy": plain * scale}, 1600, spread=0.3)
    assert kept == {"plain": 560, "heavy": 1040}  # sparsities (1 + 0.3) / 2 and (1 - 0.3) / 2


def test_standardised_scores_do_not_know_scales(weights: dict[str, Tensor]):
    scaled = {name: weight.abs() * 10**i for i, (name, weight) in enumerate(weights.items())}
    assert standardised(scaled, 300) == standardised({name: weight.abs() for name, weight in weights.items()}, 300)


def test_rate_distortion_is_the_best_choice_wherever_the_hull_has_a_corner():
    rng = np.random.default_rng(2)
    losses = [np.cumsum(np.sort(np.append(0.0, rng.random(4)))) for _ in range(4)]  # convex
    zeros = [np.arange(5) * 10 for _ in range(4)]
    for wanted in range(0, 161, 10):
        found = rate_distortion(losses, zeros, wanted)
        cost = sum(own[i] for own, i in zip(losses, found, strict=True))
        gone = sum(own[i] for own, i in zip(zeros, found, strict=True))
        best = min(
            sum(own[i] for own, i in zip(losses, choice, strict=True))
            for choice in itertools.product(range(5), repeat=4)
            if sum(own[i] for own, i in zip(zeros, choice, strict=True)) >= gone
        )
        assert gone >= wanted
        assert cost == pytest.approx(best)


def test_rate_distortion_ends_where_nothing_is_left():
    assert rate_distortion([np.array([0.0, 1.0])], [np.array([0, 5])], 9).tolist() == [1]


def test_shares_are_proportional_until_a_weight_is_full():
    weights = {"a": torch.ones(100), "b": torch.ones(100), "c": torch.ones(5)}
    assert share_out({"a": 1, "b": 3, "c": 2}, weights, 15) == {"a": 3, "b": 7, "c": 5}
    assert share_out({"a": 1, "b": 3, "c": 2}, weights, 45) == {"a": 10, "b": 30, "c": 5}
