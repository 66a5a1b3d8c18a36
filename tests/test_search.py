"""One real search judged by independent counts and definitions, and what can happen to a search."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autoprune
from autoprune import Channels, Data, Metric
from autoprune.evaluators import AdaptiveBN
from autoprune.execution import LocalExecutor
from autoprune.journal import Journal
from autoprune.protocols import FAILED, OK
from autoprune.result.trials import find_front
from tests.oracle import count_macs, count_params
from tests.zoo import ZOO

TRIALS = 40
EIGHTHS = Channels(step=0.125, min_fraction=0.125)


@pytest.fixture(scope="module")
def data(digits):
    return Data(calibration=digits.train, validation=digits.validation, test=digits.test)


@pytest.fixture(scope="module")
def found(digits_model, data):
    return autoprune.search(digits_model, "flops <= 50%", data, trials=TRIALS, progress=False)


@pytest.fixture(scope="module")
def vectors():
    """Features (240, 64) with labels that the first ten of them tell."""
    x = torch.randn(240, 64, generator=torch.Generator().manual_seed(0))
    return x, x[:, :10].argmax(1)


@pytest.fixture
def mlp():
    return ZOO["mlp"].build()


def quick(model, budget, *args, trials=4, **options):
    return autoprune.search(model, budget, *args, trials=trials, progress=False, **options)


def seen(result):
    """What two searches must agree on."""
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


class TestOneSearch:
    def test_the_number_of_trials_is_what_was_asked_for(self, found):
        assert found.stopped == "trials"
        assert [trial.id for trial in found.trials] == list(range(TRIALS))
        assert len({trial.candidate for trial in found.trials}) == TRIALS

    def test_every_trial_is_within_the_budget_or_a_probe_when_counted_on_the_built_model(
        self, found, digits, digits_model
    ):
        image = digits.validation[0][:1]
        limit = count_macs(digits_model, (image,)) / 2
        assert found.limits == {"flops": limit}
        assert_costs_are_exact(found, (image,))
        assert_within_the_limits_or_probes(found, probes=True)

    def test_an_optimizer_without_probes_keeps_every_trial_within_the_budget(self, digits_model, digits, data):
        result = quick(digits_model, "flops <= 50%", data, trials=24, optimizer="nsga2")
        assert_costs_are_exact(result, (digits.validation[0][:1],))
        assert_within_the_limits_or_probes(result, probes=False)

    def test_costs_of_the_dense_model_are_those_counted(self, found, digits, digits_model):
        assert found.dense.costs["flops"] == count_macs(digits_model, (digits.validation[0][:1],))
        assert found.dense.costs["params"] == count_params(digits_model)

    def test_the_front_is_what_no_trial_dominates(self, found):
        on_front = {trial.id for trial in found.front}
        assert on_front == undominated(found)
        assert 1 < len(on_front) < sum(trial.feasible for trial in found.trials)

    def test_the_front_is_sorted_by_cost_and_so_by_score(self, found):
        costs = [trial.costs["flops"] for trial in found.front]
        scores = [trial.score for trial in found.front]
        assert costs == sorted(costs)
        assert scores == sorted(scores)

    def test_scores_on_held_out_data_are_on_the_front_only(self, found):
        on_front = {trial.id for trial in found.front}
        assert {trial.id for trial in found.trials if trial.test_score is not None} == on_front

    def test_scores_are_those_of_the_built_models(self, found, digits):
        for trial in (*found.front, found.dense):
            built = found.build(trial)
            for (images, labels), score in ((digits.validation, trial.score), (digits.test, trial.test_score)):
                with torch.no_grad():
                    correct = built(images).argmax(1) == labels
                assert correct.double().mean().item() == pytest.approx(score, abs=1e-12)

    def test_the_search_finds_more_than_random_weights_would(self, found):
        assert found.best().score > 0.6
        assert found.dense.score > 0.95

    def test_it_says_what_it_decided(self, found):
        notes = " ".join(found.notes)
        assert "6 groups of 112 units" in notes
        assert "accuracy" in notes


class Branchy(nn.Module):
    """Writes to a buffer and to itself in forward, drops out, and keeps a hook and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.net, self.drop = ZOO["mlp"].build(), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))
        self.net[0].requires_grad_(False)
        self.net[3].register_forward_hook(lambda module, args, out: None)
        self.runs = 0

    def forward(self, x):
        self.calls += 1
        self.runs += 1
        return self.drop(self.net(x))


