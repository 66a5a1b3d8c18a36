"""The zoo and the trained model are what other tests take them for."""

import random

import pytest
import torch
from torch import nn

from tests.oracle import count_params
from zoo import ZOO, Entry, mobilenet_v2, resnet
from zoo.outputs import leaves

entries = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO.keys())


@entries
def test_every_network_is_the_same_each_time_and_leaves_the_random_state_alone(entry: Entry, global_rng_untouched):
    with global_rng_untouched():
        first, second, args = entry.build(), entry.build(), entry.inputs()
        outputs, again = first(*args), second(*entry.inputs())
    assert not first.training
    torch.testing.assert_close(outputs, again, rtol=0, atol=0)
    assert all(leaf.isfinite().all() and 0.1 < leaf.std() < 10 for leaf in leaves(outputs))


@entries
def test_no_two_channels_of_a_network_have_the_same_norm(entry: Entry):
    for name, module in entry.build().named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | nn.BatchNorm3d):
            for key in ("weight", "bias", "running_mean", "running_var"):
                values = module.state_dict()[key]
                assert len(values.unique()) == len(values), name


def test_constructors_give_the_published_sizes():
    assert count_params(resnet(20, pad=True)) == 269_722
    assert count_params(resnet(56, pad=True)) == 853_018
    assert count_params(mobilenet_v2(classes=1000)) == 3_504_872


def test_a_depth_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="21"):
        resnet(21)


@pytest.mark.slow
def test_the_trained_model_reads_digits(digits, digits_model):
    images, labels = digits.test
    with torch.no_grad():
        accuracy = (digits_model(images).argmax(1) == labels).float().mean().item()
    assert accuracy > 0.96


def test_the_splits_of_digits_do_not_overlap(digits):
    seen = [
        {image.numpy().tobytes() for image in images} for images, _ in (digits.train, digits.validation, digits.test)
    ]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 1797


def test_a_moved_random_state_is_noticed(global_rng_untouched):
    state = random.getstate()
    try:
        with pytest.raises(AssertionError, match="Python"), global_rng_untouched():
            random.random()
    finally:
        random.setstate(state)
