"""Attention heads: removing one is masking its output; ratios, sizes and scales of what stays are untouched."""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.protocols import Pruning
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.structure import Structure
from autoprune.structure.units import Group
from zoo.hf import HF_ZOO


class Layout(NamedTuple):
    """Place and layout of attention in layer {}.

    Attributes:
        attention: Name of the module.
        maker: Projection that makes queries, below it.
        reader: Projection that reads what the heads attended to, below it.
        transposed: Whether weights are (inputs, outputs).
        units: Heads, or groups of heads that share keys and values.
        width: Channels of the reader that a unit owns.
        size: Channels of a head.
    """

    attention: str
    maker: str
    reader: str
    transposed: bool
    units: int
    width: int
    size: int


LAYOUTS = {
    "LlamaForCausalLM": Layout("model.layers.{}.self_attn", "q_proj", "o_proj", False, 2, 24, 12),
    "GPT2LMHeadModel": Layout("transformer.h.{}.attn", "c_attn", "c_proj", True, 8, 8, 8),
    "BertForSequenceClassification": Layout(
        "bert.encoder.layer.{}.attention", "self.query", "output.dense", False, 4, 12, 12
    ),
    "ViTForImageClassification": Layout("vit.layers.{}.attention", "q_proj", "o_proj", False, 4, 12, 12),
}
EVERY = pytest.mark.parametrize("name", LAYOUTS)


@cache
def analysed(name: str) -> tuple[nn.Module, Structure]:
    entry = HF_ZOO[name]
    model = entry.build()
    return model, analyse(Example(model, kwargs=entry.inputs(), forward=lambda m, **kwargs: entry.forward(m, kwargs)))


def heads(name: str, layer: int) -> Group:
    """The group of one layer's heads, known by what reads them."""
    layout = LAYOUTS[name]
    tensor, dim = f"{layout.attention.format(layer)}.{layout.reader}.weight", 0 if layout.transposed else 1
    found = [g for g in analysed(name)[1].groups if any((s.tensor, s.dim) == (tensor, dim) for s in g.slots)]
    assert len(found) == 1, f"the heads of layer {layer} stay"
    return found[0]


def built_without(name: str, group: Group, *removed: int) -> nn.Module:
    model, structure = analysed(name)
    return structure.build(model, Pruning({group.name: tuple(i for i in range(group.size) if i not in removed)}))


def outputs(name: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return HF_ZOO[name].forward(model, HF_ZOO[name].inputs())


def masked_outputs(name: str, layer: int, unit: int) -> Tensor:
    """Outputs of the dense model that does not read one unit of a layer's heads."""
    model, layout = analysed(name)[0], LAYOUTS[name]
    reader = model.get_submodule(f"{layout.attention.format(layer)}.{layout.reader}")
    columns = slice(unit * layout.width, (unit + 1) * layout.width)
    weight = reader.weight.detach().clone()
    weight[(columns,) if layout.transposed else (slice(None), columns)] = 0
    dense = reader.weight
    reader.weight = nn.Parameter(weight)
    try:
        return outputs(name, model)
    finally:
        reader.weight = dense


class Attended(TorchFunctionMode):
    """Heads of queries and keys, the size of a head, and the scale, of every attention that runs."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[int, int, int, float | None]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, *_ = args
            self.seen.append((query.shape[1], key.shape[1], query.shape[3], kwargs.get("scale")))
        return func(*args, **kwargs)


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("layer", [0, 1])
def test_removing_a_head_is_masking_its_output(name: str, layer: int):
    model, _ = analysed(name)
    group, dense = heads(name, layer), outputs(name, model)
    assert group.size == LAYOUTS[name].units
    for unit in range(group.size):
        expected = masked_outputs(name, layer, unit)
        torch.testing.assert_close(outputs(name, built_without(name, group, unit)), expected, rtol=0, atol=1e-5)
        assert (dense - expected).abs().max() > 1e-3  # or agreement would mean nothing


@EVERY
def test_the_layers_tell_how_many_heads_attend(name: str):
    _, structure = analysed(name)
    layout = LAYOUTS[name]
    found = [layer.heads for layer in structure.terms.layers if layer.heads is not None]
    numbers = {group.name: i for i, group in enumerate(structure.groups)}
    assert found[0].fixed == 0
    assert found[0].shares == ((numbers[heads(name, 0).name], layout.width // layout.size),)


@EVERY
def test_head_size_and_scale_are_untouched(name: str):
    model, _ = analysed(name)
    layout = LAYOUTS[name]
    where, narrow = layout.attention.format(0), built_without(name, heads(name, 0), 0)
    before, after = (dict(m.get_submodule(where).named_modules()) for m in (model, narrow))
    for key in ("head_dim", "attention_head_size", "scaling"):
        values = {n: getattr(m, key) for n, m in before.items() if hasattr(m, key)}
        assert {n: getattr(after[n], key) for n in values} == values
    heads_left = layout.width // layout.size * (layout.units - 1)
    reader = narrow.get_submodule(f"{where}.{layout.reader}").weight
    assert reader.shape[0 if layout.transposed else 1] == heads_left * layout.size


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "ViTForImageClassification"])
def test_the_kernel_gets_fewer_heads_of_the_same_size_and_scale(name: str):
    model, _ = analysed(name)
    runs = []
    for built in (model, built_without(name, heads(name, 0), 1)):
        with Attended() as attended:
            outputs(name, built)
        runs.append(attended.seen)
    (queries, keys, size, scale), second = runs[0]
    units = LAYOUTS[name].units
    assert size == LAYOUTS[name].size
    assert scale is None or scale == pytest.approx(size**-0.5)
    assert runs[1] == [(queries * (units - 1) // units, keys * (units - 1) // units, size, scale), second]


def test_grouped_queries_keep_their_ratio():
    model, _ = analysed("LlamaForCausalLM")
    narrow = built_without("LlamaForCausalLM", heads("LlamaForCausalLM", 1), 0)
    dense, pruned = (m.get_submodule("model.layers.1.self_attn") for m in (model, narrow))
    for attention in (dense, pruned):
        assert attention.q_proj.out_features == 2 * attention.k_proj.out_features == 2 * attention.v_proj.out_features
        assert attention.num_key_value_groups == 2
    assert pruned.k_proj.out_features == dense.k_proj.out_features // 2 == 12


class Pooling(nn.Module):
    """Weighs positions by a softmax over a linear score of each: no heads, though a batched product feeds a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.score, self.head = nn.Conv1d(3, 12, 3), nn.Linear(12, 1), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.conv(x).relu().transpose(1, 2)
        out: Tensor = self.head((torch.softmax(self.score(steps), 1) * steps).sum(1))
        return out


def test_a_learned_score_of_each_position_is_no_attention_head():
    assert [group.size for group in analyse(Example(Pooling(), (torch.randn(2, 3, 9),))).groups] == [12]