@pytest.mark.parametrize("criterion", ["l2", "taylor", "fluctuation"])
def test_the_model_and_the_random_states_come_back_untouched(vectors, criterion, global_rng_untouched):
    model = Branchy().train()
    model.net[1].eval()
    model(vectors[0]).sum().backward()
    tensors = {**model.state_dict(keep_vars=True), **{f"{n}.grad": p.grad for n, p in model.named_parameters()}}
    values = {name: None if tensor is None else tensor.detach().clone() for name, tensor in tensors.items()}

    def state():
        flags = [(name, id(t), t.requires_grad, t.device) for name, t in model.state_dict(keep_vars=True).items()]
        modules = [(name, id(m), m.training, list(m._forward_hooks.values())) for name, m in model.named_modules()]
        return flags, modules, [id(p.grad) for p in model.parameters()], model.runs

    before = state()
    with global_rng_untouched():
        quick(model, "flops <= 50%", vectors, space=Channels(criterion=criterion), metric="agreement").build()
    assert state() == before
    for name, value in values.items():
        assert value is None or torch.equal(tensors[name], value), name


def test_what_is_built_has_the_modes_and_flags_of_the_model(vectors):
    model = Branchy().train()
    model.net[1].eval()
    built = quick(model, "flops <= 50%", vectors).build()
    assert [m.training for m in built.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in built.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("limits", [("flops",), ("flops", "params")])
def test_equal_scores_are_told_apart_by_the_signal_on_the_front(found, limits, higher):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 5, size=(TRIALS, 4)).tolist()
    trials = tuple(
        replace(trial, score=row[0] / 4, signal=float(row[1]), costs={"flops": row[2], "params": row[3]})
        for trial, row in zip(found.trials, rows, strict=True)
    )
    made = replace(found, trials=trials, limits=dict.fromkeys(limits, 9.0), higher_is_better=higher)
    front = find_front(trials, limits, higher)
    assert {trial.id for trial in front} == undominated(made)


@WITH_AND_WITHOUT_PROBES
def test_no_candidate_over_the_budget_is_evaluated_but_probes(mlp, vectors, optimizer, probes):
    evaluator = Watched()
    result = quick(mlp, "flops <= 30%", vectors, trials=30, evaluator=evaluator, optimizer=optimizer)
    dense, *evaluated = evaluator.candidates
    assert dense == [0, 0, 0]
    assert [tuple(candidate) for candidate in evaluated] == [trial.candidate for trial in result.trials]
    assert [t.feasible for t in result.trials] == [
        count_macs(result.build(t), (vectors[0][:1],)) <= 0.3 * 5616 for t in result.trials
    ]
    assert_within_the_limits_or_probes(result, probes)


@WITH_AND_WITHOUT_PROBES
def test_two_limits_hold_together_and_span_the_front(digits_model, digits, data, optimizer, probes):
    result = quick(digits_model, ["flops <= 60%", "params <= 40%"], data, trials=24, optimizer=optimizer)
    assert list(result.limits) == ["flops", "params"]
    assert_costs_are_exact(result, (digits.validation[0],))
    assert_within_the_limits_or_probes(result, probes)
    assert {trial.id for trial in result.front} == undominated(result)


@WITH_AND_WITHOUT_PROBES
def test_memory_is_a_budget(digits_model, data, optimizer, probes):
    result = quick(digits_model, "memory_bytes <= 45KB", data, trials=12, cost_batch=2, optimizer=optimizer)
    assert result.limits == {"memory_bytes": 45_000}
    for trial in result.trials:
        state = sum(t.numel() * t.element_size() for t in result.build(trial).state_dict().values())
        assert state < trial.costs["memory_bytes"]
    assert_within_the_limits_or_probes(result, probes)


