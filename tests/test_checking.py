"""The calibration check: statistics that do not suit the data are renewed; what is chosen is said and kept."""

import copy
import dataclasses
import json
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autoprune
from autoprune.data.batch import default_forward
from autoprune.importance import calibration as calibration_module
from autoprune.importance import gradients, sensitivity
from autoprune.importance.calibration import Calibration
from autoprune.importance.gradients import distortion_gradients
from autoprune.metrics.scorers import class_dimension
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.study import calibration_check as checking
from autoprune.study.calibration_check import FILE_NAME
from autoprune.study.uniform_trial import RACED_FIRST, UniformTrial
from autoprune.testing.contexts import study_for


@pytest.fixture(scope="module")
def case():
    """A trained network with batch norm, and its data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, y = torch.randn(260, 3, 8, 8), torch.randint(0, 4, (260,))
        x[torch.arange(260), y % 3, y] += 3
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 4),
        )  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for i in range(60):
            rows = slice(i % 2 * 65, i % 2 * 65 + 65)
            loss = F.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    parts = [(x[rows], y[rows]) for rows in (slice(130), slice(130, 195), slice(195, 260))]
    return net.eval(), autoprune.Data(*parts)


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "renewed"), [(0.0, False), (4.0, True)])
def test_statistics_are_renewed_only_where_that_helps_the_dense_model(case, shift, renewed):
    model = copy.deepcopy(case[0])
    signs = torch.tensor([1.0, -1.0] * 8)
    model[4].running_mean += shift * signs * model[4].running_var.sqrt()
    study = study_for(model, "flops <= 70%", case[1], metric="accuracy")
    assert study.evaluator.settings["renew"] is renewed, study.notes
    (note,) = [note for note in study.notes if note.startswith("calibration check on 65 validation samples")]
    assert "without weights" in note


@pytest.mark.slow
def test_every_criterion_that_may_help_is_scored_with_its_figure(case):
    study = study_for(case[0], "flops <= 70%", case[1], metric="accuracy")
    (note,) = [note for note in study.notes if note.startswith("calibration check")]
    for name in ("l2", "taylor", "fluctuation", "contribution"):
        assert re.search(rf"\b{name} \d", note), note


@pytest.mark.slow
def test_the_check_of_a_large_model_takes_few_samples(case, monkeypatch):
    monkeypatch.setattr(calibration_module, "WORK", 1)
    study = study_for(case[0], "flops <= 70%", case[1], metric="accuracy")
    assert any(note.startswith("calibration check on 64 validation samples") for note in study.notes), study.notes


@pytest.mark.slow
@pytest.mark.parametrize(("errors", "chosen"), [(0.5, "l2"), (1.5, "contribution")])
def test_another_criterion_is_chosen_only_where_more_than_luck_speaks_for_it(case, monkeypatch, errors, chosen):
    """Contribution, the first that is scored, gains this number of standard errors on l2, the last."""
    spread = np.random.default_rng(0).normal(size=65)
    spread = (spread - spread.mean()) / spread.std(ddof=1)
    others = [np.full(65, 9.0), np.full(65, 9.0)]
    given = iter([5.0 - spread - errors / 65**0.5, *others, np.full(65, 5.0)])
    monkeypatch.setattr(UniformTrial, "score", lambda *_: next(given, np.full(65, 9.0)))
    monkeypatch.setattr(UniformTrial, "halfway", lambda _: np.full(65, 7.0))
    study = study_for(case[0], "flops <= 70%", case[1], metric="accuracy")
    assert study.choice.criterion == chosen
    assert study.choice.parts["least_squares"]


@pytest.mark.slow
@pytest.mark.parametrize("beaten", [1.0, 0.75, 0.5, 0.0])
def test_where_all_are_closer_to_chance_than_to_dense_gentler_pruning_decides(case, monkeypatch, beaten):
    """`beaten`: the share of the levels from which on they are not; at more, weights seem better left alone."""
    seen = []

    def score(_trial, refit, context, candidate, _best=None):
        seen.append(candidate)
        share = len({levels.tobytes() for levels in seen})  # of those tried so far
        above = (1.0, 0.75, 0.5)[share - 1] > beaten
        refitted = refit.settings["least_squares"]
        return np.full(65, 3.0 if above else 1.0) + (0.5 if refitted == above else 0.0)

    monkeypatch.setattr(UniformTrial, "score", score)
    monkeypatch.setattr(UniformTrial, "halfway", lambda _: np.full(65, 2.0))
    study = study_for(case[0], "flops <= 30%", case[1], metric="accuracy")
    (note,) = [note for note in study.notes if note.startswith("calibration check")]
    last = max(beaten, 0.5)
    assert study.choice.parts["least_squares"] == (beaten > 0), note
    assert ("beyond 2," in note and f"by {last:.0%} of the levels" in note) == (last < 1), note
    np.testing.assert_array_equal(seen[-1], np.rint(last * seen[0]))


@pytest.mark.parametrize("metric", ["accuracy", "agreement", F.cross_entropy, "whole"])
def test_the_line_lies_halfway_between_the_dense_model_and_its_mean_output(case, metric):
    def whole(run, batches):
        return sum(F.cross_entropy(run((x, y)), y, reduction="sum") for x, y in batches) / 65

    given = autoprune.Metric(whole, higher_is_better=False, per_sample=False) if metric == "whole" else metric
    data = dataclasses.replace(case[1], batch_size=20)
    context = study_for(case[0], "flops <= 70%", data, metric=given, evaluator="adaptive_bn").context
    signal = UniformTrial(context).halfway()
    x, y = (torch.cat(part) for part in zip(*context.subsets.validation, strict=True))
    with torch.no_grad():
        dense = case[0](x)
        mean = dense.mean(0).expand_as(dense)
        each = (F.cross_entropy(mean, y, reduction="none") + F.cross_entropy(dense, y, reduction="none")) / 2
        if metric == "agreement":
            each = F.kl_div(mean.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="none").sum(1) / 2
    expected = each.mean(0, keepdim=True) if metric == "whole" else each
    np.testing.assert_allclose(signal, expected, rtol=1e-5)


def test_a_model_that_is_no_better_than_a_constant_output_is_not_compared_with_one(case):
    data = autoprune.Data(*((x, y.roll(1)) for x, y in (case[1].calibration, case[1].validation)))
    context = study_for(case[0], "flops <= 70%", data, metric="accuracy", evaluator="adaptive_bn").context
    assert UniformTrial(context).halfway() is None


@pytest.mark.parametrize("metric", ["accuracy", F.cross_entropy], ids=["of samples", "of a weighed set"])
def test_what_is_clearly_worse_is_given_up_after_some_samples_whose_signals_are_those_of_all(case, metric):
    data = dataclasses.replace(case[1], batch_size=8)
    context = study_for(case[0], "flops <= 70%", data, metric=metric, evaluator="adaptive_bn").context
    trial = UniformTrial(context)
    whole = trial.measure(context.model)
    assert len(whole) == trial.samples == 65
    np.testing.assert_array_equal(trial.measure(context.model, whole + 1.0), whole)
    few = trial.measure(context.model, whole - 1.0)
    assert 65 / 4 <= len(few) <= 65 / 4 + 8
    np.testing.assert_array_equal(few, whole[: len(few)])


@pytest.mark.parametrize("size", [2, 8, 64])
def test_of_a_large_model_what_is_far_worse_is_given_up_after_very_few_samples(case, monkeypatch, size):
    monkeypatch.setattr(calibration_module, "WORK", 1)
    data = dataclasses.replace(case[1], batch_size=size)
    context = study_for(case[0], "flops <= 70%", data, metric="accuracy", evaluator="adaptive_bn").context
    trial = UniformTrial(context)
    whole = trial.measure(context.model)
    assert len(whole) == trial.samples == 64
    few = trial.measure(context.model, whole - 1.0)
    np.testing.assert_array_equal(few, whole[:RACED_FIRST])
    better = whole.copy()
    better[:RACED_FIRST] -= 1.1 + np.array([1.0, -1.0, 1.0, -1.0])  # by two standard errors of these
    assert len(trial.measure(context.model, better)) > RACED_FIRST


@pytest.mark.slow
def test_without_time_left_nothing_is_checked_and_a_note_says_so(case, tmp_path, monkeypatch):
    monkeypatch.setattr("autoprune.study.setup.check", None)
    run_dir = str(tmp_path)
    result = autoprune.search(
        case[0], "flops <= 70%", case[1], max_seconds=1e-6, execution=autoprune.Execution(run_dir=run_dir)
    )
    assert (result.stopped, result.trials) == ("time", ())
    (note,) = [note for note in result.notes if note.startswith("the calibration check was left out")]
    again = autoprune.search(
        case[0], "flops <= 70%", case[1], trials=2, execution=autoprune.Execution(run_dir=run_dir, resume=True)
    )
    assert len(again.trials) == 2
    assert note in again.notes


@pytest.mark.slow
@pytest.mark.parametrize("parts", [{}, {"bias": False}, {"bn": False, "least_squares": False}])
def test_what_resumes_and_what_workers_get_scores_to_the_last_bit_what_the_check_did(
    case, tmp_path, monkeypatch, parts
):
    """Ridges are chosen for the parts, and for the ranking, that the check began with, not for what it chose."""
    really = checking.check

    def choosing(*given):
        choice, chosen, _ = really(*given)
        choice = dataclasses.replace(choice, criterion="taylor", parts={**choice.parts, **parts})
        return choice, chosen.with_parts(**parts), checking.ranking(given[0], "taylor", *given[4:6])

    monkeypatch.setattr("autoprune.study.setup.check", choosing)
    first = study_for(
        case[0], "flops <= 70%", case[1], metric="accuracy", execution=autoprune.Execution(run_dir=str(tmp_path))
    )
    first.choice.save(str(tmp_path))
    again = study_for(
        case[0], "flops <= 70%", case[1], metric="accuracy", execution=autoprune.Execution(run_dir=str(tmp_path))
    )
    worker = pickle.loads(pickle.dumps(first.fresh))
    worker.prepare(first.context)
    candidates = np.array([first.problem.sizes // 2, first.problem.sizes - 1])
    expected = [found.distortion.tolist() for found in first.evaluator.evaluate(candidates)]
    for evaluator in (again.evaluator, worker):
        assert [found.distortion.tolist() for found in evaluator.evaluate(candidates)] == expected


@pytest.mark.slow
def test_a_damaged_choice_is_named_with_the_way_out(case, tmp_path):
    study_for(case[0], "flops <= 70%", case[1], metric="accuracy").choice.save(str(tmp_path))
    text = (tmp_path / FILE_NAME).read_text()
    for damaged in (text[:40], text.replace('"bn"', '"bm"'), "[]"):
        (tmp_path / FILE_NAME).write_text(damaged)
        with pytest.raises(autoprune.FileFormatError, match=r"refit\.json is not the choice of a .* delete it"):
            study_for(
                case[0],
                "flops <= 70%",
                case[1],
                metric="accuracy",
                execution=autoprune.Execution(run_dir=str(tmp_path)),
            )


@pytest.mark.slow
def test_a_resumed_search_takes_the_choice_that_was_kept(case, tmp_path):
    first = study_for(
        case[0], "flops <= 70%", case[1], metric="accuracy", execution=autoprune.Execution(run_dir=str(tmp_path))
    )
    assert not list(tmp_path.iterdir())  # until the search begins
    first.choice.save(str(tmp_path))
    kept = json.loads((tmp_path / FILE_NAME).read_text())
    kept["parts"]["bias"] = False
    (tmp_path / FILE_NAME).write_text(json.dumps(kept))
    again = study_for(
        case[0], "flops <= 70%", case[1], metric="accuracy", execution=autoprune.Execution(run_dir=str(tmp_path))
    )
    assert again.evaluator.settings == first.evaluator.settings | {"bias": False}
    assert again.context.space.to_json() == first.context.space.to_json()


def test_the_passes_of_the_check_serve_the_prior_which_a_resumed_search_computes_alike(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 30, bias=False)).eval()
    ids = torch.randint(0, 30, (90, 12), generator=torch.Generator().manual_seed(0))
    parts = autoprune.Data(ids[:40], ids[40:70], ids[70:])
    made = []
    observed = sensitivity._observed
    monkeypatch.setattr(sensitivity, "_observed", lambda calibration: made.append(1) or observed(calibration))

    def prepared(run_dir):
        execution = autoprune.Execution(run_dir=run_dir, progress=False)
        return study_for(model, "flops <= 60%", parts, metric="agreement", seed=5, trials=4, execution=execution)

    study = prepared(None)
    assert not made
    study.choice.save(tmp_path)
    resumed = prepared(tmp_path)
    assert made
    for ours, expected in zip(resumed.problem.prior, study.problem.prior, strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("work", "together"), [(gradients._WORK_AT_ONCE, 8), (3 * 2, 2), (0, 1)])
def test_gradients_of_the_distortion_are_the_fisher_information(monkeypatch, work, together):
    monkeypatch.setattr(gradients, "_WORK_AT_ONCE", work)
    layer = nn.Linear(3, 1, bias=False)
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2.0, 3.0])
    structure = analyse(Example(layer, (x[:2],)))
    (found,) = distortion_gradients(Calibration(layer, structure, [x], default_forward)).values()
    torch.testing.assert_close(found[0] * together**0.5, torch.tensor([1.0, 2.0, 3.0]), rtol=0.15, atol=0)


def test_outputs_of_a_vocabulary_for_tokens_are_logits_whatever_holds_them():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    ids = torch.randint(0, 20, (400, 12), generator=torch.Generator().manual_seed(0))
    structure = analyse(Example(model, (ids[:2],)))
    plain = distortion_gradients(Calibration(model, structure, [ids], default_forward))
    held = distortion_gradients(Calibration(model, structure, [ids], lambda model, batch: {"logits": model(batch)}))
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, held[name])
    chances = model(ids).softmax(-1)
    # Of a softmax in its logits it is diag(p) - p p', here of the mean over tokens that are drawn apart.
    expected = (chances * (1 - chances)).mean((0, 1)) / (8 * 12)
    torch.testing.assert_close(plain["1.bias"].square().sum(), expected.sum(), rtol=0.2, atol=0)


def test_words_outside_of_the_outputs_are_no_classes():
    ids = torch.full((2, 3), 7)
    assert class_dimension(torch.randn(2, 3, 8), ids) == -1
    assert class_dimension(torch.randn(2, 3, 7), ids) is None
    assert class_dimension(torch.randn(2, 3, 8), ids.float()) is None


@pytest.fixture(scope="module")
def normed():
    """A network with layer norm, untrained, and its data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    x, y = torch.randn(300, 12), torch.randint(0, 3, (300,))
    return net.eval(), autoprune.Data(*((x[rows], y[rows]) for rows in (slice(150), slice(150, 225), slice(225, 300))))


