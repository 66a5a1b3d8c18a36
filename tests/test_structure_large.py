"""Checks of large examples and models: values on the beginning of the example, modules in float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoprune.structure import analysis, example
from autoprune.structure.analysis import analyse, best_choices
from autoprune.structure.checks import checks, shorter, values
from autoprune.structure.checks.shorter import shorten
from autoprune.structure.example import Example
from autoprune.structure.propagate import propagate
from autoprune.structure.tracing.trace import trace
from autoprune.structure.units import find_units
from tests.candidates import gap
from tests.small_networks import Net, assert_right, slots_of

WORDS = 50


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def reader(**options: Any) -> nn.Module:
    """A gated layer and a residual connection on words."""

    def forward(s: Net, ids: Tensor) -> Tensor:
        x = s.words(ids)
        left, right = s.a(x).chunk(2, -1)
        return s.head(s.norm(x + s.b(left * right.sigmoid())))

    layers = {"words": nn.Embedding(WORDS, 8), "a": nn.Linear(8, 24), "b": nn.Linear(12, 8)}
    return Net(forward, **layers, norm=nn.LayerNorm(8), head=nn.Linear(8, 3), **options)


def words(samples: int = 4, tokens: int = 32) -> Tensor:
    return torch.randint(0, WORDS, (samples, tokens), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shorter, "ENOUGH_MACS", 2000)
    monkeypatch.setattr(values, "DEAR_WORK", 1)


@pytest.mark.usefixtures("everything_is_large")
class TestValuesOfALargeExample:
    @pytest.mark.slow
    def test_are_checked_on_its_beginning_in_a_single_draw(self, monkeypatch: pytest.MonkeyPatch):
        model, ids = made(reader), words()
        seen = []
        agree = values.Values.agree
        monkeypatch.setattr(
            values.Values, "agree", lambda self, *a: (seen.append(self.inputs[0].shape), agree(self, *a))[1]
        )
        structure = analyse(Example(model, (ids,)))
        assert seen == [(2, 8)]
        assert_right(model, (ids,), structure)
        monkeypatch.setattr(shorter, "ENOUGH_MACS", 2**40)
        assert slots_of(analyse(Example(model, (ids,)))) == slots_of(structure)
        assert seen[-1] == (4, 32)

    @pytest.mark.slow
    def test_show_every_coupling_that_is_forgotten(self, monkeypatch: pytest.MonkeyPatch):
        model, args = made(reader), (words(),)
        whole = slots_of(analyse(Example(model, args)))
        flow, _ = best_choices(trace(Example(model, args)))
        changed = 0
        for i in range(len(flow.edges)):

            def forget(flow: Any, i: int = i) -> Any:
                return dataclasses.replace(flow, edges=flow.edges[:i] + flow.edges[i + 1 :])

            broken = forget(flow)
            monkeypatch.setattr(analysis, "best_choices", lambda record, flow=broken: (flow, find_units(flow)))
            monkeypatch.setattr(shorter, "propagate", lambda *args, forget=forget: forget(propagate(*args)))
            found = analyse(Example(model, args))
            assert_right(model, args, found)
            changed += slots_of(found) != whole
        assert changed > 1, "a coupling that does not matter cannot be caught"

    @pytest.mark.slow
    def test_are_checked_on_its_beginning_where_heads_and_samples_share_a_dimension(
        self, monkeypatch: pytest.MonkeyPatch
    ):
        """The labels of each sample are joined there, so there are fewer joins of fewer samples."""

        def forward(s: Net, ids: Tensor) -> Tensor:
            x = s.words(ids)
            (b, t, _), heads = x.shape, s.q.weight.shape[0] // 4
            q, k, v = (part(x).view(b, t, heads, 4).transpose(1, 2).reshape(-1, t, 4) for part in (s.q, s.k, s.v))
            mixed = torch.bmm((torch.bmm(q, k.transpose(1, 2)) / 2).softmax(-1), v)
            return s.head(mixed.view(b, heads, t, 4).transpose(1, 2).reshape(b, t, heads * 4))

        layers = {name: nn.Linear(8, 12) for name in ("q", "k", "v")} | {"head": nn.Linear(12, 3)}
        model, seen = made(lambda: Net(forward, words=nn.Embedding(WORDS, 8), **layers)), []
        agree = values.Values.agree
        monkeypatch.setattr(
            values.Values, "agree", lambda self, *a: (seen.append(self.inputs[0].shape), agree(self, *a))[1]
        )
        structure = analyse(Example(model, (words(),)))
        assert {tuple(shape) for shape in seen} == {(2, 8)}
        assert "q" in slots_of(structure)

    def test_an_error_on_the_beginning_alone_freezes_nothing(self):
        def forward(s: Net, ids: Tensor) -> Tensor:
            factor = 2.0 if len(ids) < 4 and s.a.weight.shape[0] < 12 else 1.0
            return s.head(s.a(s.words(ids)) * factor)

        layers = {"words": nn.Embedding(WORDS, 8), "a": nn.Linear(8, 12), "head": nn.Linear(12, 3)}
        found = analyse(Example(made(lambda: Net(forward, **layers)), (words(),)))
        assert "a" in slots_of(found)

    @pytest.mark.slow
    def test_ties_that_the_code_needs_hold_there_as_well(self, monkeypatch: pytest.MonkeyPatch):
        def forward(s: Net, ids: Tensor) -> Tensor:
            b, t = ids.shape
            x = s.a(s.words(ids))
            y = s.b(x.relu())
            return s.head(y.reshape(b, t, x.shape[-1]))

        layers = {"words": nn.Embedding(WORDS, 8), "a": nn.Linear(8, 12), "b": nn.Linear(12, 12)}
        model = made(lambda: Net(forward, **layers, head=nn.Linear(12, 3)))
        asked = []
        monkeypatch.setattr(checks, "shorten", lambda *a: asked.append(shorten(*a)) or asked[-1])
        structure = analyse(Example(model, (words(),)), rewrite="off")
        assert asked
        assert asked[0] is not None
        tied = next(group for group in structure.groups if group.name == "a")
        assert {"a.weight", "b.weight"} <= {slot.tensor for slot in tied.slots}
        assert_right(model, (words(),), structure)

    @pytest.mark.parametrize(
        ("samples", "tokens", "left"), [(4, 32, (2, 8)), (1, 64, (1, 8)), (64, 7, (1, 7)), (4, 33, (2, 17))]
    )
    def test_the_beginning_keeps_two_samples_and_halves_of_the_length_or_else_one_sample(
        self, samples: int, tokens: int, left: tuple[int, int]
    ):
        model, inputs = made(reader), [((words(samples, tokens),), {})]
        flow, _ = best_choices(trace(Example(model, *inputs[0])))
        short = shorten(flow, Example(model, *inputs[0]))
        assert short is not None
        assert short.example.args[0].shape == left
        assert torch.equal(short.example.args[0], inputs[0][0][0][: left[0], : left[1]])

    def test_a_model_of_one_length_is_checked_on_one_sample_unless_it_squeezes_that(self):
        def forward(s: Net, ids: Tensor, squeezes: bool = False) -> Tensor:
            x = s.a(s.words(ids)).reshape(-1, 32 * 12)
            return s.head(x.squeeze(0) if squeezes else x)

        layers = {"words": nn.Embedding(WORDS, 8), "a": nn.Linear(8, 12), "head": nn.Linear(32 * 12, 3)}
        for squeezes, samples in ((False, 1), (True, 2)):
            example = Example(Net(forward, **layers), (words(),), {"squeezes": squeezes})
            short = shorten(best_choices(trace(example))[0], example)
            assert short is not None
            assert short.example.args[0].shape == (samples, 32)

    def test_indices_into_other_inputs_are_not_cut(self):
        net = Net(lambda s, x, rows: s.b(s.a(x))[rows], a=nn.Linear(8, 12), b=nn.Linear(12, 3))
        inputs = [((torch.randn(64, 8), torch.randint(0, 64, (64,))), {})]
        flow, _ = best_choices(trace(Example(net, *inputs[0])))
        assert shorten(flow, Example(net, *inputs[0])) is None

    def test_a_model_that_needs_the_sizes_it_was_given_is_checked_on_the_whole(self):
        def forward(s: Net, ids: Tensor) -> Tensor:
            return s.head(s.a(s.words(ids)).reshape(4, 32, -1).mean(1))

        net = Net(forward, words=nn.Embedding(WORDS, 8), a=nn.Linear(8, 12), head=nn.Linear(12, 3))
        inputs = [((words(),), {})]
        flow, _ = best_choices(trace(Example(net, *inputs[0])))
        assert shorten(flow, Example(net, *inputs[0])) is None
        assert_right(net, (words(),), analyse(Example(net, (words(),))))


@pytest.mark.parametrize("whole", [0, 2**28], ids=["each weight when it is read", "all weights at once"])
def test_a_forward_that_names_float32_runs_in_float64_all_the_same(whole: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(example, "WIDE", whole)

    def forward(s: Net, x: Tensor) -> Tensor:
        x = s.a(x).to(torch.float32)
        return s.b((x * torch.rsqrt(x.square().mean(-1, keepdim=True))).to(s.b.weight.dtype) * s.table)

    layers = {"a": nn.Linear(8, 12), "b": nn.Linear(12, 3)}
    model, x = made(lambda: Net(forward, **layers, table=torch.rand(12))), torch.randn(5, 8)
    (found,) = Example(model, (x,)).run(model, wide=True)
    a, b = (torch.nn.Linear(*s).double() for s in ((8, 12), (12, 3)))
    a.load_state_dict(model.get_submodule("a").state_dict())
    b.load_state_dict(model.get_submodule("b").state_dict())
    middle = a(x.double())
    expected = b(middle * torch.rsqrt(middle.square().mean(-1, keepdim=True)) * model.table.double())
    assert found.dtype == torch.float64
    assert gap([found], [expected.detach()]) < 1e-14
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_cache_that_is_yet_empty_needs_no_real_values():
    def forward(s: Net, x: Tensor) -> Tensor:
        cache = torch.tensor([], dtype=x.dtype, device=x.device)
        return s.b(torch.cat([cache, s.a(x)], -2))

    model, x = made(lambda: Net(forward, a=nn.Linear(8, 12), b=nn.Linear(12, 3))), torch.randn(2, 5, 8)
    structure = analyse(Example(model, (x,)))
    assert structure.device == "meta"
    assert [group.size for group in structure.groups] == [12]
    assert_right(model, (x,), structure)
