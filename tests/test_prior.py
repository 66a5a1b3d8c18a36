"""Expected losses before any evaluation: against masking by hand, and against what is measured."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import autoprune
from autoprune import Channels, Data, Sparsity
from autoprune.data.batch import default_forward
from autoprune.importance import reconstruction
from autoprune.importance.calibration import Calibration
from autoprune.importance.criteria import CRITERIA, order_units, score_units
from autoprune.importance.expected_loss import PRIORS, criterion_losses, expected_losses
from autoprune.importance.reconstruction import reconstruction_errors
from autoprune.optimizers import RandomSearch
from autoprune.protocols import Pruning
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.testing.contexts import study_for
from tests.candidates import state_of
from zoo import ZOO, draw, settled

SHAPES = ((3, 8, 8),)


class Net(nn.Module):
    """Groups a, b and c of 8, 6 and 5 units; a is read by two layers, c by a linear one, four columns to a unit."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 6, 3, stride=2, padding=1, padding_mode="reflect")
        self.up, self.skip = nn.ConvTranspose2d(6, 3, 2, stride=2), nn.Conv2d(8, 3, 1)
        self.c, self.head = nn.Conv2d(3, 5, 4, stride=4), nn.Linear(20, 4)

    def forward(self, x):
        a = self.norm(self.a(x)).relu()
        b = self.up(input=self.b(a).relu()) + self.skip(a)  # by keyword, as some models do
        return self.head(self.c(b.tanh()).flatten(1))


READ = {"a": ("b", "skip"), "b": ("up",), "c": ("head",)}


@cache
def network():
    model = settled(Net, SHAPES)
    return model, analyse(Example(model, draw(SHAPES)))


def batches(samples=24):
    return [(x, torch.zeros(len(x))) for x in draw(SHAPES, samples, seed=5)[0].split(9)]


def by_hand(group, units):
    """Change of what the readers of a group give when its units are set to zero in their input."""
    model, _ = network()
    seen = {}
    names = READ[group]
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda m, args, kwargs, n=n: seen.update({n: (*args, *kwargs.values())[0]}), with_kwargs=True
        )
        for n in names
    ]
    total = 0.0
    with torch.no_grad():
        model(torch.cat([x for x, _ in batches()]))
        for hook in hooks:
            hook.remove()
        for name in names:
            layer, x = model.get_submodule(name), seen[name]
            masked = (x.unflatten(1, (5, 4)) if name == "head" else x).clone()
            masked[:, units] = 0
            error = layer(x) - layer(masked.reshape(x.shape))
            total += (error.square().sum() / (layer(x) - layer(torch.zeros_like(x))).square().sum()).item()
    return total


def errors(removals, samples=24):
    model, structure = network()
    return reconstruction_errors(Calibration(model, structure, batches(samples), default_forward), removals)


@pytest.mark.slow
def test_the_error_is_that_of_the_layers_that_read_what_is_masked():
    options = [np.array([1]), np.array([1, 4]), np.array([0, 1, 2, 4])]
    found = errors([(group, options) for group in READ])
    for group, error in zip(READ, found, strict=True):
        assert error == pytest.approx([by_hand(group, units) for units in options], rel=1e-4)


def test_options_that_do_not_grow_are_measured_each_for_itself():
    (error,) = errors([("a", [np.array([0, 3]), np.array([5]), np.array([2, 5])])])
    assert error == pytest.approx([by_hand("a", units) for units in ([0, 3], [5], [2, 5])], rel=1e-4)


def test_only_the_first_samples_and_values_are_looked_at(monkeypatch):
    units = [np.array([1, 4])]
    monkeypatch.setattr(reconstruction, "SAMPLES", 13)
    np.testing.assert_array_equal(errors([("c", units)], 24), errors([("c", units)], 13))
    monkeypatch.setattr(reconstruction, "SAMPLES", 9)
    whole = errors([("c", units)])
    monkeypatch.setattr(reconstruction, "MOST_VALUES", 4 * 4)
    assert errors([("c", units)]) != whole
    monkeypatch.setattr(reconstruction, "SAMPLES", 4)
    np.testing.assert_allclose(errors([("c", units)]), errors([("c", units)], 4))


