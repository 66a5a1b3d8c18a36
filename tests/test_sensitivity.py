"""Expected changes of the outputs of a whole model: against second derivatives, and where there are none."""

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.data.batch import default_forward
from autoprune.importance import calibration as calibration_module
from autoprune.importance import unit_products
from autoprune.importance.calibration import Calibration
from autoprune.importance.criteria import CRITERIA, score_units, score_units_by
from autoprune.importance.expected_loss import expected_losses
from autoprune.importance.sensitivity import output_changes
from autoprune.importance.unit_products import UnitProducts
from autoprune.optimizers.knapsack.sensitivity import next_probes
from autoprune.optimizers.problem import Problem
from autoprune.search_spaces import Channels
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from tests.candidates import state_of


class Net(nn.Module):
    """One group, the hidden units, which two layers read."""

    def __init__(self, outputs=3, in_place=False):
        super().__init__()
        self.first, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, outputs), nn.Linear(6, outputs)
        self.act = nn.ReLU(inplace=in_place)

    def forward(self, x):
        hidden = self.first(x).tanh()
        left = self.left(hidden)
        return left + self.right(self.act(hidden))


def network(**options):
    torch.manual_seed(0)
    model = Net(**options).eval().double()
    x = torch.randn(32, 4, dtype=torch.float64)
    return model, x, analyse(Example(model, (x[:2],)))


def changes(model, structure, batches, options, forward=default_forward, seed=0):
    group = next(group.name for group in structure.groups if group.size == 6)
    return output_changes(Calibration(model, structure, batches, forward, seed=seed), [(group, options)])[0]


def by_second_derivatives(model, x, units, distance):
    """Half of the second derivative of the mean distance when the units fade."""
    mask = torch.zeros(6, dtype=torch.float64)
    mask[units] = 1

    def faded(t):
        hidden = model.first(x).tanh() * (1 - t * mask)
        return float(distance(model.left(hidden) + model.right(hidden.relu())))

    with torch.no_grad():
        return 0.5 * (faded(STEP) + faded(-STEP)) / STEP**2  # the dense model is at no distance


STEP = 1e-3
OPTIONS = [np.array([1]), np.array([1, 4]), np.array([0, 1, 2, 4])]


def averaged(*args):
    return np.mean([changes(*args, seed=seed) for seed in range(60)], axis=0)


@pytest.mark.slow
def test_logits_change_by_the_divergence_from_the_dense_distribution():
    model, x, structure = network()
    dense = model(x).detach().log_softmax(1)

    def divergence(y):
        return (dense.exp() * (dense - y.log_softmax(1))).sum(1).mean()

    expected = [by_second_derivatives(model, x, units, divergence) for units in OPTIONS]
    assert averaged(model, structure, [x], OPTIONS) == pytest.approx(expected, rel=0.15)


@pytest.mark.slow
def test_other_outputs_change_by_their_squared_difference_relative_to_their_mean_square():
    model, x, structure = network()
    dense = model(x).detach()

    def difference(y):
        return (y - dense).square().mean() / dense.square().mean()

    expected = [by_second_derivatives(model, x, units, difference) for units in OPTIONS]
    batches = [(x, torch.zeros(32, 3, dtype=torch.float64))]
    assert averaged(model, structure, batches, OPTIONS) == pytest.approx(expected, rel=0.15)


@pytest.mark.slow
def test_what_a_model_writes_to_later_counts_with_the_value_that_was_read():
    model, x, structure = network()
    writing, _, _ = network(in_place=True)
    np.testing.assert_allclose(changes(writing, structure, [x], OPTIONS), changes(model, structure, [x], OPTIONS))


