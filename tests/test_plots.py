"""Pictures show the numbers of the result, on the axes that they are given."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure

import autoprune
from autoprune.protocols import Dimension
from autoprune.result.plots import canvas
from autoprune.result.plots.convergence import growth
from autoprune.result.plots.layers import share_kept
from tests.resuming import search


@pytest.fixture(scope="module")
def result():
    return search(None, optimizer="auto", trials=20)


DRAW = {
    "plot": lambda result, axes: result.plot(axes=axes),
    "plot_layers": lambda result, axes: result.plot_layers(axes=axes),
    "plot_sensitivity": lambda result, axes: result.plot_sensitivity(axes=axes),
    "plot_convergence": lambda result, axes: result.plot_convergence(axes),
}


@pytest.mark.parametrize("name", DRAW)
def test_pictures_are_drawn_on_the_axes_given_and_these_come_back(name, result):
    given = Figure().add_subplot()
    assert DRAW[name](result, given) is given
    assert given.has_data()


@pytest.mark.parametrize("name", DRAW)
def test_every_axis_says_what_it_shows_and_in_which_unit(name, result):
    axes = DRAW[name](result, None)
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    if name == "plot":
        assert axes.get_xlabel() == "flops (MACs)"


@pytest.mark.parametrize("name", DRAW)
def test_without_axes_a_figure_of_its_own_is_made_that_pyplot_does_not_keep(name, result):
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    assert DRAW[name](result, None).figure is not None
    assert pyplot.get_fignums() == before


def test_in_a_notebook_the_figure_is_made_by_pyplot_so_that_it_shows(result, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setattr(canvas, "notebook_shell", lambda: object())
    pyplot.switch_backend("agg")
    axes = result.plot_convergence()
    assert axes.figure.number in pyplot.get_fignums()
    pyplot.close(axes.figure)


@pytest.mark.parametrize("name", DRAW)
def test_what_is_no_axes_is_refused(name, result):
    with pytest.raises(TypeError, match="axes must be matplotlib axes or None, got Figure"):
        DRAW[name](result, Figure())


def test_bars_of_layers_are_the_shares_of_units_kept(result):
    trial = result.front[0]
    dense = result.space.decode([0] * len(trial.candidate))
    axes = result.plot_layers(trial)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(trial.decoded)
    kept = [bar.get_width() for bar in axes.containers[1]]
    assert kept == [trial.decoded[name] / dense[name] for name in trial.decoded]
    texts = [text.get_text() for text in axes.texts]
    assert texts == [f"{trial.decoded[name]} of {dense[name]}" for name in trial.decoded]


def test_layers_are_those_of_a_trial_of_the_best_or_of_a_budget(result):
    assert result.plot_layers().get_title(loc="left").startswith(f"trial {result.best().id}:")
    tight = result.best("flops <= 40%")
    assert result.plot_layers("flops <= 40%").get_title(loc="left").startswith(f"trial {tight.id}:")
    with pytest.raises(autoprune.InfeasibleBudgetError):
        result.plot_layers("flops <= 1")


@pytest.mark.parametrize(
    ("options", "index", "share"),
    [
        ((64, 48, 16), 2, 0.25),
        ((0.0, 0.5, 0.9), 1, 0.5),
        ((1.0, 0.75), 1, 0.75),
        (("kept", "dropped"), 0, 1.0),
        (("kept", "dropped"), 1, 0.0),
    ],
)
def test_shares_of_all_kinds_of_options(options, index, share):
    assert share_kept(Dimension("layer", options), index) == pytest.approx(share)


def test_the_map_of_sensitivity_holds_the_losses_measured_alone(result):
    axes = result.plot_sensitivity()
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    losses = result.sensitivity().losses
    assert shown.shape == losses.shape
    assert np.isnan(shown[:, 0]).all()  # dense loses nothing
    np.testing.assert_array_equal(np.isnan(shown[:, 1:]), np.isnan(losses[:, 1:]))
    top = np.nanmax(losses)
    seen = np.isfinite(losses) & (losses > top / 1e3) & (np.arange(losses.shape[1]) > 0)
    assert seen.sum() > 2
    np.testing.assert_allclose(shown[seen], losses[seen])


def test_a_search_that_measured_no_option_alone_has_an_empty_map(result):
    few = replace(result, trials=result.trials[:1])
    axes = few.plot_sensitivity()
    assert axes.get_title(loc="left").startswith("0 options")


def area(points, reference):
    """Area that points (score, cost) dominate below the reference, by counting the cells between all coordinates."""
    xs = sorted({x for x, _ in points} | {reference[0]})
    ys = sorted({y for _, y in points} | {reference[1]})
    cells = 0.0
    for x0, x1 in pairwise(xs):
        for y0, y1 in pairwise(ys):
            if any(x <= x0 and y <= y0 for x, y in points):
                cells += (x1 - x0) * (y1 - y0)
    return cells


def test_convergence_is_the_area_that_the_trials_so_far_dominate(result):
    sign = -1 if result.higher_is_better else 1
    done = [trial for trial in result.trials if trial.feasible]
    raw = np.array([(sign * trial.score, trial.costs["flops"]) for trial in done])
    scaled = (raw - raw.min(axis=0)) / (raw.max(axis=0) - raw.min(axis=0))
    place = {trial.id: tuple(point) for trial, point in zip(done, scaled.tolist(), strict=True)}
    expected = [
        area([place[one.id] for one in result.trials[: i + 1] if one.id in place], (1.1, 1.1))
        for i in range(len(result.trials))
    ]
    np.testing.assert_allclose(growth(result), expected)
    drawn = result.plot_convergence().lines[0].get_ydata()
    np.testing.assert_allclose(drawn, np.array(expected) / expected[-1])


def test_a_result_without_trials_is_drawn_all_the_same(result):
    empty = replace(result, trials=(), front=())
    empty.plot_convergence()
    empty.plot_sensitivity()
    empty.plot_layers(result.dense)


def luminance(colour):
    """Relative luminance of a colour written as in HTML, by the definition of WCAG 2.2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_marks_stand_out_from_white_by_three_to_one():
    for colour in (canvas.FRONT, canvas.LIMIT, canvas.DENSE, canvas.INK):
        assert 1.05 / (luminance(colour) + 0.05) >= 3.0


def test_scores_far_below_the_front_are_counted_and_not_drawn(result):
    """As a network that lost everything, which would squeeze the others to a line."""
    score = 0.98 if result.higher_is_better else 0.02
    good = [replace(trial, score=score, interval=(score, score)) for trial in result.front]
    lost = replace(result.front[0], id=10_000, score=1 - score, interval=(1 - score, 1 - score))
    dense = replace(result.dense, score=score)
    axes = replace(result, trials=(*good, lost), front=(lost, *good), dense=dense).plot()
    low, high = sorted(axes.get_ylim())
    assert low < score < high
    assert not low < 1 - score < high
    assert [text.get_text() for text in axes.texts] == ["1 trial is worse than shown"]
    assert not replace(result, trials=tuple(good), front=tuple(good), dense=dense).plot().texts
