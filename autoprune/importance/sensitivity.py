"""Sensitivity: expected change of the dense model's outputs without units, by one backward pass and without labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from autoprune.data.batch import batch_size
from autoprune.importance.calibration import Calibration, private_copy, ranked_on
from autoprune.importance.gradients import drawn_loss, parts_of
from autoprune.importance.reconstruction import Removal
from autoprune.importance.unit_products import Part, UnitProducts
from autoprune.protocols import FloatArray, IntArray


def output_changes(calibration: Calibration, removals: Sequence[Removal]) -> list[FloatArray | None]:
    """Estimate the change of the outputs of the whole model when units are set to zero in the layers that read them.

    The change is in nats where the outputs are logits (the divergence from the dense distribution), else the squared
    difference relative to the mean square of the outputs. It is of second order: half of E[(g . d)^2], where d is the
    removed input of a layer at one position, and g the gradient there of a loss with a label drawn from the dense
    outputs, so that E[g g^T] is their Fisher information. The terms of several layers that read one group are added
    before they are squared. Different positions of a sample are taken as independent. One forward and one backward pass
    over some 32 samples, fewer of a large model, serve all options; a criterion with gradients may have made it.

    Args:
        calibration: Labels are not used.
        removals: Groups with the units that each option removes.

    Returns:
        For each removal the change for each option, shape (options,), finite and at least 0; None where no ungrouped
        convolution or linear layer reads the group, or no gradient arrives there.

    Reference:
        Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, arXiv:1801.05787, and
        Liu et al., "Group Fisher Pruning for Practical Network Compression", ICML 2021, arXiv:2108.00708; here with
        drawn labels, and for every option of a group with all products between its units.
    """
    sums: dict[int, FloatArray] = defaultdict(lambda: np.zeros(1))
    steps = [_steps(options) for _, options in removals]
    draws = 0
    for part in UnitProducts.kept(calibration) or _observed(calibration):
        draws = draws + part.draws
        for i, (group, _) in enumerate(removals):
            for each in part.rows.get(group, ()):
                sums[i] = sums[i] + _energies(each, steps[i])
    found = [0.5 * sums[i] / draws if i in sums else None for i in range(len(removals))]
    return [each if each is not None and np.isfinite(each).all() else None for each in found]


def _observed(calibration: Calibration) -> Iterator[Part]:
    """Products of values and gradients of units, on the samples of criteria with gradients, until there are enough."""
    copied = calibration.of(private_copy(calibration.model))
    for module in copied.model.modules():  # only gradients of the inputs of layers are needed
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = parameter.detach()  # type: ignore[assignment]  # a plain tensor serves too
    generator = torch.Generator().manual_seed(calibration.seed)
    products = UnitProducts(copied)
    with products.observing():
        for part in parts_of(calibration.on(ranked_on(calibration))):
            with torch.enable_grad():
                drawn = drawn_loss(calibration.forward(copied.model, part), part, generator)
                drawn.loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            yield products.take(batch_size(part), drawn.draws, drawn.factor)
            if products.enough:
                break
    products.keep(calibration)


def _steps(options: Sequence[IntArray]) -> list[tuple[bool, Tensor]]:
    """Difference of each option to the one before: whether it holds all units of that, and its new units."""
    steps = []
    seen = np.zeros(0, dtype=np.int64)
    for units in options:
        more = bool(np.isin(seen, units).all())
        steps.append((more, torch.from_numpy(np.setdiff1d(units, seen) if more else np.unique(units))))
        seen = units
    return steps


def _energies(products: Tensor, steps: Sequence[tuple[bool, Tensor]]) -> FloatArray:
    """Sum over rows (n, units) of the squared sum over the units of each option, shape (options,)."""
    total = products.new_zeros(len(products))
    sums = []
    for more, units in steps:
        new = products[:, units.to(products.device)].sum(1)
        total = total + new if more else new
        sums.append(total)
    energies: FloatArray = torch.stack(sums).double().square().sum(1).cpu().numpy()
    return energies