@WITH_AND_WITHOUT_PROBES
def test_a_cost_of_the_users_that_is_a_staircase_is_a_budget(mlp, vectors, optimizer, probes):
    def energy(candidates):
        return 2.5 * np.ceil((24 - candidates.sum(axis=1)) / 3)

    options = {"space": EIGHTHS, "costs": {"energy_mj": energy}, "optimizer": optimizer}
    result = quick(mlp, "energy_mj <= 50%", vectors, trials=20, **options)
    assert result.limits == {"energy_mj": 10.0}
    for trial in result.trials:
        assert trial.costs["energy_mj"] == 2.5 * math.ceil((24 - sum(trial.candidate)) / 3)
    assert_within_the_limits_or_probes(result, probes)
    assert {trial.id for trial in result.front} == undominated(result)


@pytest.mark.parametrize("optimizer", ["auto", "nsga2", "knapsack", "level_switch"])
def test_a_cost_that_is_zero_for_the_dense_model_is_a_budget(mlp, vectors, tmp_path, optimizer):
    waste = {"waste": lambda candidates: (candidates % 3).sum(axis=1)}
    result = quick(mlp, "waste <= 3", vectors, trials=20, costs=waste, optimizer=optimizer)
    assert all(trial.costs["waste"] <= 3 for trial in result.trials)
    assert "waste" in str(result)
    result.plot(tmp_path / "front.png")


def test_the_same_seed_gives_the_same_search_and_another_seed_another(mlp, vectors):
    first, again, other = (quick(mlp, "flops <= 50%", vectors, trials=30, seed=seed) for seed in (3, 3, 4))
    assert seen(again) == seen(first)
    assert [trial.candidate for trial in other.trials] != [trial.candidate for trial in first.trials]


_IN_ANOTHER_PROCESS = """
import json, torch
torch.set_num_threads(1)
import autoprune
from tests.test_search import quick, seen, ZOO
x = torch.randn(240, 64, generator=torch.Generator().manual_seed(0))
print(json.dumps(seen(quick(ZOO["mlp"].build(), "flops <= 50%", (x, x[:, :10].argmax(1)), trials=40))))
"""


@pytest.mark.slow
def test_another_process_finds_the_same_front(mlp, vectors):
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    ran = subprocess.run(
        [sys.executable, "-c", _IN_ANOTHER_PROCESS], capture_output=True, text=True, check=True, env=environment
    )
    here = seen(quick(mlp, "flops <= 50%", vectors, trials=40))
    assert json.loads(ran.stdout) == json.loads(json.dumps(here))


class TestStopping:
    def test_max_seconds_ends_the_search_early(self, digits_model, data):
        result = quick(digits_model, "flops <= 50%", data, trials=100_000, max_seconds=1.0)
        assert result.stopped == "time"
        assert len(result.trials) < 5_000

    @WITH_AND_WITHOUT_PROBES
    def test_a_small_space_is_exhausted(self, mlp, vectors, optimizer, probes):
        halves = Channels(options=(1.0, 0.5))
        result = quick(mlp, "flops <= 60%", vectors, trials=100, space=halves, optimizer=optimizer)
        assert result.stopped == "exhausted"
        dims = [(a, b, c) for a in (48, 24) for b in (32, 16) for c in (24, 12)]
        macs = {w: 64 * w[0] + w[0] * w[1] + w[1] * w[2] + w[2] * 10 for w in dims}
        within = {widths for widths, cost in macs.items() if cost <= 0.6 * macs[dims[0]]}
        assert {tuple(trial.decoded.values()) for trial in result.trials if trial.feasible} == within
        assert_within_the_limits_or_probes(result, probes)

    def test_an_interrupt_returns_the_front_so_far(self, mlp, vectors, tmp_path):
        def interrupt_the_fifth(calls):
            if calls == 4:
                raise KeyboardInterrupt

        evaluator = Watched(before=interrupt_the_fifth)
        result = quick(mlp, "flops <= 50%", vectors, trials=20, evaluator=evaluator, run_dir=tmp_path)
        assert result.stopped == "interrupted"
        assert len(result.trials) == 3  # the first evaluation was the dense model
        assert {trial.id for trial in result.front} == undominated(result)
        assert count_macs(result.build(), (vectors[0][:1],)) == result.best().costs["flops"]
        journal = Journal.open(tmp_path)
        assert sorted(row.status for row in journal.trials()) == [OK] * 3 + ["pending"] * 5
        journal.close()

    def test_an_interrupt_while_the_front_is_tested_keeps_the_result(self, mlp, vectors, monkeypatch):
        evaluator = Watched()
        test = evaluator.test

        def interrupted(candidate):
            if evaluator.tests == 2:
                raise KeyboardInterrupt
            return test(candidate)

        monkeypatch.setattr(evaluator, "test", interrupted)
        result = quick(mlp, "flops <= 50%", vectors, trials=30, evaluator=evaluator)
        assert result.stopped == "interrupted"
        assert len(result.trials) == 30
        assert [trial.test_score is None for trial in result.front] == [False] + [True] * (len(result.front) - 1)

    def test_an_error_outside_of_candidates_is_raised_and_the_journal_keeps_the_trials(self, mlp, vectors, tmp_path):
        class Broken(LocalExecutor):
            def gather(self):
                if len(self._queue) == 5:
                    raise OSError("the node is gone")
                return super().gather()

        with pytest.raises(OSError, match="the node is gone"):
            quick(mlp, "flops <= 50%", vectors, trials=20, executor=Broken(), run_dir=tmp_path)
        journal = Journal.open(tmp_path)
        assert sorted(row.status for row in journal.trials()) == [OK] * 3 + ["pending"] * 5
        journal.close()


