"""Models and arguments that are refused, and what the errors say."""

import pytest
import torch
from torch import nn

from autoprune.errors import DataError, NothingToPruneError, StructureCheckError, UnsupportedModelError
from autoprune.protocols import Pruning
from autoprune.structure.analysis import analyse, require_prunable
from autoprune.structure.example import Example
from tests.small_networks import IMAGE, Net, conv, flattened, known, picks, residual
from zoo import draw, settled


class TestWhatIsRefused:
    def test_scripted_modules(self):
        with pytest.warns(DeprecationWarning, match="deprecated"):
            scripted = torch.jit.trace(conv(3, 4), torch.zeros(1, *IMAGE))
        with pytest.raises(UnsupportedModelError, match=r"module '1' is a ScriptModule .* pass the module that was"):
            analyse(Example(nn.Sequential(conv(3, 3), scripted), draw((IMAGE,))))

    def test_quantised_modules(self):
        class Packed(nn.Linear):
            _packed_params = None

        with pytest.raises(UnsupportedModelError, match="must not be quantised, but module '0' is Packed; prune first"):
            analyse(Example(nn.Sequential(Packed(4, 4)), (torch.zeros(1, 4),)))

    def test_several_devices(self):
        model = nn.Sequential(conv(3, 4), conv(4, 2).to("meta"))
        with pytest.raises(UnsupportedModelError, match=r"one device, got \['cpu', 'meta'\]; call model.to\(device\)"):
            analyse(Example(model, draw((IMAGE,))))

    def test_a_model_without_values(self):
        with pytest.raises(UnsupportedModelError, match="on the meta device; load its weights first"):
            analyse(Example(conv(3, 4).to("meta"), draw((IMAGE,))))

    def test_uninitialised_parameters(self):
        with pytest.raises(UnsupportedModelError, match=r"uninitialised parameter '0.weight'; run it once"):
            analyse(Example(nn.Sequential(nn.LazyLinear(3)), (torch.zeros(1, 4),)))

    def test_what_python_cannot_copy(self):
        net = Net(lambda s, x: x, stream=(i for i in range(3)))
        with pytest.raises(
            UnsupportedModelError, match=r"copyable with copy.deepcopy, but Net raised .* move the attr"
        ):
            analyse(Example(net, draw((IMAGE,))))

    def test_outputs_without_a_tensor(self):
        with pytest.raises(
            UnsupportedModelError, match=r"at least one tensor, got int; return one with autoprune.Call"
        ):
            analyse(Example(Net(lambda s, x: len(x)), draw((IMAGE,))))

    def test_weights_that_are_not_numbers(self):
        model = settled(flattened, (IMAGE,))
        model[0].weight.data[0, 0, 0, 0] = float("nan")
        with pytest.raises(
            ValueError, match=r"finite outputs for the example inputs, got NaN .* pass as example= what"
        ):
            analyse(Example(model, draw((IMAGE,))))

    def test_unknown_checks(self):
        with pytest.raises(ValueError, match=r"checks must be one of \['on', 'strict', 'isolated'\], got 'off'"):
            analyse(Example(flattened(), draw((IMAGE,))), checks="off")

    def test_a_failed_check_when_checks_are_strict(self):
        with pytest.raises(StructureCheckError, match=r"1 groups failed: a: the permutation check saw"):
            analyse(Example(picks(lambda s, x: s.head(s.a(x).cumsum(1)))(), draw((IMAGE,))), checks="strict")

    def test_the_error_of_the_model_itself_is_shown(self):
        with pytest.raises(DataError, match=r"RuntimeError: .*expected input.* to have 3 channels, but got 2"):
            analyse(Example(flattened(), (torch.zeros(1, 2, 8, 8),)))

    def test_nothing_to_prune_says_why(self):
        structure = analyse(Example(conv(3, 4), draw((IMAGE,))))
        with pytest.raises(
            NothingToPruneError, match=r"nothing to prune: .*returned by the model .*reads the model's in"
        ):
            require_prunable(structure)
        with pytest.raises(NothingToPruneError, match="no parameters that its forward reads"):
            require_prunable(analyse(Example(nn.ReLU(), draw((IMAGE,)))))
        require_prunable(analyse(Example(flattened(), draw((IMAGE,)))))

    @pytest.mark.parametrize(
        ("kept", "message"),
        [
            ({"stm": (0,)}, "got 'stm'; see"),
            ({"stem": ()}, "one or more units"),
            ({"stem": (0, 8)}, r"in \[0, 8\), got"),
        ],
    )
    def test_prunings_of_other_models(self, kept: dict[str, tuple[int, ...]], message: str):
        model, _, structure = known(residual)
        with pytest.raises(ValueError, match=message):
            structure.build(model, Pruning(kept))