@pytest.mark.parametrize(("share", "tried"), [(1e9, True), (0.0, False)])
def test_a_layer_database_ranks_units_where_it_is_a_small_part_of_the_search(normed, monkeypatch, share, tried):
    monkeypatch.setattr(checking, "DATABASE_SHARE", share)
    study = study_for(normed[0], "flops <= 60%", normed[1], metric="accuracy")
    (note,) = [note for note in study.notes if note.startswith("calibration check")]
    assert bool(re.search(r"\bobs \d", note)) is tried, note


def test_networks_with_batch_norm_are_not_ranked_by_a_database(case, monkeypatch):
    monkeypatch.setattr(checking, "DATABASE_SHARE", 1e9)
    context = study_for(case[0], "flops <= 70%", case[1], metric="accuracy", evaluator="adaptive_bn").context
    assert checking._by_surgeon(context, context.calibration, 100) == {}


def test_a_resumed_search_ranks_by_the_database_as_the_check_did(normed, monkeypatch):
    monkeypatch.setattr(checking, "DATABASE_SHARE", 1e9)
    context = study_for(normed[0], "flops <= 60%", normed[1], metric="accuracy", evaluator="adaptive_bn").context
    checked = checking._by_surgeon(context, context.calibration, 100)["obs"]
    resumed = checking.ranking(context, "obs", 0, context.calibration)
    assert {name: scores.tolist() for name, scores in checked.items()} == {
        name: scores.tolist() for name, scores in resumed.items()
    }
