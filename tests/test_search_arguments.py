"""Data that scores are from, the start of a search, and its optimizers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autoprune import Channels, Data, Metric
from autoprune.evaluators import Compensated
from tests.searching import quick, seen
from zoo import ZOO


def margin(outputs, batch):
    return outputs.gather(1, batch[1][:, None]).squeeze(1)


def worst_class(forward, batches):
    outputs = torch.cat([forward(batch) for batch in batches])
    return (outputs.argmax(1) == torch.cat([batch[1] for batch in batches])).float().mean() - 1


SMOOTHED = nn.CrossEntropyLoss(label_smoothing=0.1)
METRICS = [
    ("auto", "accuracy", True, lambda out, x, y: (out.argmax(1) == y).double().mean()),
    ("accuracy", "accuracy", True, lambda out, x, y: (out.argmax(1) == y).double().mean()),
    (F.cross_entropy, "cross_entropy", False, lambda out, x, y: F.cross_entropy(out, y)),
    (SMOOTHED, "CrossEntropyLoss", False, lambda out, x, y: SMOOTHED(out, y)),
    (Metric(margin, higher_is_better=True), "margin", True, lambda out, x, y: margin(out, (x, y)).mean()),
    (Metric(worst_class, True, per_sample=False, name="minus_error"), "minus_error", True, None),
    ("agreement", "agreement", True, None),
]


class TestMetrics:
    @pytest.mark.slow
    @pytest.mark.parametrize(("metric", "name", "higher", "expected"), METRICS, ids=[m[1] for m in METRICS])
    def test_the_score_is_the_metric_of_the_built_model(self, mlp, vectors, metric, name, higher, expected):
        x, y = vectors
        data = Data(calibration=(x[:60], y[:60]), validation=(x[60:160], y[60:160]), test=(x[160:], y[160:]))
        result = quick(mlp, "flops <= 50%", data, metric=metric, trials=8)
        assert (result.metric, result.higher_is_better) == (name, higher)
        dense = mlp(x).argmax(1)
        by_hand = {
            "agreement": lambda out, part: (out.argmax(1) == dense[part]).double().mean(),
            "minus_error": lambda out, part: (out.argmax(1) == y[part]).double().mean() - 1,
        }
        for trial in result.front:
            built = result.build(trial)
            for part, score in ((slice(60, 160), trial.score), (slice(160, 240), trial.test_score)):
                with torch.no_grad():
                    out = built(x[part])
                    value = by_hand[name](out, part) if name in by_hand else expected(out, x[part], y[part])
                assert score == pytest.approx(float(value), abs=1e-5)
        assert result.best().score == (max if higher else min)(trial.score for trial in result.trials if trial.feasible)
        assert result.front[-1].score == result.best().score

    @pytest.mark.slow
    def test_a_metric_of_the_whole_set_has_no_interval(self, mlp, vectors):
        metric = Metric(worst_class, higher_is_better=True, per_sample=False)
        result = quick(mlp, "flops <= 50%", vectors, metric=metric)
        assert all(math.isnan(end) for trial in result.trials for end in trial.interval)
        assert all(trial.signal == -trial.score for trial in result.trials)

    @pytest.mark.slow
    def test_without_labels_agreement_with_the_dense_model_is_scored(self, mlp, vectors):
        result = quick(mlp, "flops <= 50%", vectors[0])
        assert result.metric == "agreement"
        assert result.dense.score == 1.0
        assert any("labels are missing" in note for note in result.notes)

    @pytest.mark.slow
    def test_without_data_random_inputs_stand_in_and_the_result_says_so(self, mlp):
        result = quick(mlp, "flops <= 50%", example=torch.randn(2, 64))
        assert result.metric == "agreement"
        assert any("no data given: 256 random inputs" in note for note in result.notes)
        assert result.trials[0].evaluations[0].samples == 256


class TestData:
    @pytest.mark.slow
    def test_loaders_arrays_and_dictionaries_score_the_same(self, mlp, vectors):
        x, y = vectors
        parts = {"calibration": slice(0, 80), "validation": slice(80, 160), "test": slice(160, 240)}

        def search(source):
            data = Data(**{name: source(x[part], y[part]) for name, part in parts.items()})
            evaluator = Compensated(ridge=0.01)  # one chosen on held-out rows depends on the order of the samples
            return quick(mlp, "flops <= 50%", data, evaluator=evaluator)

        arrays = search(lambda a, b: (a.numpy(), b.numpy()))
        loaders = search(lambda a, b: DataLoader(TensorDataset(a, b), batch_size=80))
        mappings = search(lambda a, b: [{"input": a, "labels": b}])
        for other in (loaders, mappings):
            assert [t.candidate for t in other.trials] == [t.candidate for t in arrays.trials]
            assert [t.score for t in other.trials] == [t.score for t in arrays.trials]
            assert [t.signal for t in other.trials] == pytest.approx([t.signal for t in arrays.trials], rel=1e-5)

    @pytest.mark.slow
    def test_data_set_aside_is_noted(self, mlp, vectors):
        notes = quick(mlp, "flops <= 50%", vectors).notes
        assert any("no calibration data given: 48 of 240" in note for note in notes)
        assert any("no test data given: 96 of 240" in note for note in notes)

    @pytest.mark.slow
    def test_forward_says_how_to_run_the_model(self, mlp, vectors):
        x, y = vectors
        data = Data(calibration=(x, y), validation=(x[:100], y[:100]), test=(x[100:], y[100:]))
        result = quick(mlp, "flops <= 50%", data, forward=lambda model, batch: model(batch[0] * 2))
        correct = (result.build()(x[:100] * 2).argmax(1) == y[:100]).double().mean().item()
        assert result.best().score == pytest.approx(correct)

    @pytest.mark.slow
    def test_outputs_say_which_outputs_matter(self):
        images = torch.randn(48, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        model = ZOO["detector"].build()
        by_key = quick(model, "flops <= 50%", images, outputs="boxes")
        by_function = quick(model, "flops <= 50%", images, outputs=lambda made: made["boxes"])
        several = quick(model, "flops <= 50%", images, outputs=["boxes", "scores"])
        assert by_key.metric == "relative_error"
        assert seen(by_key) == seen(by_function)
        assert len(several.trials) == 4


class TestStart:
    @pytest.mark.slow
    def test_widths_come_first(self, mlp, vectors):
        widths = {"0": 12, "3": 8, "6": 9}
        for start in ([widths], widths):
            assert quick(mlp, "flops <= 50%", vectors, start=start).trials[0].decoded == widths

    @pytest.mark.slow
    def test_dimensions_that_are_not_named_stay_dense(self, mlp, vectors):
        assert quick(mlp, "flops <= 60%", vectors, start=[{"0": 12}]).trials[0].decoded == {"0": 12, "3": 32, "6": 24}

    @pytest.mark.slow
    @pytest.mark.parametrize("as_list", [True, False])
    def test_a_result_gives_its_front(self, mlp, vectors, as_list):
        first = quick(mlp, "flops <= 50%", vectors, trials=20)
        second = quick(mlp, "flops <= 50%", vectors, trials=20, start=[first] if as_list else first, seed=1)
        assert [t.candidate for t in second.trials[: len(first.front)]] == [t.candidate for t in first.front]

    @pytest.mark.slow
    def test_what_is_over_the_budget_is_brought_within(self, mlp, vectors):
        result = quick(mlp, "flops <= 20%", vectors, start=[(0, 0, 0), (1, 2, 3)], optimizer="nsga2")
        assert all(trial.costs["flops"] <= result.limits["flops"] for trial in result.trials)


@pytest.mark.slow
def test_ignored_layers_keep_their_units(mlp, vectors):
    result = quick(mlp, "flops <= 70%", vectors, space=Channels(ignore=["0"], step=4))
    for trial in result.trials:
        built = result.build(trial)
        assert built[0].out_features == 48
        assert built[3].out_features < 32
        assert built[3].out_features % 4 == built[6].out_features % 4 == 0


@pytest.mark.slow
def test_optimizers_are_named_classes_functions_or_instances(mlp, vectors):
    from autoprune.optimizers import RandomSearch

    named = quick(mlp, "flops <= 50%", vectors, trials=10, optimizer="random")
    made = quick(mlp, "flops <= 50%", vectors, trials=10, optimizer=lambda problem, seed: RandomSearch(problem, seed))
    assert seen(quick(mlp, "flops <= 50%", vectors, trials=10, optimizer=RandomSearch)) == seen(named) == seen(made)
