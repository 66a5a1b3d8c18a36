"""Expected loss of dropped branches, against networks built by hand without them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.importance.criteria import order_units, score_units
from autoprune.importance.dropped import dropped_losses
from autoprune.importance.expected_loss import expected_losses
from autoprune.importance.reconstruction import reconstruction_errors
from autoprune.importance.sensitivity import output_changes
from autoprune.protocols import Pruning
from autoprune.search_spaces import Channels, Depth, Product
from tests.residual import Residual, calibration_of


def losses_of(space, calibration, kind="auto"):
    scores = score_units(calibration, "l2", 0)
    bound = space.bind(calibration.structure, order_units(scores))
    found = expected_losses(kind, bound, scores, space.criterion and "l2", calibration)
    return found and dict(zip([dimension.name for dimension in bound.dimensions], found, strict=True))


@pytest.fixture(scope="module")
def plain():
    model = Residual(3).eval()
    calibration = calibration_of(model)
    x = calibration.batches[0][0]
    expected = {}
    with torch.no_grad():
        dense = model(x).log_softmax(1)
        for i in range(3):
            without = Residual(3).eval()
            without.load_state_dict(model.state_dict())
            nn.init.zeros_(without.parts[i][-1].weight)
            nn.init.zeros_(without.parts[i][-1].bias)
            expected[f"parts.{i}"] = F.kl_div(without(x).log_softmax(1), dense, log_target=True, reduction="batchmean")
    return calibration, {name: float(value) for name, value in expected.items()}


def test_dropped_branches_are_measured_on_networks_without_them(plain):
    calibration, expected = plain
    prunings = [Pruning(dropped=(name,)) for name in expected]
    assert dropped_losses(calibration, prunings) == pytest.approx(list(expected.values()), rel=1e-4)


@pytest.mark.parametrize("kind", ["sensitivity", "reconstruction"])
@pytest.mark.parametrize("space", [Depth(min_kept=1), Product(Channels(), Depth(min_kept=1))], ids=["alone", "product"])
def test_their_prior_is_in_proportion_and_in_the_unit_of_the_widths(plain, kind, space):
    calibration, expected = plain
    found = losses_of(space, calibration, kind)
    ratios = [found[name][1] / expected[name] for name in expected]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-3)
    removals = [(group.name, [np.arange(group.size)]) for group in calibration.structure.groups]
    measure = output_changes if kind == "sensitivity" else reconstruction_errors
    whole = [float(each[0]) for each in measure(calibration, removals)]
    assert ratios[0] == pytest.approx(np.median(np.array(whole) / list(expected.values())), rel=1e-3)
    assert all(row[0] == 0 for row in found.values())


def test_outputs_that_do_not_compare_leave_the_estimates():
    model = Residual(2).eval()
    calibration = calibration_of(model)
    odd = replace(calibration, forward=lambda module, batch: module(batch[0]).sum())
    assert dropped_losses(odd, [Pruning(dropped=("parts.0",))]) is None


def test_the_prior_of_a_network_with_batch_norm_counts_branches_as_well():
    calibration = calibration_of(Residual(2, nn.BatchNorm1d).eval())
    found = losses_of(Product(Channels(), Depth(min_kept=1)), calibration)
    assert all(np.isfinite(row).all() and (row[1:] > 0).any() for row in found.values())
