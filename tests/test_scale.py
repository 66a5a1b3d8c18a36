"""Structure discovery grows in line with the model, and needs no values: `benchmarks.structure.scale` at size."""

import pytest
import torch
from torch import nn

from autoprune.structure.analysis import analyse, best_choices
from autoprune.structure.example import Example
from autoprune.structure.tracing.trace import trace
from autoprune.structure.units import Units
from benchmarks.structure.scale import chain, forward, llama_7b, llama_inputs, resnet50

pytestmark = pytest.mark.slow

SMALL_LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 1000}


def test_a_llama_on_the_meta_device_is_traced_without_a_value():
    model = llama_7b(**SMALL_LLAMA)
    record = trace(Example(model, (), llama_inputs(), forward))
    _, units = best_choices(record)
    assert record.device == "meta"
    assert {group.name: group.size for group in units.groups} == llama_groups(layers=4)


def llama_groups(layers: int) -> dict[str, int]:
    """The residual stream, and for each layer its 32 heads and the width of its feed-forward part."""
    groups = {"model.embed_tokens": 256}
    for layer in range(layers):
        groups |= {f"model.layers.{layer}.self_attn.q_proj": 32, f"model.layers.{layer}.mlp.gate_proj": 688}
    return groups


def groups_of(model: nn.Module, *args: torch.Tensor) -> Units:
    return best_choices(trace(Example(model, args, forward=forward)))[1]


def test_every_block_has_a_group_of_its_own_beside_the_stream():
    units = groups_of(chain(30), torch.zeros(2, 8))
    assert [group.size for group in units.groups] == [16, *[32] * 30]


@pytest.mark.slow
def test_resnet50_is_analysed_with_its_checks():
    model, image = resnet50(), torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032  # published
    structure = analyse(Example(model, (image,)), checks="strict")
    assert len(structure.groups) == 37  # 1 stem, 4 streams, and 2 inside each of 16 blocks
    assert {frozen.tensor for frozen in structure.frozen} == {"0.weight", "22.weight", "22.bias"}
