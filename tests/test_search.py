"""Whole searches: what comes back, what is left alone, and that they repeat."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autoprune
from autoprune import Channels
from autoprune.pareto import Direction
from autoprune.protocols import OK
from autoprune.result.trials import find_front
from tests.oracle import count_macs, count_params
from tests.searching import (
    assert_costs_are_exact,
    assert_within_the_limits_or_probes,
    quick,
    seen,
    undominated,
)
from zoo import ZOO

TRIALS = 40


@pytest.fixture(scope="module")
def found(digits_model, data):
    return autoprune.search(digits_model, "flops <= 50%", data, trials=TRIALS)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_what_is_built_has_the_modes_and_flags_of_the_model(vectors):
    model = Branchy().train()
    model.net[1].eval()
    built = quick(model, "flops <= 50%", vectors).build()
    assert [m.training for m in built.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in built.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.slow
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
    front = find_front(trials, limits, Direction(higher))
    assert {trial.id for trial in front} == undominated(made)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_search_and_another_seed_another(mlp, vectors):
    first, again, other = (quick(mlp, "flops <= 50%", vectors, trials=30, seed=seed) for seed in (3, 3, 4))
    assert seen(again) == seen(first)
    assert [trial.candidate for trial in other.trials] != [trial.candidate for trial in first.trials]


_IN_ANOTHER_PROCESS = """
import json, torch
torch.set_num_threads(1)
import autoprune
from tests.searching import quick, seen
from zoo import ZOO
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


@pytest.mark.slow
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


@pytest.mark.slow
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
