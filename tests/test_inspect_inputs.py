"""Example inputs that a model is inspected on: given, carried by the model, and seen through wrappers."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autoprune.inspection import inspect
from autoprune.structure.given import example_inputs_of, examples_of, unwrap
from tests.small_networks import perceptron


def test_given_inputs_are_told_apart_by_type():
    x, y = torch.ones(2, 4), torch.zeros(2)
    model = perceptron()
    model.example_input_array = y  # what is given goes before what the model carries
    for given, expected in ((x, ((x,), {})), ((x, y), ((x, y), {})), ({"x": x}, ((), {"x": x})), ((), ((), {}))):
        found = example_inputs_of(model, given)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)  # also containers of another type or length
        assert not {id(tensor) for tensor in (x, y)} & {id(leaf) for leaf in tree_leaves(found)}  # copies


@pytest.mark.parametrize("given", [[[torch.ones(2, 4)]], 3, {0: torch.ones(2, 4)}])
def test_inputs_of_another_form_are_refused(given):
    wrong = type(given[0] if isinstance(given, list) else given).__name__
    with pytest.raises(ValueError, match=rf"example must be a tensor, .* got {wrong}; .*\(x,\)"):
        examples_of(perceptron(), given)


def test_an_empty_list_of_examples_is_refused():
    with pytest.raises(ValueError, match="example must hold at least one example, got an empty list"):
        inspect(perceptron(), [])


def test_a_model_without_an_example_asks_for_one():
    with pytest.raises(ValueError, match="example must be given, because Sequential carries no example"):
        inspect(perceptron())


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("example_input_array", torch.ones(2, 4)),
        ("example_input_array", (torch.ones(2, 4),)),
        ("example_input_array", {"input": torch.ones(2, 4)}),
        ("dummy_inputs", torch.ones(2, 4)),
        ("dummy_inputs", {"input": torch.ones(2, 4)}),
        ("default_cfg", {"input_size": (4,)}),
        ("pretrained_cfg", {"input_size": (4,), "url": ""}),
    ],
)
def test_the_model_may_carry_its_own_example(attribute, value):
    model = perceptron()
    setattr(model, attribute, value)
    assert [group.name for group in inspect(model).groups] == ["0"]


def test_an_example_drawn_from_noise_is_always_the_same_and_moves_no_random_state(global_rng_untouched):
    class Drawn(nn.Sequential):
        @property
        def example_input_array(self) -> Tensor:
            return torch.randn(2, 4)

    sized = perceptron().double()
    sized.default_cfg = {"input_size": (3, 8, 8)}
    with global_rng_untouched():
        for model, shape in ((Drawn(*perceptron()), (2, 4)), (sized, (2, 3, 8, 8))):
            (first,), (second,) = example_inputs_of(model)[0], example_inputs_of(model)[0]
            assert first.shape == shape
            assert torch.equal(first, second)
    assert first.dtype == torch.float64
    assert first.std() > 0.5


def test_dummy_inputs_that_are_not_the_main_input_are_passed_over():
    model = perceptron()
    model.dummy_inputs = {"input_ids": torch.ones(2, 4, dtype=torch.int64)}
    model.main_input_name = "pixel_values"
    with pytest.raises(ValueError, match="example must be given"):
        example_inputs_of(model)
    model.main_input_name = "input_ids"
    assert set(example_inputs_of(model)[1]) == {"input_ids"}


@pytest.mark.slow
def test_wrappers_are_looked_through():
    model = perceptron()
    model.example_input_array = torch.ones(2, 4)
    parallel = nn.DataParallel(model)
    compiled = partial(torch.compile, backend="eager")
    for wrapped in (model, parallel, compiled(model), compiled(parallel), nn.DataParallel(parallel)):
        assert unwrap(wrapped) is model
    assert inspect(compiled(parallel)).to_dict() == inspect(model).to_dict()


def test_distributed_data_parallel_is_looked_through():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = perceptron()
        assert unwrap(nn.parallel.DistributedDataParallel(model)) is model
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_of_its_own_called_module_is_no_wrapper():
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = perceptron()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    assert [group.name for group in inspect(Owner(), torch.ones(2, 4)).groups] == ["module.0"]
