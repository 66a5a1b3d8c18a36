"""Shapes of results on the meta device: what is repeated is found once, and nothing is taken for something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from autoprune.structure.example import Example, default_dtype
from autoprune.structure.tracing.known_shapes import KnownShapes, shapes_kept
from autoprune.structure.tracing.trace import trace
from tests.counting import Counting
from tests.small_networks import chain


class TestKnownShapes:
    def test_a_repeated_operation_runs_once_on_the_meta_device(self):
        x, weight = torch.empty(2, 3, device="meta"), torch.ones(3, device="meta")
        with Counting() as below, KnownShapes():
            made = [torch.layer_norm(x, (3,), weight) for _ in range(5)]
        assert below.names.count("native_layer_norm") == 1
        assert all(each.shape == x.shape and each.stride() == x.stride() and each.is_meta for each in made)
        assert len({id(each) for each in made}) == 5

    @pytest.mark.parametrize("transposed", [False, True])
    def test_a_convolution_with_a_bias_of_another_size_is_refused_as_kernels_do(self, transposed: bool):
        x, weight = torch.empty(1, 4, 5, 5, device="meta"), torch.empty(4, 4, 1, 1, device="meta")
        convolve = F.conv_transpose2d if transposed else F.conv2d
        with KnownShapes():
            assert convolve(x, weight, torch.empty(4, device="meta")).shape == (1, 4, 5, 5)
            with pytest.raises(RuntimeError, match=r"to 4 channels got a bias of shape \(3,\)"):
                convolve(x, weight, torch.empty(3, device="meta"))

    def test_values_are_computed_each_time(self):
        x = torch.ones(3)
        with Counting() as below, KnownShapes():
            assert torch.equal(x + 1, torch.full((3,), 2.0))
            assert torch.equal(x + 1, torch.full((3,), 2.0))
        assert below.names.count("add") == 2

    def test_views_share_memory_and_what_is_in_place_returns_its_own(self):
        x = torch.empty(2, 3, device="meta")
        with KnownShapes():
            views = [x.view(6) for _ in range(2)]
            written = [x.add_(1) for _ in range(2)]
        assert all(view.untyped_storage()._cdata == x.untyped_storage()._cdata for view in views)
        assert all(each is x for each in written)

    @pytest.mark.parametrize("scalars", [(1, 1.0), (1.0, 1), (True, 1.5)])
    def test_arguments_that_are_equal_but_not_alike_are_told_apart(self, scalars: tuple[Any, Any]):
        x = torch.empty(2, dtype=torch.int64, device="meta")
        with KnownShapes():
            assert [(x + scalar).dtype for scalar in scalars] == [(x + scalar).dtype for scalar in scalars]
        plain = [(x + scalar).dtype for scalar in scalars]
        with KnownShapes():
            assert [(x + scalar).dtype for scalar in scalars] == plain

    def test_a_deep_network_is_traced_with_few_runs(self):
        with Counting() as below:
            trace(Example(chain(40), (torch.ones(2, 4),)))
        assert sum(name in ("addmm", "relu") for name in below.names) < 10

    def test_passes_of_an_analysis_share_what_they_learn(self):
        x = torch.empty(2, 3, device="meta")
        with Counting() as below, shapes_kept():
            for _ in range(3):
                with KnownShapes():
                    torch.relu(x)
        assert below.names.count("relu") == 1
        with Counting() as below, KnownShapes():
            torch.relu(x)
        assert below.names.count("relu") == 1

    def test_results_of_the_default_type_are_known_for_that_type_alone(self):
        x = torch.empty(2, dtype=torch.int64, device="meta")
        with shapes_kept():
            for kind in (torch.float32, torch.float64, torch.float32):
                with default_dtype(kind), KnownShapes():
                    assert (x / 2).dtype == kind
