"""Prior corrected by measured losses of branches, and the check that chooses between priors."""

import numpy as np
import pytest
from torch import nn

from autoprune.importance.anchors import anchors
from autoprune.importance.criteria import order_units, score_units
from autoprune.importance.dropped import dropped_losses
from autoprune.importance.expected_loss import DEARER, ESTIMATED, MEASURED, REFITTED, rival_losses
from autoprune.protocols import Measurement, Pruning
from autoprune.search_spaces import Channels, Depth, Product
from autoprune.study import prior_check
from autoprune.study.prior_check import _proposed, choose_prior
from autoprune.testing.problems import additive_problem
from tests.residual import Residual, calibration_of


@pytest.fixture(scope="module")
def residual():
    return calibration_of(Residual(3).eval())


def rivals(space, calibration, kind="auto", fit=None):
    scores = score_units(calibration, "l2", 0)
    bound = space.bind(calibration.structure, order_units(scores))
    names = [dimension.name for dimension in bound.dimensions]
    fitted = [fit if len(dimension.options) > 2 else None for dimension in bound.dimensions] if fit is not None else ()
    found = rival_losses(kind, bound, scores, "l2", calibration, fitted=fitted)
    return {name: dict(zip(names, losses, strict=True)) for name, losses in found.items()}


def test_curves_inside_a_branch_end_below_what_the_branch_is_measured_to_be_worth(residual):
    found = rivals(Channels(), residual)
    assert list(found) == [ESTIMATED, MEASURED, REFITTED]
    for branch in residual.structure.branches:
        (group,) = branch.groups
        (worth,) = dropped_losses(residual, [Pruning(dropped=(branch.name,))])
        estimated, measured, refitted = (found[name][group] for name in (ESTIMATED, MEASURED, REFITTED))
        inside = (estimated > 0) & (measured < worth * (1 - 1e-9))
        assert inside.sum() > 8
        ratios = measured[inside] / estimated[inside]
        assert ratios == pytest.approx([ratios[0]] * len(ratios)), "one factor for a branch: the shape is kept"
        assert (measured <= worth * (1 + 1e-9)).all()
        assert (refitted[1:] < measured[1:]).all()


def test_dropped_branches_cost_what_was_measured_and_more_than_any_width_inside(residual):
    found = rivals(Product(Channels(), Depth(min_kept=1)), residual)
    for branch in residual.structure.branches:
        (worth,) = dropped_losses(residual, [Pruning(dropped=(branch.name,))])
        for name in (MEASURED, REFITTED):
            assert found[name][branch.name][1] == pytest.approx(worth)
            assert found[name][branch.groups[0]].max() <= worth * (1 + 1e-9)


def test_with_batch_norm_dropped_branches_may_be_dearer_and_widths_cost_what_a_refit_leaves():
    normalised = calibration_of(Residual(3, nn.BatchNorm1d).eval())
    fit = np.arange(16) / 100
    found = rivals(Product(Channels(), Depth(min_kept=1)), normalised, fit=fit)
    assert list(found) == [ESTIMATED, *DEARER]
    for branch in normalised.structure.branches:
        dropped = found[ESTIMATED][branch.name][1]
        for name, factor in DEARER.items():
            assert found[name][branch.name][1] == pytest.approx(factor * dropped)
            assert found[name][branch.groups[0]] is fit


def test_groups_outside_of_branches_are_converted_by_the_median_ratio(residual):
    found = anchors(residual)
    values = np.array([1.0, 2.0])
    removal = ("head", [np.arange(1), np.arange(2)])
    assert found.corrected(removal, values, 12, 1.5) == pytest.approx(found.scale * values)
    ratios = [found.measured[name] / found.estimated[name] for name in found.estimated]
    assert found.scale == pytest.approx(np.median(ratios))


def test_nothing_is_measured_where_statistics_are_estimated_anew_or_another_prior_is_asked_for(residual):
    assert list(rivals(Channels(), calibration_of(Residual(3, nn.BatchNorm1d).eval()))) == [ESTIMATED]
    assert list(rivals(Channels(), residual, "sensitivity")) == [ESTIMATED]
    plain = calibration_of(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)).eval())
    assert list(rivals(Channels(), plain)) == [ESTIMATED]


def test_large_models_are_measured_only_where_options_drop_branches(residual, monkeypatch):
    monkeypatch.setattr("autoprune.importance.anchors.MOST_WORK", 0)
    assert anchors(residual) is None
    assert anchors(residual, [residual.structure.branches[0].name]) is not None


class Table:
    """Scores candidates by a table of losses, and counts them."""

    def __init__(self, losses, raises=False):
        self.losses = losses
        self.raises = raises
        self.scored = []

    def prepare(self, context):
        """Nothing to prepare."""

    def evaluate(self, candidates):
        self.scored += candidates.tolist()
        if self.raises:
            raise RuntimeError("no memory")
        sums = [sum(row[option] for row, option in zip(self.losses, each, strict=True)) for each in candidates]
        return [Measurement(np.array([each]), np.array([each]), 0.0) for each in sums]


def reversed_of(losses):
    """Losses of which the cheap ones are dear."""
    return tuple(np.r_[0.0, 1 / row[1:]] for row in losses)


@pytest.fixture
def known():
    return additive_problem((4, 4, 4), seed=0, budget=0.6)


def test_the_prior_whose_candidate_scores_best_is_chosen_whatever_its_place(known):
    wrong = reversed_of(known.losses)
    for priors in ({"right": known.losses, "wrong": wrong}, {"wrong": wrong, "right": known.losses}):
        evaluator = Table(known.losses)
        chosen = choose_prior(evaluator, known.problem, priors)
        assert chosen.losses is known.losses
        assert "chosen: right" in chosen.note
        assert len(evaluator.scored) == 2


def test_priors_that_propose_the_same_everywhere_are_not_scored_and_the_first_is_kept(known):
    twice = tuple(2 * row for row in known.losses)
    evaluator = Table(known.losses)
    chosen = choose_prior(evaluator, known.problem, {"one": known.losses, "two": twice})
    assert chosen.losses is known.losses
    assert chosen.note == "prior check: all priors propose the same"
    assert not evaluator.scored


def test_priors_that_agree_at_the_budget_are_compared_below_it(known, monkeypatch):
    wrong = reversed_of(known.losses)
    shares = []

    def proposed(problem, losses, share):
        shares.append(share)
        return _proposed(problem, known.losses if share == 1 else losses, share)

    monkeypatch.setattr(prior_check, "_proposed", proposed)
    evaluator = Table(known.losses)
    chosen = choose_prior(evaluator, known.problem, {"wrong": wrong, "right": known.losses})
    assert chosen.losses is known.losses
    assert "at 75% of the budget, above which all propose the same" in chosen.note
    assert (shares, len(evaluator.scored)) == ([1.0, 1.0, 0.75, 0.75], 2)


@pytest.mark.parametrize("priors", [0, 1])
def test_without_a_rival_nothing_is_scored(known, priors):
    evaluator = Table(known.losses)
    chosen = choose_prior(evaluator, known.problem, dict([("only", known.losses)][:priors]))
    assert (chosen.losses, chosen.note) == ((known.losses if priors else None), "")
    assert not evaluator.scored


def test_failures_leave_the_first(known):
    wrong = reversed_of(known.losses)
    priors = {"first": wrong, "second": known.losses}
    assert choose_prior(Table(known.losses, raises=True), known.problem, priors).losses is wrong