def raise_error(outputs):
    raise RuntimeError("sizes do not match")


def raise_out_of_memory(outputs):
    raise torch.OutOfMemoryError("CUDA out of memory")


class TestFailures:
    @pytest.mark.parametrize(
        ("fault", "reason"),
        [
            (raise_error, "RuntimeError: sizes do not match"),
            (raise_out_of_memory, "OutOfMemoryError: CUDA out of memory"),
            (lambda outputs: outputs * math.nan, "the score of 96 of 96 samples is NaN or infinite"),
            (lambda outputs: outputs[:3], "ValueError: Expected input batch_size (3) to match target batch_size (96)."),
        ],
        ids=["error", "memory", "nan", "shape"],
    )
    def test_a_failing_candidate_costs_one_trial_and_leaves_its_reason(self, mlp, vectors, tmp_path, fault, reason):
        def narrow(model, outputs):
            return fault(outputs) if model[0].out_features < 24 else outputs

        result = quick(mlp, "flops <= 50%", vectors, trials=24, evaluator=Watched(fault=narrow), run_dir=tmp_path)
        failed = {trial.id for trial in result.trials if trial.decoded["0"] < 24}
        assert len(result.trials) == 24
        assert 0 < len(failed) < 24
        assert {trial.id for trial in result.trials if trial.status == FAILED} == failed
        assert not failed & {trial.id for trial in result.front}
        journal = Journal.open(tmp_path)
        for trial, row in zip(result.trials, journal.trials(), strict=True):
            assert (trial.status, trial.reason) == (row.status, row.reason)
            assert trial.reason == (reason if trial.id in failed else "")
            assert math.isnan(trial.score) == (trial.id in failed)
        journal.close()
        assert f"{len(failed)} failed" in str(result)

    def test_when_every_candidate_fails_best_says_why(self, mlp, vectors):
        dense = count_params(mlp)

        def pruned_fails(model, outputs):
            return outputs if count_params(model) == dense else raise_error(outputs)

        result = quick(mlp, "flops <= 50%", vectors, evaluator=Watched(fault=pruned_fails))
        assert result.front == ()
        with pytest.raises(autoprune.InfeasibleBudgetError, match=r"no trial succeeded.*sizes do not match"):
            result.best()
        assert "0 on the front" in str(result)