def test_the_model_and_the_random_states_come_back_unchanged(global_rng_untouched):
    model, x, structure = network()
    before = state_of(model)
    with global_rng_untouched():
        changes(model, structure, [x], OPTIONS)
    assert state_of(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_of_a_large_model_fewer_samples_are_looked_at(monkeypatch):
    model, x, structure = network()
    monkeypatch.setattr(calibration_module, "WORK", 1)
    few = changes(model, structure, [x], OPTIONS)
    np.testing.assert_array_equal(few, changes(model, structure, [x[:8]], OPTIONS))


class Observers(list):
    """Observers of passes for criteria, in the order in which they were made."""

    def make(self, calibration):
        self.append(UnitProducts(calibration))
        return self[-1]


@pytest.mark.parametrize("outputs", [3, None], ids=["logits", "values"])
def test_the_pass_of_a_criterion_with_gradients_gives_the_same_changes(outputs):
    model, x, structure = network()
    further = torch.randn(40, 4, dtype=torch.float64)  # more than the estimate takes
    forward = default_forward if outputs else (lambda module, batch: module(batch)[:, None, None])
    calibration = Calibration(model, structure, [x[:20], further], forward, seed=3)
    removals = [(group.name, [np.array([0]), np.array([0, 1, 3])]) for group in structure.groups]
    own = output_changes(calibration.on(calibration.batches), removals)
    observers = Observers()
    score_units_by(calibration, ["taylor", "contribution"], 3, observing=observers.make)
    (products,) = observers
    products.keep(calibration)
    assert UnitProducts.kept(calibration)
    for ours, expected in zip(output_changes(calibration, removals), own, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_of_two_estimates_only_the_first_runs_the_model():
    model, x, structure = network()
    calls = []

    def forward(module, batch):
        calls.append(len(batch))
        return module(batch)

    calibration = Calibration(model, structure, [x], forward)
    removals = [(group.name, [np.array([1])]) for group in structure.groups]
    first = output_changes(calibration, removals)
    ran = len(calls)
    np.testing.assert_array_equal(output_changes(calibration, removals), first)
    assert ran == len(calls) > 0


def test_products_beyond_the_memory_allowed_are_not_kept(monkeypatch):
    monkeypatch.setattr(unit_products, "KEPT_BYTES", 8 * 6)  # of one sample of 32
    model, x, structure = network()
    calibration = Calibration(model, structure, [x], default_forward)
    removals = [(group.name, [np.array([1])]) for group in structure.groups]
    assert output_changes(calibration, removals)[0] is not None
    assert not UnitProducts.kept(calibration)


def test_a_model_without_gradients_is_measured_by_reconstruction():
    model, x, structure = network()

    @torch.no_grad()
    def forward(module, batch):
        return module(batch)

    space = Channels(step=1).bind(structure, {group.name: range(group.size) for group in structure.groups})
    calibration = Calibration(model, structure, [x], forward)
    args = space, score_units(calibration, "l2"), "l2", calibration
    found, expected = expected_losses("auto", *args), expected_losses("reconstruction", *args)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_contribution_is_the_mean_square_times_the_squared_norm_of_what_reads_it():
    model, x, structure = network()
    with torch.no_grad():
        hidden = model.first(x).tanh()
        norms = [layer.weight.square().sum(0) for layer in (model.left, model.right)]
        expected = hidden.square().mean(0) * norms[0] + hidden.relu().square().mean(0) * norms[1]
    scores = score_units(Calibration(model, structure, [x], default_forward), "contribution")
    (found,) = (each for each in scores.values() if len(each) == 6)
    torch.testing.assert_close(found, expected)
    assert "contribution" in CRITERIA


def test_a_scan_that_could_not_cover_every_dimension_is_left_out_where_a_prior_is_known():
    def problem(trials, prior):
        return Problem(
            sizes=np.full(20, 4),
            cost_names=("flops",),
            limits=np.array([40.0]),
            cost_function=lambda candidates: 60.0 - candidates.sum(1, keepdims=True),
            trials=trials,
            prior=tuple(np.arange(4.0) for _ in range(20)) if prior else None,
        )

    known = np.zeros((0, 20), dtype=np.int64)
    counts = [
        len(next_probes(problem(*case), known, 8, lambda: known)) for case in ((49, True), (50, True), (49, False))
    ]
    assert counts == [0, 8, 8]
