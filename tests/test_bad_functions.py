"""Functions, evaluators and results that do not fit: each is named before the first trial."""

import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import autoprune
from autoprune import Channels, Metric, Racing, Rungs
from autoprune.evaluators import AdaptiveBN, Compensated, FineTune, Supernet
from tests.refusals import EIGHTHS, refused, search


class TestFunctionsOfTheUser:
    @pytest.mark.slow
    def test_a_cost_of_the_wrong_shape_is_named(self, mlp):
        with refused(ValueError, "costs['energy_mj'] must return 1 finite numbers", "got shape (1, 3)"):
            search(mlp, costs={"energy_mj": lambda candidates: candidates.indices * 1.0})

    @pytest.mark.slow
    def test_a_cost_that_is_not_finite_is_named(self, mlp):
        with refused(ValueError, "costs['energy_mj'] must return 1 finite numbers"):
            search(mlp, costs={"energy_mj": lambda candidates: np.full(len(candidates), np.nan)})

    @pytest.mark.slow
    def test_a_cost_with_the_name_of_a_built_in_one_is_refused(self, mlp):
        with refused(ValueError, "costs must not redefine", "got 'flops'", "choose another name"):
            search(mlp, costs={"flops": lambda candidates: candidates.indices.sum(axis=1)})

    @pytest.mark.parametrize("name", ["latency", "memory", "throughput", "ms_per_sample"])
    def test_a_cost_with_a_name_that_budgets_take_for_another_is_refused(self, mlp, name):
        with refused(ValueError, f"costs must not hold '{name}'", "call a latency 'latency_ms'"):
            search(mlp, costs={name: lambda candidates: candidates.indices.sum(axis=1)})

    @pytest.mark.parametrize(("costs", "named"), [([len], "costs must be functions"), ({"j": 5}, "costs['j'] must be")])
    def test_costs_that_are_no_functions_are_named(self, mlp, costs, named):
        with refused(ValueError, named, "got "):
            search(mlp, costs=costs)

    @pytest.mark.slow
    def test_a_cost_that_returns_no_numbers_is_named(self, mlp):
        with refused(ValueError, "costs['energy_mj'] must return real numbers, got ['much']"):
            search(mlp, costs={"energy_mj": lambda candidates: ["much"] * len(candidates)})

    @pytest.mark.slow
    def test_a_cost_that_writes_to_its_candidates_changes_nothing(self, mlp):
        def careless(candidates):
            total = 100.0 - candidates.indices.sum(axis=1)
            candidates.indices[:] = 0
            return total

        result = search(mlp, "energy_mj <= 90%", costs={"energy_mj": careless}, trials=6)
        assert all(trial.costs["energy_mj"] == 100 - sum(trial.candidate) <= 90 for trial in result.front)

    @pytest.mark.slow
    @pytest.mark.parametrize("returned", [1.0, torch.tensor(1.0), torch.ones(5), torch.ones(20, 10)])
    def test_a_metric_of_the_wrong_shape_is_named(self, mlp, returned):
        with refused(ValueError, "metric 'mine' must return a tensor of shape", "per_sample=False"):
            search(mlp, metric=Metric(lambda outputs, batch: returned, True, name="mine"))

    @pytest.mark.slow
    def test_a_whole_set_metric_that_returns_no_number_costs_no_trial(self, mlp):
        metric = Metric(lambda forward, batches: torch.ones(3), True, per_sample=False, name="mine")
        with refused(ValueError, "metric 'mine' must return one number", "per_sample=True"):
            search(mlp, metric=metric)

    @pytest.mark.parametrize(
        ("argument", "value", "named"),
        [
            ("forward", lambda model: model, "forward must be a function forward(model, batch), or None, got"),
            ("outputs", lambda: 0, "outputs must be a key, an index, a list of these, a function"),
            ("costs", {"j": lambda: 0}, "costs['j'] must be a function of n candidates giving (n,), got"),
            ("optimizer", lambda problem: problem, "optimizer must be a name, a function of (problem, seed) or"),
        ],
    )
    def test_a_function_of_other_arguments_is_named_with_what_it_takes(self, mlp, argument, value, named):
        with refused((TypeError, ValueError), named, ", which takes ("):
            search(mlp, **{argument: value})

    def test_a_metric_of_other_arguments_is_named(self):
        for options in ({}, {"needs_dense": True}):
            with refused(TypeError, "fn must be a function fn(outputs, batch", "which takes (outputs)"):
                Metric(lambda outputs: outputs, True, **options)

    def test_a_class_that_makes_no_optimizer_is_named(self, mlp):
        with refused(TypeError, "optimizer must be a name,", "got <class 'torch.nn.modules.linear.Linear'>"):
            search(mlp, optimizer=nn.Linear)

    @pytest.mark.slow
    def test_a_criterion_that_returns_no_tensor_is_named(self, mlp):
        with refused(TypeError, "criterion must return a tensor of 48 scores, got None"):
            search(mlp, space=Channels(criterion=lambda group: None))

    @pytest.mark.slow
    def test_a_criterion_of_the_wrong_shape_is_named(self, mlp):
        with refused(ValueError, "criterion must return 48 finite scores for group '0'", "got shape (2,)"):
            search(mlp, space=Channels(criterion=lambda group: torch.ones(2)))


