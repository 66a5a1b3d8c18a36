"""Mistakes that were accepted silently, or ended deep inside, raise with the argument and the way out."""

import itertools

import numpy as np
import pytest
from torch import nn

import autoprune
from autoprune import Budget, Metric
from tests.refusals import refused, search

CALLS = itertools.count(1)


@pytest.mark.parametrize("text", ["FLOPs <= 50%", "FLOPS <= 50%", "macs <= 50%", "MACs <= 50%"])
def test_flops_are_known_however_they_are_spelled(text):
    assert str(Budget.parse(text)) == "flops <= 50%"


@pytest.mark.parametrize("budget", ["params <= 1__0", {"flops": 0.5}, {}, "x" * 10**5])
def test_a_budget_that_cannot_be_read_is_shown_in_part(budget):
    with refused(autoprune.BudgetError, "write 'flops <= 50%'") as raised:
        Budget.parse(budget)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"higher_is_better": "lower"}, "higher_is_better must be True or False, got 'lower'"),
        ({"higher_is_better": True, "per_sample": 1}, "per_sample must be True or False, got 1"),
        ({"higher_is_better": True, "name": 5}, "name must be text, got 5"),
        ({"higher_is_better": True, "fn": 5}, "fn must be a function"),
    ],
)
def test_what_a_metric_is_not_made_of_is_named(settings, named):
    with refused((TypeError, ValueError), named):
        Metric(**{"fn": len, **settings})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"metric": nn.CrossEntropyLoss}, "such as CrossEntropyLoss(), got <class"),
        ({"metric": Metric(lambda o, b: o[:, 0] + 1j, True, name="mine")}, "metric 'mine' must return a tensor"),
        (
            {"metric": Metric(lambda f, b: np.complex128(1j), True, False, "mine")},
            "metric 'mine' must return one number",
        ),
        ({"costs": {"j": lambda c: c.indices.sum(1) + 1j}}, "costs['j'] must return real numbers, got"),
        ({"costs": {"j": lambda c: ["1"] * len(c)}}, "costs['j'] must return real numbers, got"),
        (
            {"costs": {"j": lambda c: c.indices.sum(1) + float(next(CALLS))}},
            "the same for the same candidate",
        ),
        ({"costs": {"j": lambda c: np.full(len(c), float(len(c)))}}, "the same for the same candidate"),
    ],
)
def test_metrics_and_costs_that_are_none_are_refused(mlp, options, named):
    with refused((TypeError, ValueError), named):
        search(mlp, **options)


def test_what_is_no_result_or_recipe_is_named():
    with refused(TypeError, "result must be what autoprune.search returned, got None"):
        autoprune.audit(None, print)
