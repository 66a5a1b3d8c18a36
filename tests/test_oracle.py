"""The oracle against models sliced by hand."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle import Removed, count_macs, count_params, masked_forward
from zoo import ZOO, draw, settled

Slices = dict[str, dict[int, list[int]]]


def indices(slices: Slices) -> Removed:
    return {
        name: {dim: torch.tensor(gone, dtype=torch.int64) for dim, gone in dims.items()}
        for name, dims in slices.items()
    }


def channels(*names: str, gone: list[int]) -> Slices:
    """The same indices gone along dimension 0 of the weight and the bias of each module named."""
    return {f"{name}.{tensor}": {0: gone} for name in names for tensor in ("weight", "bias")}


def sliced_state(model: nn.Module, slices: Slices) -> dict[str, Tensor]:
    state = model.state_dict()
    for name, dims in slices.items():
        for dim, gone in dims.items():
            stay = [i for i in range(state[name].shape[dim]) if i not in gone]
            state[name] = state[name].index_select(dim, torch.tensor(stay))
    return state


def check(make: Callable[..., nn.Module], dense: tuple, small: tuple, shape: tuple[int, ...], slices: Slices) -> None:
    """The oracle agrees with ``make(*small)`` holding slices of the weights of ``make(*dense)``."""
    model = settled(lambda: make(*dense), (shape,))
    pruned = make(*small).eval()
    pruned.load_state_dict(sliced_state(model, slices))
    (x,) = draw((shape,), seed=5)
    expected = pruned(x)
    torch.testing.assert_close(masked_forward(model, indices(slices), (x,)), expected, rtol=0, atol=1e-5)
    assert (model(x) - expected).abs().max() > 1e-3, "removing these units must change the output"


class TestOutputsEqualThoseOfAModelSlicedByHand:
    def test_convolution_batch_norm_activation_convolution(self):
        def make(width: int) -> nn.Module:
            layers = (nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3))
            return nn.Sequential(*layers)

        gone = [0, 3, 4]
        slices = channels("0", "1", gone=gone) | {"3.weight": {1: gone}}
        slices |= {"1.running_mean": {0: gone}, "1.running_var": {0: gone}}
        check(make, (8,), (5,), (3, 8, 8), slices)

    def test_an_activation_that_turns_zero_into_something_else(self):
        def make(width: int) -> nn.Module:
            return nn.Sequential(nn.Linear(5, width), nn.Sigmoid(), nn.Linear(width, 3))

        check(make, (7,), (5,), (5,), channels("0", gone=[1, 6]) | {"2.weight": {1: [1, 6]}})

    def test_residual_addition(self):
        class Residual(nn.Module):
            def __init__(self, width: int):
                super().__init__()
                self.stem, self.body, self.head = (
                    nn.Conv2d(3, width, 1),
                    nn.Conv2d(width, width, 3, padding=1),
                    nn.Conv2d(width, 2, 1),
                )

            def forward(self, x: Tensor) -> Tensor:
                x = self.stem(x)
                return self.head(F.relu(x + self.body(x)))

        gone = [2, 5]
        slices = channels("stem", "body", gone=gone) | {"head.weight": {1: gone}}
        slices["body.weight"] = {0: gone, 1: gone}
        check(Residual, (6,), (4,), (3, 6, 6), slices)

    @pytest.mark.parametrize(
        ("gone", "small"),
        [
            pytest.param([1, 5, 6, 11], (8, 4), id="as many of each group"),
            pytest.param([3, 4, 5], (9, 3), id="a whole group"),
        ],
    )
    def test_group_norm_keeps_the_groups_that_remain(self, gone: list[int], small: tuple[int, int]):
        def make(width: int, groups: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, width, 3), nn.GroupNorm(groups, width), nn.Conv2d(width, 4, 1))

        check(make, (12, 4), small, (3, 6, 6), channels("0", "1", gone=gone) | {"2.weight": {1: gone}})

    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
    def test_norms_over_features(self, norm: type[nn.Module]):
        def make(width: int) -> nn.Module:
            return nn.Sequential(nn.Linear(5, width), norm(width), nn.Linear(width, 3))

        slices = channels("0", "1", gone=[0, 4]) | {"2.weight": {1: [0, 4]}}
        if norm is nn.RMSNorm:
            del slices["1.bias"]
        check(make, (8,), (6,), (5,), slices)

    def test_layer_norm_over_a_whole_map(self):
        def make(width: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, width, 1), nn.LayerNorm((width, 4, 4)), nn.Conv2d(width, 2, 1))

        check(make, (6,), (5,), (3, 4, 4), channels("0", "1", gone=[2]) | {"2.weight": {1: [2]}})

    def test_flattened_map_into_a_linear_layer(self):
        def make(width: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Flatten(), nn.Linear(width * 4, 3))

        pixels = [4 * channel + pixel for channel in (1, 3) for pixel in range(4)]
        check(make, (5,), (3,), (3, 2, 2), channels("0", gone=[1, 3]) | {"3.weight": {1: pixels}})

    @pytest.mark.parametrize("groups", [1, 2])
    def test_transposed_convolution_keeps_its_outputs_in_dimension_one(self, groups: int):
        def make(width: int) -> nn.Module:
            up = nn.ConvTranspose2d(4, width, 2, stride=2, groups=groups)
            return nn.Sequential(nn.Conv2d(3, 4, 1), up, nn.ReLU(), nn.Conv2d(width, 2, 1))

        each = 6 // groups
        outputs = [group * each + 1 for group in range(groups)]
        slices = {"1.weight": {1: [1]}, "1.bias": {0: outputs}, "3.weight": {1: outputs}}
        check(make, (6,), (6 - groups,), (3, 4, 4), slices)

    def test_depthwise_convolution(self):
        def make(width: int) -> nn.Module:
            depthwise = nn.Conv2d(width, width, 3, groups=width)
            return nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(width, 2, 1))

        gone = [0, 2]
        check(make, (6,), (4,), (3, 5, 5), channels("0", "2", gone=gone) | {"4.weight": {1: gone}})

    def test_grouped_convolution_that_loses_inputs_and_outputs(self):
        def make(inputs: int, outputs: int) -> nn.Module:
            grouped = nn.Conv2d(inputs, outputs, 3, groups=2)
            return nn.Sequential(nn.Conv2d(3, inputs, 1), nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(outputs, 2, 1))

        slices = channels("0", gone=[1, 5]) | channels("2", gone=[0, 4]) | {"4.weight": {1: [0, 4]}}
        slices["2.weight"] = {0: [0, 4], 1: [1]}
        check(make, (8, 6), (6, 4), (3, 5, 5), slices)

    def test_a_module_called_twice(self):
        class Twice(nn.Module):
            def __init__(self, width: int):
                super().__init__()
                self.stem, self.body, self.head = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 2)

            def forward(self, x: Tensor) -> Tensor:
                x = torch.sigmoid(self.body(torch.sigmoid(self.stem(x))))
                return self.head(torch.sigmoid(self.body(x)))

        slices = channels("stem", "body", gone=[3]) | {"head.weight": {1: [3]}}
        slices["body.weight"] = {0: [3], 1: [3]}
        check(Twice, (6,), (5,), (4,), slices)


def test_tied_weights_may_be_named_by_any_of_their_aliases():
    entry = ZOO["tied"]
    model, args = entry.build(), entry.inputs()
    by_first = masked_forward(model, indices({"first.weight": {0: [1], 1: [2]}}), args)
    torch.testing.assert_close(masked_forward(model, indices({"second.weight": {0: [1], 1: [2]}}), args), by_first)
    split = indices({"first.weight": {0: [1]}, "second.weight": {1: [2]}})
    torch.testing.assert_close(masked_forward(model, split, args), by_first)
    assert (by_first - model(*args)).abs().max() > 1e-3


@pytest.mark.parametrize("training", [False, True])
def test_the_model_stays_as_it_was(training: bool):
    model, args = ZOO["mobilenet_v3"].build().train(training), ZOO["mobilenet_v3"].inputs()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masked_forward(model, indices({"0.0.weight": {0: [0]}}), args)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.training is training


@pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO.keys())
def test_removing_no_index_gives_the_dense_outputs(entry):
    model, args = entry.build(), entry.inputs()
    nothing = indices({name: {0: []} for name in model.state_dict()})
    torch.testing.assert_close(masked_forward(model, nothing, args), model(*args), rtol=0, atol=1e-5)


def test_an_unknown_name_is_refused():
    with pytest.raises(KeyError, match="wieght"):
        masked_forward(nn.Linear(2, 2), indices({"wieght": {0: [0]}}), (torch.zeros(1, 2),))


def test_costs_equal_those_counted_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
    )
    macs = 8 * 3 * 9 * 6 * 6 + 8 * 2 * 9 * 4 * 4 + 8 * 3 * 4 * 4 * 4  # a transposed one multiplies at every input pixel
    assert count_macs(model, (torch.zeros(5, 3, 8, 8),)) == 5 * macs
    assert count_params(model) == (8 * 3 * 9 + 8) + (8 * 2 * 9 + 8) + (8 * 3 * 4 + 6)
    assert count_params(ZOO["tied"].build()) < sum(
        t.numel() for _, t in ZOO["tied"].build().named_parameters(remove_duplicate=False)
    )