class Single(nn.Module):
    """Runs sample by sample, without a dimension of samples."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return torch.stack([self.second(self.first(row).relu()) for row in x])


def test_a_layer_without_a_dimension_of_samples_is_left_out():
    model, inputs = Single(), torch.randn(3, 4)
    structure = analyse(Example(model, (inputs,)))
    calibration = Calibration(model, structure, [(inputs, None)], default_forward)
    assert reconstruction_errors(calibration, [("first", [np.array([0])])]) == [None]


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_a_layer_whose_outputs_have_no_energy_or_no_value_is_left_out(value):
    model, structure = settled(Net, SHAPES), network()[1]
    with torch.no_grad():
        model.head.weight.mul_(value)
    removals = [("c", [np.array([0])]), ("a", [np.array([0])])]
    none, error = reconstruction_errors(Calibration(model, structure, batches(), default_forward), removals)
    assert none is None
    assert error > 0


def test_the_model_and_the_random_states_come_back_unchanged(global_rng_untouched):
    model, structure = network()
    before = state_of(model)
    with global_rng_untouched():
        reconstruction_errors(Calibration(model, structure, batches(), default_forward), [("a", [np.array([0])])])
    assert state_of(model) == before


def scores_of(criterion):
    model, structure = network()
    labelled = [(x, torch.arange(len(x)) % 4) for x, _ in batches()]
    return score_units(Calibration(model, structure, labelled, default_forward), criterion)


class TestCriterion:
    @pytest.mark.slow
    def test_magnitudes_give_the_energy_lost_relative_to_what_is_left(self):
        weights = scores_of("l2")["b"].double().numpy() ** 2
        found = criterion_losses(("b", [np.array([2]), np.array([2, 3, 5])]), scores_of("l2"), "l2")
        lost = np.array([weights[2], weights[[2, 3, 5]].sum()])
        assert found == pytest.approx(lost / (weights.sum() - lost))

    def test_changes_of_the_loss_add_up_as_they_are(self):
        values = scores_of("taylor")["a"].double().numpy()
        found = criterion_losses(("a", [np.array([0, 7])]), scores_of("taylor"), "taylor")
        assert found == pytest.approx([values[0] + values[7]])

    @pytest.mark.parametrize("criterion", [*CRITERIA, lambda group: torch.linspace(-1, 1, group.units)])
    @pytest.mark.parametrize("kind", PRIORS)
    def test_every_criterion_gives_finite_losses_for_every_option(self, criterion, kind):
        model, structure = network()
        scores = scores_of(criterion)
        space = Channels(step=2, ignore=["c"]).bind(structure, order_units(scores))
        calibration = Calibration(model, structure, batches(), default_forward)
        prior = expected_losses(kind, space, scores, criterion, calibration)
        assert [len(row) for row in prior] == space.sizes.tolist()
        assert all(row[0] == 0 and (row[1:] > 0).all() and np.isfinite(row).all() for row in prior)
        if kind == "criterion":
            assert all((np.diff(row) > 0).all() for row in prior)

    def test_scores_that_are_all_zero_expect_nothing(self):
        found = criterion_losses(("a", [np.array([0]), np.array([0, 1])]), {"a": torch.zeros(8)}, "l2")
        assert found.tolist() == [0, 0]


@pytest.mark.slow
def test_a_group_that_no_layer_is_seen_to_read_falls_back_on_the_criterion():
    entry = ZOO["resnext"]
    model, inputs = entry.build().eval(), entry.inputs()
    structure = analyse(Example(model, inputs))
    calibration = Calibration(model, structure, [(*inputs, None)], default_forward)
    scores = score_units(calibration, "l2")
    space = Channels().bind(structure, order_units(scores))
    args = scores, "l2", calibration
    measured, summed = (expected_losses(kind, space, *args) for kind in ("reconstruction", "criterion"))
    equal = [np.array_equal(a, b) for a, b in zip(measured, summed, strict=True)]
    assert 0 < sum(equal) < len(equal)


def test_nothing_is_expected_where_a_dimension_removes_no_units():
    class Masks:
        sizes = np.array([3, 2])

        def pruning(self, candidate):
            return Pruning()

    model, structure = network()
    calibration = Calibration(model, structure, batches(), default_forward)
    assert expected_losses("reconstruction", Masks(), {}, "l2", calibration) is None


class TestInASearch:
    @pytest.mark.slow
    @pytest.mark.parametrize(("prior", "least"), [("reconstruction", 0.75), ("criterion", 0.7)])
    def test_the_order_of_measured_distortions_is_largely_foreseen(self, digits, digits_model, prior, least):
        study = study_for(
            digits_model,
            "flops <= 50%",
            Data(digits.train, digits.validation, digits.test, validation_samples=200),
            space=Channels(step=0.25),
            evaluator="auto",
            start=autoprune.Start(prior=prior),
        )
        sizes = study.problem.sizes
        where = [(j, k) for j, size in enumerate(sizes) for k in range(1, size)]
        candidates = np.array([[k if i == j else 0 for i in range(len(sizes))] for j, k in where])
        measured = [outcome.distortion.mean() for outcome in study.evaluator.evaluate(candidates)]
        assert spearmanr([study.problem.prior[j][k] for j, k in where], measured).statistic > least

    @pytest.mark.slow
    def test_the_optimizer_knows_the_trials_and_what_to_expect(self):
        seen = []

        def make(problem, seed):
            seen.append(problem)
            return RandomSearch(problem, seed)

        data = torch.randn(60, 64, generator=torch.Generator().manual_seed(0))
        for prior in ("criterion", "reconstruction"):
            options = {"trials": 3, "optimizer": make, "start": autoprune.Start(prior=prior)}
            space = Channels(step=0.125, min_fraction=0.125)
            autoprune.search(ZOO["mlp"].build(), "flops <= 50%", data, space=space, **options)
        assert [problem.trials for problem in seen] == [3, 3]
        first, second = (np.concatenate(problem.prior) for problem in seen)
        assert first.shape == second.shape == (24,)
        assert (first != second).sum() == 21

    def test_an_unknown_prior_is_refused(self):
        with pytest.raises(
            ValueError,
            match=r"prior must be one of \['auto', 'criterion', 'database', .*\], got 'l2'",
        ):
            autoprune.search(ZOO["mlp"].build(), "flops <= 50%", torch.randn(60, 64), start=autoprune.Start(prior="l2"))


def test_weights_set_to_zero_lose_their_share_of_the_squares():
    model, structure = network()
    space = Sparsity(levels=(0.0, 0.5, 0.9)).bind(structure)
    losses = expected_losses("reconstruction", space, {}, None, Calibration(model, structure, (), default_forward))
    assert [len(row) for row in losses] == space.sizes.tolist()
    for dimension, row in zip(space.dimensions, losses, strict=True):
        weight = model.get_parameter(dimension.name).detach().abs().flatten()
        for level, loss in zip(dimension.options, row, strict=True):
            gone = weight.topk(int(level * weight.numel()), largest=False).values.square().sum()
            assert loss == pytest.approx(float(gone / (weight.square().sum() - gone)), rel=1e-4)
