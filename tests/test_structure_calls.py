"""Ways to call a model, for each of which its structure is found."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.costs import StructuralCosts
from autoprune.protocols import Pruning
from autoprune.structure.analysis import analyse
from autoprune.structure.example import Example
from tests.candidates import state_of, widths_of
from tests.small_networks import IMAGE, Net, assert_right, conv, flattened, known, residual, slots_of
from zoo import draw, settled


class TestHowAModelIsCalled:
    def test_keyword_and_nested_inputs(self):
        def forward(s: Net, batch: dict[str, Any], *, scale: Tensor) -> dict[str, Any]:
            return {"scores": [s.head(F.relu(s.a(batch["image"][0])) * scale), None], "name": "x"}

        model = settled(residual, (IMAGE,))
        net = Net(forward, a=model.stem, head=model.head).eval()
        (x,) = draw((IMAGE,))
        structure = analyse(Example(net, ({"image": (x, "label")},), {"scale": torch.tensor(2.0)}))
        assert slots_of(structure) == {"a": (8, "a.bias:0 a.weight:0 head.weight:1")}

    def test_a_callable_says_which_outputs_matter(self):
        model = settled(lambda: Net(lambda s, x: (s.b(s.a(x)), s.a(x)), a=conv(3, 8), b=conv(8, 2)), (IMAGE,))
        args = draw((IMAGE,))
        assert analyse(Example(model, args)).groups == ()
        structure = analyse(Example(model, args, forward=lambda m, x: m(x)[0]))
        assert [group.name for group in structure.groups] == ["a"]

    @pytest.mark.slow
    def test_a_model_in_training_mode_with_dropout_comes_back_training(self):
        model = settled(lambda: nn.Sequential(conv(3, 8), nn.Dropout2d(), nn.BatchNorm2d(8), conv(8, 2)), (IMAGE,))
        structure = analyse(Example(model.train(), draw((IMAGE,))))
        assert model.training
        assert structure.build(model, Pruning({"0": (0, 1)})).training
        assert_right(model.eval(), draw((IMAGE,)), structure)

    @pytest.mark.slow
    def test_modules_in_a_plain_list_and_several_calls(self):
        net = Net(lambda s, x: s.head(s.hidden[0](s.hidden[0](s.stem(x)))), stem=conv(3, 8), head=conv(8, 2, 1))
        net.shared = nn.ModuleDict({"block": conv(8, 8, padding=1)})
        net.hidden = [net.shared["block"]]
        model, args, structure = known(lambda: net)
        assert [(group.name, group.size) for group in structure.groups] == [("stem", 8)]
        assert_right(model, args, structure)

    @pytest.mark.parametrize("batch", [1, 3])
    def test_any_batch_size(self, batch: int):
        model, args = settled(flattened, (IMAGE,)), draw((IMAGE,), batch)
        assert_right(model, args, analyse(Example(model, args)))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_any_floating_point_type(self, dtype: torch.dtype):
        model, (x,) = settled(residual, (IMAGE,)).to(dtype), draw((IMAGE,))
        structure = analyse(Example(model, (x.to(dtype),)))
        assert [group.size for group in structure.groups] == [8]
        assert structure.build(model, Pruning({"stem": (0, 5)})).stem.weight.dtype == dtype

    @pytest.mark.slow
    def test_inference_mode_around_the_call_changes_nothing(self):
        model, args = settled(residual, (IMAGE,)), draw((IMAGE,))
        with torch.inference_mode():
            structure = analyse(Example(model, args))
        assert slots_of(structure) == slots_of(analyse(Example(model, args)))

    @pytest.mark.slow
    def test_an_activation_kept_from_an_earlier_pass_is_no_obstacle(self):
        def forward(s: Net, x: Tensor) -> Tensor:
            s.last = s.a(x)
            return s.head(s.last.relu())

        model, args, _ = known(lambda: Net(forward, a=conv(3, 8), head=conv(8, 2)))
        model(*args)
        kept = model.last
        assert not kept.is_leaf
        assert_right(model, args, analyse(Example(model, args)))
        assert analyse(Example(model, args)).groups

    def test_parameters_that_no_operation_reads_are_reported_and_stay(self):
        net = residual()
        net.unused = nn.Linear(4, 6)
        net.register_buffer("idle", torch.ones(5))
        model, _, structure = known(lambda: net)
        assert structure.untouched == ("unused.weight", "unused.bias")
        assert [group.name for group in structure.groups] == ["stem"]
        assert structure.build(model, Pruning({"stem": (1,)})).unused.weight.shape == (6, 4)
        built = structure.build(model, Pruning({"stem": (1,)}))
        predicted = StructuralCosts(structure).params(widths_of(structure, [Pruning({"stem": (1,)})]))
        assert predicted[0] == sum(p.numel() for p in built.parameters())

    def test_a_forward_that_writes_to_its_inputs_and_buffers_changes_neither(self, global_rng_untouched):
        def forward(s: Net, x: Tensor) -> Tensor:
            s.calls += 1
            s.seen.mul_(0.5)
            x += torch.rand(()).item() * 0
            return s.head(s.a(x))

        net = Net(forward, a=conv(3, 8), head=conv(8, 2))
        net.register_buffer("calls", torch.zeros(()))
        net.seen = torch.ones(2)
        args, before = draw((IMAGE,)), state_of(net)
        with global_rng_untouched():
            structure = analyse(Example(net, args))
        assert structure.groups
        assert state_of(net) == before
        assert net.seen.tolist() == [1, 1]
        assert torch.equal(args[0], draw((IMAGE,))[0])


@pytest.mark.slow
def test_several_examples_cover_the_branches_of_a_forward():
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.a(x)
        return s.head(y + s.b(x) if x.mean() > 0 else s.c(y) + y)

    model = settled(lambda: Net(forward, a=conv(3, 8), b=conv(3, 8), c=conv(8, 8, 1), head=conv(8, 2, 1)), (IMAGE,))
    bright, dark = torch.rand(2, *IMAGE), -torch.rand(2, *IMAGE)
    one = analyse(Example(model, (bright,)))
    both = analyse(Example(model, (bright,), further=[((dark,), {})]))
    assert one.untouched == ("c.weight", "c.bias")
    assert both.untouched == ()
    assert slots_of(both) == {
        "a": (8, "a.bias:0 a.weight:0 b.bias:0 b.weight:0 c.bias:0 c.weight:0 c.weight:1 head.weight:1")
    }
    for x in (bright, dark):
        assert_right(model, (x,), both)
    dense = np.array([[8.0]])
    for cost in ("flops", "memory_bytes"):
        assert getattr(StructuralCosts(both), cost)(dense) == getattr(StructuralCosts(one), cost)(dense)


def test_tracing_leaves_no_hooks_behind():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    analyse(Example(model, (torch.randn(2, 4),)))
    assert not torch.nn.modules.module._has_any_global_hook()
    assert not any(module._forward_hooks_with_kwargs for module in model.modules())
