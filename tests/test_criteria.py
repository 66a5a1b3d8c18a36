"""Every criterion against its definition, computed by hand on one small network."""

import logging
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.data.batch import default_forward
from autoprune.importance import calibration as calibration_module
from autoprune.importance.calibration import Calibration, affordable
from autoprune.importance.criteria import (
    CRITERIA,
    Criterion,
    GroupTensors,
    rank_units,
    score_units,
    score_units_by,
)
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from tests.candidates import state_of, uniform_order
from zoo import draw, settled

Scores = dict[str, Tensor]


class Net(nn.Module):
    """Two groups: the 6 channels of `first`, and the 5 of `second`, each of which is 4 columns of `head`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 5, 3), nn.Linear(20, 4)

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of `second` and `head`."""
        read = F.relu(self.norm(self.first(x)))
        return read, self.second(read).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x)[1])


@cache
def network() -> tuple[Net, Structure]:
    model = settled(Net, ((3, 6, 6),))
    assert isinstance(model, Net)
    return model, analyse(Example(model, draw(((3, 6, 6),))))


def batches(labels: bool = True) -> list[tuple[Tensor, ...]]:
    """Two batches of unequal length."""
    parts = [(draw(((3, 6, 6),), size, seed=size)[0], torch.arange(size) % 4) for size in (5, 3)]
    return parts if labels else [(images,) for images, _ in parts]


def scores(criterion: Criterion, labels: bool = True) -> Scores:
    """Scores of a criterion for each group, taken inside the ranking."""
    seen: Scores = {}

    def spy(group: GroupTensors) -> Tensor:
        seen[group.name] = criterion(group)
        return seen[group.name]

    model, structure = network()
    rank_units(Calibration(model, structure, batches(labels), default_forward), spy)
    return seen


def rank(
    criterion: str | Criterion, model: nn.Module | None = None, labels: bool = True, seed: int = 0
) -> dict[str, tuple[int, ...]]:
    own, structure = network()
    return rank_units(Calibration(model or own, structure, batches(labels), default_forward), criterion, seed)


