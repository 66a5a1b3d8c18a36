"""FLOPs equal hand counts: for every layer of torch.nn that has weights, and every operation that multiplies them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autoprune
from autoprune.costs import StructuralCosts
from autoprune.errors import UnsupportedModelError
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from autoprune.structure.rules import registry
from tests.candidates import random_pruning, widths_of
from tests.small_networks import Net

STEPS = 5


class Case(NamedTuple):
    """A layer that reads 8 channels.

    Attributes:
        make: Builds the layer.
        inputs: Shape of a sample that a layer of its own kind, or a linear one, makes these channels of.
        hand: Multiply-accumulates of the layer on one sample, by hand, from its weights as they are.
        run: Calls the layer on channels (b, steps, 8), or (b, 8, ...) for a convolution, and returns its outputs.
        prunable: Whether it must lose channels.
    """

    make: Callable[[], nn.Module]
    hand: Callable[[Any], int]
    run: Callable[[Any, Tensor], Tensor] = lambda layer, x: layer(x)
    inputs: tuple[int, ...] = (STEPS, 6)
    prunable: bool = True


def nothing(layer: nn.Module) -> int:
    return 0


def matrix(weight: Tensor) -> int:
    return STEPS * weight.numel()


def positions(size: int, rank: int, layer: nn.Module) -> int:
    return (size - layer.kernel_size[0] + 1) ** rank * layer.weight.numel()


def recurrent(layer: nn.RNNBase) -> int:
    return sum(STEPS * p.numel() for name, p in layer.named_parameters() if name.startswith("weight"))


def cell(layer: nn.RNNCellBase) -> int:
    return layer.weight_ih.numel() + layer.weight_hh.numel()


def attention(layer: nn.MultiheadAttention) -> int:
    rows, width = layer.in_proj_weight.shape
    return STEPS * rows * width + 2 * STEPS * STEPS * rows // 3 + matrix(layer.out_proj.weight)


def transformer(layer: nn.Module) -> int:
    found = sum(attention(part) for part in layer.modules() if isinstance(part, nn.MultiheadAttention))
    parts = [part for name, part in layer.named_modules() if isinstance(part, nn.Linear) and "out_proj" not in name]
    return found + sum(matrix(part.weight) for part in parts)


def convolution(make: Callable[[], nn.Module], rank: int) -> Case:
    hand = lambda layer: positions(7, rank, layer)  # noqa: E731
    return Case(make, hand, inputs=(3, *(7,) * rank))


def transposed(make: Callable[[], nn.Module], rank: int) -> Case:
    return Case(make, lambda layer: 7**rank * layer.weight.numel(), inputs=(3, *(7,) * rank))


def norm(make: Callable[[], nn.Module], rank: int) -> Case:
    return Case(make, nothing, inputs=(3, *(7,) * rank))


def codes(x: Tensor) -> Tensor:
    return (x.detach().abs() * 0).long()


def encoder_layer(kind: type[nn.Module]) -> nn.Module:
    return kind(8, 2, 16, batch_first=True)


LAYERS: dict[type[nn.Module], Case] = {
    nn.Linear: Case(lambda: nn.Linear(8, 12), lambda layer: matrix(layer.weight)),
    nn.Bilinear: Case(lambda: nn.Bilinear(8, 8, 12), lambda layer: matrix(layer.weight), lambda m, x: m(x, x.tanh())),
    nn.Conv1d: convolution(lambda: nn.Conv1d(8, 12, 3, groups=2), 1),
    nn.Conv2d: convolution(lambda: nn.Conv2d(8, 12, 3), 2),
    nn.Conv3d: convolution(lambda: nn.Conv3d(8, 12, 3), 3),
    nn.ConvTranspose1d: transposed(lambda: nn.ConvTranspose1d(8, 12, 3, stride=2), 1),
    nn.ConvTranspose2d: transposed(lambda: nn.ConvTranspose2d(8, 12, 3, stride=2), 2),
    nn.ConvTranspose3d: transposed(lambda: nn.ConvTranspose3d(8, 12, 3), 3),
    nn.RNN: Case(lambda: nn.RNN(8, 10, 2, batch_first=True), recurrent, lambda m, x: m(x)[0]),
    nn.GRU: Case(lambda: nn.GRU(8, 10, bidirectional=True, batch_first=True), recurrent, lambda m, x: m(x)[0]),
    nn.LSTM: Case(lambda: nn.LSTM(8, 10, 2, proj_size=4, batch_first=True), recurrent, lambda m, x: m(x)[0]),
    nn.RNNCell: Case(lambda: nn.RNNCell(8, 10), cell, lambda m, x: m(x[:, 0])[:, None]),
    nn.GRUCell: Case(lambda: nn.GRUCell(8, 10), cell, lambda m, x: m(x[:, 0])[:, None]),
    nn.LSTMCell: Case(lambda: nn.LSTMCell(8, 10), cell, lambda m, x: m(x[:, 0])[0][:, None]),
    nn.Embedding: Case(lambda: nn.Embedding(9, 12), nothing, lambda m, x: m(codes(x.sum(-1)))),
    nn.EmbeddingBag: Case(lambda: nn.EmbeddingBag(9, 12), nothing, lambda m, x: m(codes(x.sum(-1)))[:, None]),
    nn.BatchNorm1d: norm(lambda: nn.BatchNorm1d(8), 1),
    nn.BatchNorm2d: norm(lambda: nn.BatchNorm2d(8), 2),
    nn.BatchNorm3d: norm(lambda: nn.BatchNorm3d(8), 3),
    nn.SyncBatchNorm: norm(lambda: nn.SyncBatchNorm(8), 2),
    nn.InstanceNorm1d: norm(lambda: nn.InstanceNorm1d(8, affine=True), 1),
    nn.InstanceNorm2d: norm(lambda: nn.InstanceNorm2d(8, affine=True), 2),
    nn.InstanceNorm3d: norm(lambda: nn.InstanceNorm3d(8, affine=True), 3),
    nn.GroupNorm: norm(lambda: nn.GroupNorm(2, 8), 2),
    nn.LayerNorm: Case(lambda: nn.LayerNorm(8), nothing),
    nn.RMSNorm: Case(lambda: nn.RMSNorm(8), nothing),
    nn.PReLU: norm(lambda: nn.PReLU(8), 2),
    nn.MultiheadAttention: Case(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True), attention, lambda m, x: m(x, x, x, need_weights=False)[0]
    ),
    nn.TransformerEncoderLayer: Case(lambda: encoder_layer(nn.TransformerEncoderLayer), transformer),
    nn.TransformerDecoderLayer: Case(
        lambda: encoder_layer(nn.TransformerDecoderLayer), transformer, lambda m, x: m(x, x.tanh())
    ),
    nn.TransformerEncoder: Case(
        lambda: nn.TransformerEncoder(encoder_layer(nn.TransformerEncoderLayer), 2, enable_nested_tensor=False),
        transformer,
    ),
    nn.TransformerDecoder: Case(
        lambda: nn.TransformerDecoder(encoder_layer(nn.TransformerDecoderLayer), 2),
        transformer,
        lambda m, x: m(x, x.tanh()),
    ),
    nn.Transformer: Case(
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), transformer, lambda m, x: m(x, x.tanh())
    ),
    nn.AdaptiveLogSoftmaxWithLoss: Case(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 12, [4, 8], div_value=2),
        lambda layer: sum(matrix(p) for name, p in layer.named_parameters() if "weight" in name),
        lambda m, x: m.log_prob(x.flatten(0, 1)).unflatten(0, (-1, STEPS)),
    ),
}
if hasattr(nn, "LinearCrossEntropyLoss"):  # from torch 2.13 on
    LAYERS[nn.LinearCrossEntropyLoss] = Case(
        lambda: nn.LinearCrossEntropyLoss(8, 12),
        lambda layer: matrix(layer.linear.weight),
        lambda m, x: m(x.flatten(0, 1), codes(x.sum(-1)).flatten()).expand(len(x), 1, 1),
    )


def network(case: Case) -> tuple[nn.Module, Tensor]:
    """A layer between one that makes its channels and one that reads its outputs."""
    spatial = case.inputs[0] == 3
    x = torch.randn(2, *case.inputs)
    rank = len(case.inputs) - 1
    before = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](3, 8, 1) if spatial else nn.Linear(6, 8)
    with torch.no_grad():
        made = case.run(case.make().eval(), before(x))
    width = made.shape[1 if spatial else -1]

    def forward(s: Net, x: Tensor) -> Tensor:
        y = case.run(s.layer, s.before(x))
        return s.after(y.flatten(2).mean(2) if spatial else y)

    return Net(forward, before=before, layer=case.make(), after=nn.Linear(width, 4)).eval(), x


def by_hand(case: Case, model: Any, x: Tensor) -> int:
    spatial = case.inputs[0] == 3
    with torch.no_grad():
        reads = 1 if spatial else case.run(model.layer, model.before(x)).shape[1]
    before = math.prod(case.inputs[1:] if spatial else case.inputs[:1]) * model.before.weight.numel()
    unread = "Embedding" in type(model.layer).__name__
    return (0 if unread else before) + case.hand(model.layer) + reads * model.after.weight.numel()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", LAYERS, ids=lambda kind: kind.__name__)
def test_flops_of_a_layer_equal_a_count_by_hand_dense_and_pruned(kind: type[nn.Module]):
    case = LAYERS[kind]
    model, x = network(case)
    structure = analyse(Example(model, (x,)))
    assert structure.terms.uncounted == ()
    prunings = [random_pruning(structure, np.random.default_rng(seed)) for seed in range(3)]
    costs, dense = StructuralCosts(structure), structure.sizes[None].astype(float)
    unread = "Embedding" in kind.__name__
    assert costs.flops(dense)[0] == by_hand(case, model, x) + (STEPS * 48 if unread else 0)
    assert {group.name.partition(".")[0] for group in structure.groups} & {"before", "layer"} or not case.prunable
    for pruning in prunings:
        built = structure.build(model, pruning)
        found = costs.flops(widths_of(structure, [pruning]))[0]
        assert found == by_hand(case, built, x) + (STEPS * built.before.weight.numel() if unread else 0)


def test_every_class_of_torch_nn_that_has_weights_is_in_the_table():
    classes = [kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]

    def has_weights(kind: type[nn.Module]) -> bool:
        bases = kind.__mro__[: kind.__mro__.index(nn.Module)]
        names = {name for base in bases if "__init__" in vars(base) for name in base.__init__.__code__.co_names}
        return bool(names & {"Parameter", "Linear", "MultiheadAttention"})

    theirs = {nn.ParameterList, nn.ParameterDict}  # hold what users give
    bases = {nn.RNNBase, nn.RNNCellBase}
    lazy = {kind for kind in classes if kind.__name__.startswith("Lazy")}  # another class once they have weights
    found = {kind for kind in classes if has_weights(kind)} - theirs - bases - lazy
    assert found <= LAYERS.keys()
    assert len(found) > 25


OPERATIONS: dict[str, tuple[Callable[[Net, Tensor], Tensor], int]] = {
    "mv": (lambda s, x: (s.w @ x.sum(0))[None], 48),
    "addmv": (lambda s, x: torch.addmv(s.w[:, 0], s.w, x.sum(0))[None], 48),
    "dot": (lambda s, x: torch.dot(s.w[0], x.sum(0))[None, None], 6),
    "vdot": (lambda s, x: torch.vdot(s.w[0], x.sum(0))[None, None], 6),
    "addr": (lambda s, x: torch.addr(s.w, s.w[:, 0], x.sum(0)), 48),
    "mm of a vector": (lambda s, x: (x.sum(0) @ s.w.T)[None], 48),
    "addbmm": (lambda s, x: torch.addbmm(s.w[:2, :2], x[:, :2, None], x[:, None, :2]), 2 * 2 * 2),
    "baddbmm": (lambda s, x: torch.baddbmm(x[:, None], x[:, None], s.w[:6].expand(2, 6, 6)), 2 * 36),
    "einsum": (lambda s, x: torch.einsum("bi,oi->bo", x, s.w), 2 * 48),
    "tensordot": (lambda s, x: torch.tensordot(x, s.w, ([1], [1])), 2 * 48),
    "cdist": (lambda s, x: torch.cdist(x, s.w), 2 * 48),
    "cdist of many rows": (lambda s, x: torch.cdist(x.repeat(20, 1), s.w), 40 * 48),
    "cdist, city blocks": (lambda s, x: torch.cdist(x, s.w, p=1), 2 * 48),
    "pdist": (lambda s, x: torch.pdist(s.w * x[:1])[None], 28 * 6),
    "conv_tbc": (lambda s, x: torch.conv_tbc(x[None], s.w.T[None].contiguous(), s.w[:, 0]), 2 * 48),
    "weighted bag": (
        lambda s, x: F.embedding_bag(torch.zeros(2, 6).long(), s.w, per_sample_weights=x, mode="sum"),
        2 * 6 * 6,
    ),
    "sparse matrix": (lambda s, x: (torch.eye(2).to_sparse() @ x) @ s.w.T, 2 * 6 + 2 * 48),
    "attention": (lambda s, x: F.scaled_dot_product_attention(x[None, None], s.w[None, None], s.w[None, None]), 192),
    "short-time Fourier transform": (
        lambda s, x: torch.stft(x @ s.w.T, 4, 2, window=torch.ones(4), return_complex=True).abs().sum(-1),
        2 * 48,
    ),
    "complex matrix": (lambda s, x: torch.complex(x, x) @ torch.complex(s.w, s.w).T, 2 * 48),
}


@pytest.mark.parametrize(("run", "macs"), OPERATIONS.values(), ids=OPERATIONS)
def test_operations_that_multiply_a_parameter_are_counted(run: Callable[[Net, Tensor], Tensor], macs: int):
    model = Net(run, w=nn.Parameter(torch.randn(8, 6)))
    structure = analyse(Example(model, (torch.randn(2, 6),), forward=lambda m, x: torch.view_as_real(m(x) + 0j)))
    assert structure.terms.uncounted == ()
    assert 2 * StructuralCosts(structure).flops(structure.sizes[None].astype(float))[0] == macs


@pytest.mark.slow
def test_an_lstm_traced_on_real_values_is_counted_and_prunable():
    def forward(s: Net, x: Tensor) -> Tensor:
        scale = 2.0 if float(x.max()) > 0 else 1.0
        return s.head(s.rnn(x)[0][:, -1]) * scale

    model = Net(forward, rnn=nn.LSTM(8, 16, batch_first=True), head=nn.Linear(16, 2))
    found = autoprune.inspect(model, torch.randn(1, STEPS, 8))
    assert found.structure.device == "cpu"
    assert found.dense["flops"] == STEPS * 4 * 16 * (8 + 16) + 32
    assert [group.units for group in found.groups] == [16]
    assert torch.backends.mkldnn.enabled


@pytest.fixture
def unknown():
    """An operation of a library, of which nothing is known."""
    with torch.library._scoped_library("autoprune_test", "FRAGMENT") as library:
        library.define("mix(Tensor x, Tensor weight) -> Tensor")
        library.impl("mix", lambda x, weight: x @ weight.T, "CompositeExplicitAutograd")
        yield torch.ops.autoprune_test.mix
    registry.OPERATIONS.pop("autoprune_test::mix", None)


@pytest.mark.slow
def test_a_budget_on_flops_is_refused_where_an_operation_has_no_formula(unknown: Any):
    model = Net(
        lambda s, x: s.head(unknown(s.b(s.a(x)), s.w)),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 8),
        w=nn.Parameter(torch.randn(5, 8)),
        head=nn.Linear(5, 2),
    )
    x = torch.randn(4, 6)
    with pytest.raises(UnsupportedModelError, match=r"autoprune_test::mix.*latency_ms.*register_rule"):
        autoprune.search(model, "flops <= 50%", example=x, trials=1)
    assert "autoprune_test::mix" in str(autoprune.inspect(model, x))
    assert "flops leave out autoprune_test::mix" in " ".join(
        autoprune.search(model, "params <= 80%", example=x, trials=1, evaluator="adaptive_bn").notes
    )
    products = lambda record, op: [(1, [(op.args["x"].id, 0), *((op.args["weight"].id, d) for d in (0, 1))])]  # noqa: E731
    autoprune.register_rule("autoprune_test::mix", macs=products)
    assert autoprune.inspect(model, x).dense["flops"] == 48 + 64 + 40 + 10
