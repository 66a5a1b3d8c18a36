"""The larger zoo is what other tests take it for: repeatable, alive in every parameter, of the kinds its tags say."""

import re
from operator import attrgetter

import pytest
import torch

from zoo.entries import AnyEntry
from zoo.hf import HF_ZOO
from zoo.outputs import leaves
from zoo.tasks import TASK_ZOO

pytestmark = pytest.mark.slow

NAME = attrgetter("name")
entries = pytest.mark.parametrize("entry", (HF_ZOO | TASK_ZOO).values(), ids=NAME)

# What has no influence by design: a bias of all keys alike moves every score of a softmax alike, masks are for
# pretraining, an expert may be routed nothing, and nobody reads what N-BEATS' last block leaves of the past.
IDLE = re.compile(r"\b(k|k_lin|k_proj|key|pos_key_proj)\.bias$|mask_token|masked_spec|expert_|blocks\.2\.past")


def test_the_zoo_is_as_large_as_promised():
    assert len(HF_ZOO) >= 36
    assert len(TASK_ZOO) >= 11


@entries
def test_every_network_is_the_same_each_time_and_leaves_the_random_state_alone(entry: AnyEntry, global_rng_untouched):
    with global_rng_untouched():
        first, second = entry.build(), entry.build()
        outputs, again = entry.forward(first, entry.inputs()), entry.forward(second, entry.inputs())
    assert not any(module.training for module in first.modules())
    torch.testing.assert_close(outputs, again, rtol=0, atol=0)


@entries
def test_outputs_are_finite_and_tell_the_samples_apart(entry: AnyEntry):
    with torch.no_grad():
        outputs = leaves(entry.forward(entry.build(), entry.inputs()))
    for output in outputs:
        assert output.isfinite().all()
        assert 0.1 < output.std() < 10
        assert (output[0] - output[1]).abs().max() > 0.2 * output.std()


@entries
def test_every_parameter_matters(entry: AnyEntry):
    model = entry.build()
    generator = torch.Generator().manual_seed(1)
    outputs = leaves(entry.forward(model, entry.inputs()))
    sum((output * torch.randn(output.shape, generator=generator)).sum() for output in outputs).backward()
    idle = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or parameter.grad.norm() < 1e-4 * parameter.norm())
    ]
    assert [name for name in idle if not IDLE.search(name)] == []


@pytest.mark.parametrize("entry", [entry for entry in HF_ZOO.values() if entry.tags & {"eager", "sdpa"}], ids=NAME)
def test_attention_runs_as_the_tags_say(entry: AnyEntry):
    assert {entry.build().config._attn_implementation} == entry.tags & {"eager", "sdpa"}
