"""Containers of any kind may hold what a model takes and returns, and modules hand each other."""

from collections import OrderedDict, UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import autoprune
from autoprune.structure.analysis import analyse
from autoprune.structure.containers import map_tensors, tensors_in
from autoprune.structure.example import Example
from tests.small_networks import Net


class Pair(NamedTuple):
    left: Tensor
    right: Any


@dataclass(frozen=True)
class Checked:
    """A dataclass that looks at what it is given."""

    x: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.x, Tensor) or self.x.ndim != 2:
            raise ValueError("x must be a matrix")


class Graph:
    """A plain object, as those of graph libraries."""

    def __init__(self, x: Tensor, edges: Tensor) -> None:
        if x.shape[1] != 6:
            raise ValueError("x must have six features")
        self.x, self.edges, self.whole = x, edges, self


class Frozen(Mapping[str, Tensor]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __getitem__(self, key: str) -> Tensor:
        return {"x": self.x}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


X = torch.arange(12.0).view(2, 6)
TREES = {
    "nested": {"a": [X, (X, 3)], "b": OrderedDict(c=X)},
    "named tuple": Pair(X, [X]),
    "packed sequence": PackedSequence(X, torch.tensor([1, 1])),
    "dataclass": Checked(X),
    "user's mapping": UserDict(x=X),
    "frozen mapping": Frozen(X),
    "object that refers to itself": Graph(X, X.long()),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_tensors_are_replaced_in_a_copy_of_the_container(tree: Any):
    found = tensors_in(tree, objects=True)
    mapped = map_tensors(lambda tensor: tensor + 1, tree)
    assert isinstance(mapped, Mapping if isinstance(tree, Frozen) else type(tree))
    for old, new in zip(found, tensors_in(mapped, objects=True), strict=True):
        assert torch.equal(old + 1, new)
    assert all(a is b for a, b in zip(found, tensors_in(tree, objects=True), strict=True))


def test_what_holds_no_tensor_stays_the_same_object():
    for tree in ("text", 3, None, [1, (2, "a")], nn.Linear(2, 2)):
        assert map_tensors(torch.clone, tree) is tree


CALLS = {
    "dataclass between modules": (lambda s, x: s.b(s.mid(Checked(s.a(x).relu())).x), lambda x: x),
    "dataclass of inputs": (lambda s, x: s.b(s.a(x.x).relu()), Checked),
    "dataclass of outputs": (lambda s, x: Checked(s.b(s.a(x).relu())), lambda x: x),
    "object of inputs": (lambda s, x: s.b(s.a(x.x).relu()), lambda x: Graph(x, x.long())),
    "mapping of inputs": (lambda s, x: s.b(s.a(x["x"]).relu()), lambda x: UserDict(x=x)),
}


@pytest.mark.parametrize(("run", "wrap"), CALLS.values(), ids=CALLS)
def test_models_that_take_or_pass_on_containers_are_traced_without_values(run: Any, wrap: Any):
    model = Net(run, a=nn.Linear(6, 8), b=nn.Linear(8, 3), mid=Net(lambda s, x: x))
    structure = analyse(Example(model, (wrap(torch.randn(2, 6)),)))
    assert [(group.name, group.size) for group in structure.groups] == [("a", 8)]
    assert (structure.device, structure.terms.batch) == ("meta", 2)


def packed(s: Net, x: Tensor) -> Tensor:
    steps = pack_padded_sequence(s.embed(x), torch.tensor([6, 4]).expand(2)[: len(x)], batch_first=True)
    hidden, _ = pad_packed_sequence(s.rnn(steps)[0], batch_first=True)
    return s.head(hidden.mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_packed_sequences_are_pruned(kind: type[nn.RNNBase]):
    rnn = kind(12, 24, batch_first=True, bidirectional=True)
    model = Net(packed, embed=nn.Linear(4, 12), rnn=rnn, head=nn.Linear(48, 3))
    x = torch.randn(2, 6, 4)
    found = autoprune.inspect(model, x)
    assert found.removable["flops"] > 0.9
    assert sorted(group.units for group in found.groups) == [
        12,
        24,
    ]  # the layer itself stacks what both directions end with
    gates = {nn.GRU: 3, nn.LSTM: 4, nn.RNN: 1}[kind]
    steps = 6 + 4
    assert 2 * found.dense["flops"] == 12 * 4 * 12 + steps * 2 * gates * 24 * (12 + 24) + 2 * 48 * 3


@pytest.mark.slow
def test_a_search_may_prune_packed_sequences():
    rnn = nn.GRU(12, 24, batch_first=True)
    lengths = lambda s, x: packed(s, x) if len(x) < 3 else s.head(s.rnn(s.embed(x))[0].mean(1))  # noqa: E731
    model = Net(lengths, embed=nn.Linear(4, 12), rnn=rnn, head=nn.Linear(24, 3))
    result = autoprune.search(model, "flops <= 50%", example=torch.randn(2, 6, 4), trials=3, optimizer="random")
    built = result.build()
    assert built(torch.randn(2, 6, 4)).shape == (2, 3)
    built.train()(torch.randn(5, 6, 4)).sum().backward()


def test_windows_behind_a_short_time_fourier_transform_keep_their_strides():
    def forward(s: Net, x: Tensor) -> Tensor:
        signal = s.filters(x)
        spectrum = torch.stft(signal.flatten(0, 1), 16, 4, window=torch.hann_window(16), return_complex=True).abs()
        return s.head(s.body(spectrum.mean(-1).unflatten(0, (len(x), -1))).relu().mean(1))

    model = Net(forward, filters=nn.Conv1d(1, 8, 5), body=nn.Linear(9, 12), head=nn.Linear(12, 2))
    structure = analyse(Example(model, (torch.randn(2, 1, 64),)))
    assert "body" in {group.name for group in structure.groups}
    assert not [frozen for frozen in structure.frozen if "check" in frozen.reason]


def test_channels_pass_windows_that_slide_over_time():
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.a(x).contiguous()
        batch, channels, time = y.shape
        windows = y.as_strided((batch, channels, time // 2 - 1, 4), (channels * time, time, 2, 1))
        return s.head(windows.amax(3).mean(2))

    model = Net(forward, a=nn.Conv1d(3, 8, 3), head=nn.Linear(8, 2))
    structure = analyse(Example(model, (torch.randn(2, 3, 18),)))
    assert [(group.name, group.size) for group in structure.groups] == [("a", 8)]