class TestJournal:
    def test_it_holds_every_trial(self, mlp, vectors, tmp_path):
        result = quick(mlp, "flops <= 50%", vectors, trials=12, run_dir=tmp_path / "runs" / "a")
        journal = Journal.open(tmp_path / "runs" / "a")
        rows, meta = journal.trials(), journal.meta()
        journal.close()
        for trial, row in zip(result.trials, rows, strict=True):
            assert (row.id, row.candidate, row.costs) == (trial.id, trial.candidate, dict(trial.costs))
            (evaluation,) = row.evaluations
            assert evaluation.metric == pytest.approx(trial.score)
            assert evaluation.signal == pytest.approx(trial.signal)
            assert evaluation.samples == 96
        assert (meta["budget"], meta["seed"], meta["metric"]) == (result.budget, 0, "accuracy")
        assert meta["space"] == result.space.to_json()

    def test_it_can_be_read_while_the_search_runs(self, mlp, vectors, tmp_path):
        finished = []

        def look(calls):
            if calls:
                journal = Journal.open(tmp_path)
                finished.append(sum(row.status == OK for row in journal.trials()))
                journal.close()

        quick(mlp, "flops <= 50%", vectors, trials=6, evaluator=Watched(before=look), run_dir=tmp_path)
        assert finished == list(range(6))


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

    def test_a_metric_of_the_whole_set_has_no_interval(self, mlp, vectors):
        metric = Metric(worst_class, higher_is_better=True, per_sample=False)
        result = quick(mlp, "flops <= 50%", vectors, metric=metric)
        assert all(math.isnan(end) for trial in result.trials for end in trial.interval)
        assert all(trial.signal == -trial.score for trial in result.trials)

    def test_without_labels_agreement_with_the_dense_model_is_scored(self, mlp, vectors):
        result = quick(mlp, "flops <= 50%", vectors[0])
        assert result.metric == "agreement"
        assert result.dense.score == 1.0
        assert any("labels are missing" in note for note in result.notes)

    def test_without_data_random_inputs_stand_in_and_the_result_says_so(self, mlp):
        result = quick(mlp, "flops <= 50%", example_inputs=torch.randn(2, 64))
        assert result.metric == "agreement"
        assert any("no data given: 256 random inputs" in note for note in result.notes)
        assert result.trials[0].evaluations[0].samples == 256


class TestData:
    def test_loaders_arrays_and_dictionaries_score_the_same(self, mlp, vectors):
        x, y = vectors
        parts = {"calibration": slice(0, 80), "validation": slice(80, 160), "test": slice(160, 240)}

        def search(source):
            return quick(mlp, "flops <= 50%", Data(**{name: source(x[part], y[part]) for name, part in parts.items()}))

        arrays = search(lambda a, b: (a.numpy(), b.numpy()))
        loaders = search(lambda a, b: DataLoader(TensorDataset(a, b), batch_size=80))
        mappings = search(lambda a, b: [{"input": a, "labels": b}])
        for other in (loaders, mappings):
            assert [t.candidate for t in other.trials] == [t.candidate for t in arrays.trials]
            assert [t.score for t in other.trials] == [t.score for t in arrays.trials]
            assert [t.signal for t in other.trials] == pytest.approx([t.signal for t in arrays.trials], rel=1e-5)

    def test_data_set_aside_is_noted(self, mlp, vectors):
        notes = quick(mlp, "flops <= 50%", vectors).notes
        assert any("no calibration data given: 48 of 240" in note for note in notes)
        assert any("no test data given: 96 of 240" in note for note in notes)

    def test_forward_says_how_to_run_the_model(self, mlp, vectors):
        x, y = vectors
        data = Data(calibration=(x, y), validation=(x[:100], y[:100]), test=(x[100:], y[100:]))
        result = quick(mlp, "flops <= 50%", data, forward=lambda model, batch: model(batch[0] * 2))
        correct = (result.build()(x[:100] * 2).argmax(1) == y[:100]).double().mean().item()
        assert result.best().score == pytest.approx(correct)

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
    def test_widths_come_first(self, mlp, vectors):
        widths = {"0": 12, "3": 8, "6": 9}
        for start in ([widths], widths):
            assert quick(mlp, "flops <= 50%", vectors, start=start).trials[0].decoded == widths

    def test_dimensions_that_are_not_named_stay_dense(self, mlp, vectors):
        assert quick(mlp, "flops <= 60%", vectors, start=[{"0": 12}]).trials[0].decoded == {"0": 12, "3": 32, "6": 24}

    @pytest.mark.parametrize("as_list", [True, False])
    def test_a_result_gives_its_front(self, mlp, vectors, as_list):
        first = quick(mlp, "flops <= 50%", vectors, trials=20)
        second = quick(mlp, "flops <= 50%", vectors, trials=20, start=[first] if as_list else first, seed=1)
        assert [t.candidate for t in second.trials[: len(first.front)]] == [t.candidate for t in first.front]

    def test_what_is_over_the_budget_is_brought_within(self, mlp, vectors):
        result = quick(mlp, "flops <= 20%", vectors, start=[(0, 0, 0), (1, 2, 3)], optimizer="nsga2")
        assert all(trial.costs["flops"] <= result.limits["flops"] for trial in result.trials)


