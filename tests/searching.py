"""Short searches, and what their results must satisfy."""

from dataclasses import fields, replace

import pytest

import autoprune
from autoprune.evaluators import AdaptiveBN
from autoprune.protocols import OK
from tests.oracle import count_macs, count_params

GROUPS = {
    "example": (autoprune.Call, "inputs"),
    "start": (autoprune.Start, "candidates"),
    "execution": (autoprune.Execution, "executor"),
}


def grouped(**options):
    """Arguments of `autoprune.search` from these with its groups taken apart, so that tests can set each for itself."""
    for name, (group, main) in GROUPS.items():
        own = {field.name: options.pop(field.name) for field in fields(group) if field.name in options}
        given = options.get(name)
        if own and isinstance(given, group):
            options[name] = replace(given, **own)
        elif own:
            options[name] = group(**({main: given} if name in options else {}), **own)
    return options


def quick(model, budget, *args, trials=4, **options):
    return autoprune.search(model, budget, *args, trials=trials, **grouped(**options))


def seen(result):
    """Parts of a result that two searches must agree on."""
    return [(t.candidate, t.score, t.signal, t.test_score) for t in result.trials], [t.id for t in result.front]


def dominating(result, trial):
    """Feasible trials that dominate `trial` by definition: the score, ties by the signal, and every limited cost."""
    sign = -1 if result.higher_is_better else 1

    def measures(t):
        return [(sign * t.score, t.signal), *(t.costs[name] for name in result.limits)]

    mine = measures(trial)
    rest = [(measures(t), t.id) for t in result.trials if t.status == OK and t.feasible]
    return [i for other, i in rest if other != mine and all(a <= b for a, b in zip(other, mine, strict=True))]


def undominated(result):
    """Ids of what must be on the front."""
    return {trial.id for trial in result.trials if trial.feasible and not dominating(result, trial)}


def assert_costs_are_exact(result, inputs):
    for trial in result.trials:
        built = result.build(trial).eval()
        assert trial.costs["flops"] == count_macs(built, tuple(x[:1] for x in inputs))
        assert trial.costs["params"] == count_params(built)


def assert_within_the_limits_or_probes(result, probes):
    """Every trial meets all limits or is a probe; whether there are `probes` is known."""
    for trial in result.trials:
        assert trial.feasible == all(trial.costs[name] <= limit for name, limit in result.limits.items())
        assert trial.feasible or sum(option > 0 for option in trial.candidate) == 1
    assert all(trial.feasible for trial in (*result.front, result.best()))
    assert probes == (not all(trial.feasible for trial in result.trials))


WITH_AND_WITHOUT_PROBES = pytest.mark.parametrize(("optimizer", "probes"), [("auto", True), ("nsga2", False)])


class Watched:
    """Adaptive batch norm that first calls ``before(calls so far)``, and hands outputs through ``fault``."""

    def __init__(self, before=None, fault=None):
        self.inner, self.before, self.fault = AdaptiveBN(), before, fault
        self.candidates, self.tests = [], 0

    def prepare(self, context):
        if self.fault is not None:
            run = context.forward
            context = replace(context, forward=lambda model, batch: self.fault(model, run(model, batch)))
        self.inner.prepare(context)

    def evaluate(self, candidates, chunk=None):
        if self.before is not None:
            self.before(len(self.candidates))
        self.candidates += candidates.tolist()
        return self.inner.evaluate(candidates, chunk)

    def build(self, candidate):
        return self.inner.build(candidate)

    def test(self, candidate):
        self.tests += 1
        return self.inner.test(candidate)
