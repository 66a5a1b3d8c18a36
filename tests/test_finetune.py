"""Fine-tuning as a score: what it trains, what it leaves alone, and that it repeats."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune.evaluators import AdaptiveBN, Compensated, FineTune
from autoprune.protocols import Failure, Measurement
from autoprune.testing.contracts import EvaluatorContract
from tests.contexts import classes_context, halved, prepared, regression_context, study_of
from tests.user_functions import raise_out_of_memory, shrink
from zoo import ZOO


@pytest.fixture(scope="module")
def context():
    return classes_context("mlp", "adaptive_bn")


@pytest.mark.parametrize("name", ["tied", "mlp"], scope="class")
class TestFineTune(EvaluatorContract):
    @pytest.fixture(autouse=True)
    def _network(self, name):
        self.name = name

    def make_evaluator(self):
        return FineTune(steps=2)

    def make_context(self):
        return classes_context(self.name, "adaptive_bn")


class TestFineTuneByARecipeOfTheUsers(EvaluatorContract):
    def make_evaluator(self):
        return FineTune(steps=2, train_fn=shrink, start=Compensated())

    def make_context(self):
        return classes_context("mlp", "adaptive_bn")


class TestFineTuneOnKeywordsFloatsAndAMetricOfTheWholeSet(EvaluatorContract):
    def make_evaluator(self):
        return FineTune(steps=2)

    def make_context(self):
        return regression_context("adaptive_bn")

    def test_chunks_of_the_validation_batches_join_up_to_the_whole(self):
        """A metric of the whole set has no chunks."""


@pytest.mark.slow
def test_training_brings_a_candidate_nearer_to_the_dense_model(digits, digits_model):
    data = autoprune.Data(calibration=digits.train, validation=digits.validation, test=digits.test)
    study = study_of(digits_model, data, metric="accuracy", evaluator="adaptive_bn")
    candidate = halved(study.context)
    (before,) = study.evaluator.evaluate(candidate[None])
    (after,) = prepared(FineTune(steps=20), study.context).evaluate(candidate[None])
    assert after.distortion.mean() < 0.7 * before.distortion.mean()
    assert after.signal.mean() < 0.7 * before.signal.mean()


@pytest.mark.slow
def test_it_learns_from_the_dense_model_where_there_are_no_labels():
    images = torch.randn(120, 64, generator=torch.Generator().manual_seed(0))
    study = study_of(ZOO["mlp"].build(), images, evaluator="adaptive_bn")
    candidate = halved(study.context)
    (before,) = study.evaluator.evaluate(candidate[None])
    (after,) = prepared(FineTune(steps=30, lr=0.01, start=AdaptiveBN()), study.context).evaluate(candidate[None])
    assert after.signal.mean() < before.signal.mean()


@pytest.mark.slow
def test_the_recipe_of_the_user_gets_the_budget_and_what_the_start_built(context):
    candidate, seen = halved(context), []
    start = Compensated()
    evaluator = FineTune(steps=7, start=start, train_fn=lambda model, steps: seen.append((steps, model)))
    prepared(evaluator, context).evaluate(candidate[None])
    ((steps, model),) = seen
    assert steps == 7
    for name, tensor in start.build(candidate).named_parameters():
        assert torch.equal(model.get_parameter(name), tensor), name


class TestFineTuneByARecovery(EvaluatorContract):
    def make_evaluator(self):
        return FineTune(steps=2, train_fn=autoprune.Recovery(train="lora", distill="inner", ema=0.5))

    def make_context(self):
        return classes_context("mlp", "adaptive_bn")


def test_a_recovery_goes_on_from_where_it_was_scored_and_learns_from_samples_of_its_own(context):
    recipe = autoprune.Recovery(data=(torch.randn(40, 64), torch.arange(40) % 4), batch_size=8)
    whole, parts = (prepared(FineTune(steps=5, train_fn=recipe), context) for _ in range(2))
    candidate = halved(context)
    (expected,) = whole.evaluate(candidate[None])
    parts.on_the_way(candidate, 2)
    assert parts.continues
    (found,) = parts.evaluate(candidate[None])
    np.testing.assert_array_equal(found.signal, expected.signal)
    (other,) = prepared(FineTune(steps=5), context).evaluate(candidate[None])
    assert not np.array_equal(other.signal, expected.signal)


def test_nested_networks_and_checkpoints_are_for_one_model():
    with pytest.raises(ValueError, match="without steps_to= and checkpoint="):
        FineTune(train_fn=autoprune.Recovery(checkpoint="state.safetensors"))


@pytest.mark.slow
def test_chunks_tests_and_builds_of_one_candidate_share_a_training(context):
    calls = []
    evaluator = prepared(FineTune(steps=1, train_fn=lambda model, steps: calls.append(steps)), context)
    first, second = halved(context), np.ones_like(halved(context))
    evaluator.evaluate(first[None], slice(0, 1))
    evaluator.evaluate(first[None], slice(1, None))
    evaluator.test(first)
    built = evaluator.build(first)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.zero_()
    assert any(parameter.any() for parameter in evaluator.build(first).parameters())
    assert len(calls) == 1
    evaluator.evaluate(second[None])
    assert len(calls) == 2


@pytest.mark.slow
def test_elements_set_to_zero_stay_zero():
    data = torch.randn(120, 64), torch.arange(120) % 4
    context = study_of(ZOO["mlp"].build(), data, space="sparsity", evaluator="adaptive_bn").context
    candidate = halved(context)
    zeroed = context.structure.edit(context.space.pruning(candidate.tolist())).zeroed
    assert zeroed
    for settings in ({}, {"train_fn": shrink}):
        built = prepared(FineTune(steps=3, **settings), context).build(candidate)
        for name, count in zeroed.items():
            assert int((built.get_parameter(name) == 0).sum()) == count


def test_modes_and_gradients_of_what_is_built_are_those_of_the_model(context):
    built = prepared(FineTune(steps=2), context).build(halved(context))
    assert not any(module.training for module in built.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in built.parameters())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(raise_out_of_memory, "OutOfMemoryError"), (lambda model: model[0].weight.data.fill_(torch.nan), "NaN")],
)
def test_a_training_that_fails_is_a_failure_and_the_next_goes_on(context, fault, reason):
    def train(model: nn.Module, steps: int) -> None:
        if model[0].out_features < 40:
            fault(model)

    candidate = np.zeros((2, len(context.space.sizes)), dtype=np.int64)
    candidate[:, 0] = context.space.sizes[0] - 1, 1
    failed, fine = prepared(FineTune(steps=1, train_fn=train), context).evaluate(candidate)
    assert isinstance(failed, Failure)
    assert reason in failed.reason
    assert isinstance(fine, Measurement)


@pytest.mark.parametrize(("settings", "message"), [({"steps": 0}, "steps must be"), ({"lr": 0}, "lr must be")])
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FineTune(**settings)


@pytest.mark.slow
def test_a_model_without_anything_to_train_is_refused():
    context = classes_context("mlp", "adaptive_bn")
    context.model.requires_grad_(False)
    with pytest.raises(ValueError, match="none requires gradients"):
        prepared(FineTune(), context)


def test_a_search_with_another_training_is_another_search():
    settings = ({}, {"steps": 51}, {"lr": 0.002}, {"seed": 1})
    assert len({FineTune(**one).identity for one in settings}) == len(settings)


def test_it_asks_for_a_recipe_where_there_is_nothing_to_learn(context):
    judge = replace(context.judge, distance=None, proportion=None)
    with pytest.raises(ValueError, match="train_fn"):
        prepared(FineTune(), replace(context, judge=judge))


@pytest.mark.slow
def test_it_starts_from_what_the_default_evaluator_builds(context):
    seen, start = [], Compensated()
    start.prepare(context)
    evaluator = prepared(FineTune(steps=1, train_fn=lambda model, steps: seen.append(model.state_dict())), context)
    evaluator.build(halved(context))
    for name, tensor in start.build(halved(context)).named_parameters():
        assert torch.equal(seen[0][name], tensor), name
