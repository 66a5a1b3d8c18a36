"""Costs are learned from the operations of inference, with their sizes and the layouts of weights."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from autoprune.costs.memory.peak import measure_memory
from autoprune.costs.operations.parts import draw_widths, edit_to, prefixes
from autoprune.costs.operations.torch_parts import find_parts, sized_operations
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.slicing.slicing import build
from autoprune.structure.tracing.trace import trace
from tests.measuring import peak_bytes
from zoo.resnet import resnet


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.read, self.head = nn.Linear(6, 20), kind(20, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.read(self.embed(x).relu())[0][:, -1])


class TwoHeads(nn.Module):
    """Attention of two heads, with the copies that PyTorch leaves out for one."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.query, self.key, self.value))
        read = torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
        return self.out(read.transpose(1, 2).flatten(2))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 4, 64, batch_first=True, **options)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(6, 16), body, nn.Linear(16, 5))


def in_channels_last(model):
    return model.to(memory_format=torch.channels_last)


MODELS = {
    "channels-last": (lambda: in_channels_last(resnet(8, width=8)), (3, 16, 16)),
    "gru": (lambda: Recurrent(nn.GRU), (10, 6)),
    "lstm": (lambda: Recurrent(nn.LSTM), (10, 6)),
    "frozen gru": (lambda: Recurrent(nn.GRU).requires_grad_(False), (10, 6)),
    "encoder": (encoder, (10, 6)),
    "two heads": (lambda: nn.Sequential(nn.Linear(6, 16), TwoHeads(), nn.Linear(16, 5)), (10, 6)),
}


def made(name, batch):
    make, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = make().eval(), torch.randn(batch, *shape)
    return model, inputs.contiguous(memory_format=torch.channels_last) if name == "channels-last" else inputs


def ran(module, inputs, names):
    """Count the runs of each of these operations in inference, within no other of them."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        module(inputs)
    count = Counter()
    for event in profiler.events():
        around = event.cpu_parent
        while around is not None and around.name not in names:
            around = around.cpu_parent
        count[event.name] += event.name in names and around is None
    return +count


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_operations_of_pruned_networks_are_those_that_inference_runs(name):
    model, inputs = made(name, 3)
    structure = analyse(Example(model, (inputs,)))
    _, operations, _ = sized_operations(Example(model, (inputs,)), structure, 0)
    traced = Counter(f"aten::{operation.op.name}" for operation in operations)
    widths = np.maximum(structure.sizes - [group.multiple for group in structure.groups], 2)
    module = build(model, structure.edit(prefixes(structure, widths))).eval()
    assert ran(module, inputs, traced.keys()) == traced


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_their_memory_is_predicted(name):
    model, inputs = made(name, 8)
    structure = analyse(Example(model, (inputs,)))
    memory = measure_memory(Example(model, (inputs,)), structure)
    assert len(memory.fused) == (2 if name == "encoder" else 0)
    widths = draw_widths(structure, 5, np.random.default_rng(0))
    widths[0] = structure.sizes
    widths = np.maximum(widths, np.minimum(structure.sizes, 2))  # a single channel or head may run in another layout
    measured = [peak_bytes(build(model, structure.edit(prefixes(structure, row))).eval(), inputs) for row in widths]
    np.testing.assert_allclose(memory.predict(widths.astype(float)), measured, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}])
def test_a_layer_that_inference_fuses_is_predicted_with_its_heads_and_without(options):
    model, inputs = encoder(**options).eval(), torch.randn(8, 24, 6)
    structure = analyse(Example(model, (inputs,)))
    memory = measure_memory(Example(model, (inputs,)), structure)
    assert len(memory.fused) == 2
    heads = [g for g, group in enumerate(structure.groups) if "self_attn" in group.name]
    inner = [g for g, group in enumerate(structure.groups) if "linear1" in group.name]
    rows = np.tile(structure.sizes, (5, 1))
    rows[1, inner] = 20  # both layers stay fused
    rows[2, heads[0]] = 3  # the first one does not
    rows[3, [*heads, inner[1]]] = 2, 3, 30
    rows[4, inner] = 7, 64
    measured = [peak_bytes(build(model, structure.edit(prefixes(structure, row))).eval(), inputs) for row in rows]
    np.testing.assert_allclose(memory.predict(rows.astype(float)), measured, rtol=0.01)
    assert ran(model, inputs, ["aten::_transformer_encoder_layer_fwd"]).total() == 2


@pytest.mark.slow
def test_a_pruned_network_stays_in_channels_last():
    model = in_channels_last(resnet(8, width=8)).eval()
    structure = analyse(Example(model, (torch.zeros(2, 3, 16, 16),)))
    small = build(model, structure.edit(prefixes(structure, [1, 3, 4, 5, 6, 7])))
    for parameter in small.parameters():
        if parameter.ndim == 4:
            assert parameter.stride()[1] == 1
            assert parameter.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_a_group_of_two_heads_is_no_reason_to_refuse_a_model():
    model, inputs = made("two heads", 2)
    structure = analyse(Example(model, (inputs,)))
    assert 2 in structure.sizes
    _, parts = find_parts(Example(model, (inputs,)), structure)
    heads = [g for g, size in enumerate(structure.sizes) if size == 2]
    assert any(g in heads for part in parts for size in part.sizes for g, _ in size[1])


@pytest.mark.slow
def test_a_model_with_more_units_than_it_has_runs():
    model, inputs = made("two heads", 2)
    structure = analyse(Example(model, (inputs,)))
    wide = build(model, edit_to(structure, np.where(structure.sizes == 2, 3, structure.sizes)))
    assert wide.get_submodule("1.query").weight.shape == (24, 16)
    assert wide(inputs).shape == model(inputs).shape


@pytest.mark.parametrize("name", MODELS)
def test_what_needs_no_computing_has_the_sizes_and_strides_of_what_is_computed(name):
    model, inputs = made(name, 3)
    computed = trace(Example(model, (inputs,)), values=True)
    assert computed.foreseen
    left = trace(Example(model, (inputs,)), values=True, foreseen=computed.foreseen)
    assert [(v.shape, v.strides, v.died) for v in left.values] == [
        (v.shape, v.strides, v.died) for v in computed.values
    ]
    assert [op.func for op in left.ops] == [op.func for op in computed.ops]


def test_a_pass_that_reads_values_computes_all_of_them():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x):
            x = self.a(x)
            return self.b(x if x.square().sum().item() > 0 else -x)

    model, inputs = Choosing().eval(), torch.randn(2, 6)
    assert not trace(Example(model, (inputs,)), values=True).foreseen