def coupled(of: Callable[[Net], dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Coupled slices of each group, shape (units, elements); `of` gives a tensor for each parameter name."""
    p = of(network()[0])
    first = [p["first.weight"].flatten(1), p["second.weight"].transpose(0, 1).flatten(1)]
    first += [p[name][:, None] for name in ("first.bias", "norm.weight", "norm.bias")]
    columns = p["head.weight"].unflatten(1, (5, 4)).transpose(0, 1).flatten(1)
    return {"first": first, "second": [p["second.weight"].flatten(1), p["second.bias"][:, None], columns]}


def weights(model: Net) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def gradients(model: Net) -> dict[str, Tensor]:
    copy = deepcopy(model)
    sum(F.cross_entropy(copy(x), y) / 2 for x, y in batches()).backward()
    return {name: parameter.grad for name, parameter in copy.named_parameters()}


@torch.no_grad()
def activations(units: int) -> tuple[Tensor, Tensor]:
    """Inputs, in rows, of the reader of the group with `units` units, and its squared norm on each row."""
    model, _ = network()
    channels, columns = model.hidden(torch.cat([x for x, *_ in batches()]))
    if units == 6:
        return channels.transpose(0, 1).flatten(1).double(), model.second.weight.double().square().sum((0, 2, 3))
    return columns.T.double(), model.head.weight.double().square().sum(0)


def assert_scores(found: Scores, expected: Scores) -> None:
    assert list(found) == ["first", "second"]
    for name, values in expected.items():
        torch.testing.assert_close(found[name].double(), values.double(), rtol=1e-5, atol=1e-9)


class TestEachCriterionEqualsItsDefinition:
    def test_l1_sums_absolute_coupled_weights(self):
        expected = {name: torch.cat(parts, 1).abs().sum(1) for name, parts in coupled(weights).items()}
        assert_scores(scores(CRITERIA["l1"]), expected)

    def test_l2_is_the_norm_of_all_coupled_weights(self):
        expected = {name: torch.cat(parts, 1).norm(dim=1) for name, parts in coupled(weights).items()}
        assert_scores(scores(CRITERIA["l2"]), expected)

    def test_taylor_sums_squared_products_of_weight_and_gradient_of_the_mean_loss(self):
        values, slopes = coupled(weights), coupled(gradients)
        expected = {n: (torch.cat(values[n], 1) * torch.cat(slopes[n], 1)).square().sum(1) for n in values}
        assert_scores(scores(CRITERIA["taylor"]), expected)

    def test_bn_scale_is_the_absolute_scale(self):
        model, _ = network()
        seen: Scores = {}

        def spy(group: GroupTensors) -> Tensor:
            if group.scales:
                seen[group.name] = CRITERIA["bn_scale"](group)
            return CRITERIA["l2"](group)

        rank(spy)
        assert list(seen) == ["first"]
        torch.testing.assert_close(seen["first"], model.norm.weight.detach().abs())

    def test_activation_mean_is_over_samples_and_positions(self):
        first, _ = activations(6)
        second, _ = activations(5)
        expected = {"first": first.abs().mean(1), "second": second.abs().mean(1).view(5, 4).sum(1)}
        assert_scores(scores(CRITERIA["activation_mean"]), expected)

    def test_fluctuation_is_variance_times_the_squared_norm_of_what_reads_it(self):
        (first, columns), (second, rows) = activations(6), activations(5)
        expected = {
            "first": first.var(1, correction=0) * columns,
            "second": (second.var(1, correction=0) * rows).view(5, 4).sum(1),
        }
        assert_scores(scores(CRITERIA["fluctuation"]), expected)

    @pytest.mark.parametrize("name", [name for name in CRITERIA if name not in ("random", "bn_scale", "obs")])
    def test_units_are_ranked_by_falling_score(self, name: str):
        expected = {group: tuple(v.argsort(descending=True).tolist()) for group, v in scores(CRITERIA[name]).items()}
        assert rank(name) == expected
        assert rank(name) != uniform_order(network()[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l1", "l2"])
def test_a_unit_without_weights_is_the_last(name: str):
    model = deepcopy(network()[0])
    with torch.no_grad():
        for tensor in (model.first.weight, model.first.bias, model.norm.weight, model.norm.bias):
            tensor[2] = 0
        model.second.weight[:, 2] = 0
        model.second.weight[3], model.second.bias[3], model.head.weight[:, 12:16] = 0, 0, 0
    order = rank(name, model)
    assert (order["first"][-1], order["second"][-1]) == (2, 3)


def test_a_group_without_norm_is_ranked_by_l2_and_the_log_says_so(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        order = rank("bn_scale")
    assert order["second"] == rank("l2")["second"]
    assert order["first"] == tuple(network()[0].norm.weight.abs().argsort(descending=True).tolist())
    assert [record.getMessage() for record in caplog.records] == [
        "criterion 'bn_scale' finds no scales of second (1 of 2 groups); their units are ranked by l2"
    ]


def test_ties_go_to_the_earlier_unit():
    order = rank(lambda group: torch.tensor([1.0, 2.0] * 3)[: group.units])
    assert order == {"first": (1, 3, 5, 0, 2, 4), "second": (1, 3, 0, 2, 4)}


def test_a_random_order_follows_the_seed_alone():
    assert rank("random", seed=4) == rank("random", seed=4)
    assert len({tuple(rank("random", seed=seed).items()) for seed in range(5)}) == 5


def test_a_callable_sees_gradients_only_where_there_are_labels():
    seen = []
    rank(lambda group: seen.append(len(group.gradients)) or torch.ones(group.units))
    rank(lambda group: seen.append(len(group.gradients)) or torch.ones(group.units), labels=False)
    assert seen == [5, 3, 0, 0]


@pytest.mark.parametrize("name", CRITERIA)
def test_the_model_and_the_random_states_come_back_unchanged(name: str, global_rng_untouched):
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = Counting()
    model.load_state_dict(network()[0].state_dict() | {"calls": torch.zeros(())})
    model.train().first.requires_grad_(False)
    before = state_of(model)
    with global_rng_untouched():
        rank(name, model)
    assert state_of(model) == before


def test_regression_targets_give_the_gradient_of_the_squared_error():
    model, structure = network()
    (x, _), _ = batches()
    target = torch.ones(5, 4)
    copy = deepcopy(model)
    F.mse_loss(copy(x), target).backward()
    seen = {}
    rank_units(
        Calibration(model, structure, [(x, target)], default_forward),
        lambda group: seen.update({group.name: group.gradients}) or torch.ones(group.units),
    )
    torch.testing.assert_close(seen["second"][0], copy.second.weight.grad.flatten(1))


def test_taylor_needs_no_labels():
    assert rank("taylor", labels=False) != rank("taylor")
    assert rank("taylor", labels=False) == rank("taylor", labels=False)


def test_criteria_that_look_at_the_same_share_a_pass():
    model, structure = network()
    ran = []

    def forward(model: nn.Module, batch: Any) -> Any:
        ran.append(len(batch[0]))
        return default_forward(model, batch)

    names = ["fluctuation", "contribution", "l2"]
    together = score_units_by(Calibration(model, structure, batches(), forward), names)
    assert ran == [5, 3]
    for name, found in zip(names, together, strict=True):
        alone = score_units(Calibration(model, structure, batches(), default_forward), name)
        for group, values in alone.items():
            torch.testing.assert_close(found[group], values, rtol=0, atol=0)


def test_fewer_samples_of_a_large_model_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    _, structure = network()
    assert structure.macs == 6 * 3 * 9 * 16 + 5 * 6 * 9 * 4 + 4 * 20
    assert affordable(structure, 16, 128) == 128
    monkeypatch.setattr(calibration_module, "WORK", 40 * structure.macs)
    assert affordable(structure, 16, 128) == 40
    monkeypatch.setattr(calibration_module, "WORK", structure.macs)
    assert affordable(structure, 16, 128) == 16


class TestWhatIsRefused:
    def test_unknown_names(self):
        with pytest.raises(
            ValueError, match=r"criterion must be one of \['activation_mean', .* or a callable, got 'L2'"
        ):
            rank("L2")

    @pytest.mark.parametrize(
        ("wrong", "got"),
        [
            (lambda group: torch.ones(group.units + 1), r"6 finite scores for group 'first', got shape \(7,\)"),
            (lambda group: torch.ones(group.units, 1), r"got shape \(6, 1\)"),
            (lambda group: torch.full((group.units,), torch.nan), "with NaN or infinity"),
        ],
    )
    def test_scores_of_another_shape_or_without_value(self, wrong: Criterion, got: str):
        with pytest.raises(ValueError, match=got):
            rank(wrong)