@pytest.mark.parametrize(
    ("make", "name", "value", "rule"),
    [
        (Racing, "delta", "x", "must be a probability between 0 and 1"),
        (Racing, "delta", True, "must be a probability between 0 and 1"),
        (Rungs, "count", True, "must be an integer of at least 2"),
        (Rungs, "reduction", "3", "must be a number above 1"),
        (FineTune, "steps", True, "must be an integer of at least 1"),
        (FineTune, "lr", "x", "must be positive"),
        (FineTune, "lr", math.inf, "must be positive"),
        (FineTune, "train_fn", lambda model: model, "must be a function train_fn(model, steps), or None"),
        (Supernet, "steps", "x", "must be an integer of at least 1"),
        (Supernet, "lr", None, "must be positive"),
        (Supernet, "loss", 5, "must be a function loss(outputs, batch), or None"),
        (Supernet, "optimizer", lambda: 0, "must be a function optimizer(parameters), or None"),
        (Compensated, "ridge", "x", "must be positive, a share of the mean square of inputs, or None"),
        (Compensated, "bias", "no", "must be True or False"),
        (Compensated, "memory_bytes", 2.5, "must be an integer of at least 0"),
        (AdaptiveBN, "share_bytes", "x", "must be an integer of at least 0, which shares nothing"),
    ],
)
def test_what_a_setting_of_an_evaluator_or_a_race_is_not_is_named(make, name, value, rule):
    with refused((TypeError, ValueError), f"{name} {rule}", "got "):
        make(**{name: value})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"train_fn": 5}, "train_fn must be a function train_fn(model), got 5"),
        ({"train_fn": lambda model: None, "steps": 5}, "train_fn must be a function train_fn(model, steps), got"),
        ({"k": True}, "k must be an integer of at least 4, got True"),
        ({"repeats": 1.5}, "repeats must be an integer of at least 0, got 1.5"),
        ({"seed": 2**64}, "seed must be an integer of at most"),
        ({"steps": 0}, "train_fn must be a function train_fn(model, steps)"),
        ({"evaluators": "adaptive_bn"}, "evaluators must be a list of names or evaluators, got 'adaptive_bn'"),
        ({"initialise": 5}, "initialise must be a function initialise(model), or None, got 5"),
    ],
)
def test_what_an_audit_cannot_use_is_named(mlp, options, named):
    with refused((TypeError, ValueError), named):
        autoprune.audit(search(mlp), **{"train_fn": lambda model: None, **options})


@pytest.mark.slow
def test_nothing_is_evaluated_before_a_mistake_is_found(mlp):
    class Untouched(AdaptiveBN):
        def evaluate(self, candidates, chunk=None):
            pytest.fail("evaluated a candidate")

    for options in ({"budget": "flops <= 1%"}, {"start": [[9, 9, 9]]}, {"metric": "bset"}, {"costs": {"flops": len}}):
        with pytest.raises(ValueError, match="must"):
            search(mlp, evaluator=Untouched(), space=EIGHTHS, **options)


@pytest.mark.slow
def test_a_trial_of_a_result_without_its_model_says_how_to_build_it(mlp):
    alone = replace(search(mlp), _builder=None)
    with refused(autoprune.FileFormatError, "build needs the model", "SearchResult.load(path, model=model)"):
        alone.build()


@pytest.mark.slow
def test_an_evaluator_that_cannot_be_copied_is_named(mlp):
    evaluator = AdaptiveBN()
    evaluator.lock = threading.Lock()
    with refused(TypeError, "evaluator must be something that can be copied", "AdaptiveBN cannot", "__deepcopy__"):
        search(mlp, evaluator=evaluator)