def test_ignored_layers_keep_their_units(mlp, vectors):
    result = quick(mlp, "flops <= 70%", vectors, space=Channels(ignore=["0"], step=4))
    for trial in result.trials:
        built = result.build(trial)
        assert built[0].out_features == 48
        assert built[3].out_features < 32
        assert built[3].out_features % 4 == built[6].out_features % 4 == 0


def test_optimizers_are_named_classes_functions_or_instances(mlp, vectors):
    from autoprune.optimizers import RandomSearch

    named = quick(mlp, "flops <= 50%", vectors, trials=10, optimizer="random")
    made = quick(mlp, "flops <= 50%", vectors, trials=10, optimizer=lambda problem, seed: RandomSearch(problem, seed))
    assert seen(quick(mlp, "flops <= 50%", vectors, trials=10, optimizer=RandomSearch)) == seen(named) == seen(made)


def test_a_built_model_is_searched_again_and_loads_into_the_first_class(digits_model, digits, data, found, tmp_path):
    images, labels = digits.train
    small = found.build().train()
    optimizer = torch.optim.SGD(small.parameters(), 0.01)
    F.cross_entropy(small(images[:64]), labels[:64]).backward()
    optimizer.step()
    second = quick(small, "flops <= 60%", data, trials=12)
    image = digits.validation[0][:1]
    assert second.limits["flops"] == 0.6 * count_macs(small.eval(), (image,))
    assert_costs_are_exact(second, (image,))

    built = second.build().eval()
    autoprune.save(built, tmp_path / "small.safetensors")
    fresh = copy.deepcopy(digits_model)
    for parameter in fresh.parameters():
        torch.nn.init.normal_(parameter)
    loaded = autoprune.load(tmp_path / "small.safetensors", fresh)
    assert torch.equal(loaded(digits.test[0]), built(digits.test[0]))


SEARCHED = ["dilated_1d", "volume_3d", "unet", "mobilenet_v3", "densenet", "resnext", "shared", "tied", "two_inputs"]


@pytest.mark.parametrize("name", SEARCHED)
def test_networks_of_the_zoo_are_searched_with_exact_costs(name, tmp_path):
    entry, generator = ZOO[name], torch.Generator().manual_seed(0)
    model, examples = entry.build(), entry.inputs()
    inputs = tuple(torch.randn(48, *x.shape[1:], generator=generator) for x in examples)
    outputs = model(*inputs).detach()
    targets = outputs + 1 if name == "unet" else outputs.argmax(1)
    result = quick(model, "flops <= 60%", (*inputs, targets), trials=3)
    assert result.metric == ("mse" if name == "unet" else "accuracy")
    assert result.dense.score == pytest.approx(1.0, abs=1e-4)
    assert [trial.status for trial in result.trials] == [OK] * 3
    assert_costs_are_exact(result, examples)

    built = result.build()
    autoprune.save(built, tmp_path / "small.safetensors")
    loaded = autoprune.load(tmp_path / "small.safetensors", entry.build())
    assert torch.equal(loaded(*examples), built(*examples))


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_searched_and_built_there(digits_model, digits, data):
    model = copy.deepcopy(digits_model).cuda()
    result = quick(model, "flops <= 50%", data, trials=12)
    built = result.build()
    assert {tensor.device.type for tensor in (*built.parameters(), *built.buffers())} == {"cuda"}
    images, labels = digits.validation
    correct = (built(images.cuda()).argmax(1).cpu() == labels).double().mean().item()
    assert correct == pytest.approx(result.best().score, abs=0.01)
    again = quick(model, "flops <= 50%", data, trials=12)
    assert [trial.candidate for trial in again.trials] == [trial.candidate for trial in result.trials]
