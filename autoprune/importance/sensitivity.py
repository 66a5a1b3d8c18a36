"""Sensitivity: expected change of the dense model's outputs without units, by one backward pass and without labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.data.batch import Batch, batch_size, beginning, pieces
from autoprune.importance.calibration import Calibration, affordable, private_copy
from autoprune.importance.criteria import readers
from autoprune.importance.reconstruction import Removal, reads
from autoprune.metrics.scorers import sampled_loss
from autoprune.protocols import FloatArray, IntArray

FEWEST_SAMPLES = 8
MOST_SAMPLES = 32
DRAWS = 1024
"""Number of independent draws from the outputs that is enough: one a token of a language model, else one a sample."""

_AT_ONCE = 4  # samples in one backward pass, which bounds its memory


def output_changes(calibration: Calibration, removals: Sequence[Removal], seed: int = 0) -> list[FloatArray | None]:
    """Estimate the change of the outputs of the whole model when units are set to zero in the layers that read them.

    The change is in nats where the outputs are logits (the divergence from the dense distribution), else the squared
    difference relative to the mean square of the outputs. It is of second order: half of E[(g . d)^2], where d is the
    removed input of a layer at one position, and g the gradient there of a loss with a label drawn from the dense
    outputs, so that E[g g^T] is their Fisher information. The terms of several layers that read one group are added
    before they are squared. Different positions of a sample are taken as independent. One forward and one backward pass
    over at most 32 samples, fewer of a large model, serve all options.

    Args:
        calibration: Labels are not used.
        removals: Groups with the units that each option removes.
        seed: For the labels drawn.

    Returns:
        For each removal the change for each option, shape (options,), finite and at least 0; None where no ungrouped
        convolution or linear layer reads the group, or no gradient arrives there.

    Reference:
        Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, arXiv:1801.05787, and
        Liu et al., "Group Fisher Pruning for Practical Network Compression", ICML 2021, arXiv:2108.00708; here with
        drawn labels, and for every option of a group with all products between its units.
    """
    copied = private_copy(calibration.model)
    structure = calibration.structure
    for module in copied.modules():  # only gradients of the inputs of layers are needed
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = parameter.detach()  # type: ignore[assignment]  # a plain tensor serves too
    axes, read = readers(copied, structure), reads(copied, structure)
    products: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def watch(layer: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = next(iter((*args, *kwargs.values())))
            branch = x.view_as(x) if x.requires_grad else x.detach().requires_grad_().view_as(x)
            seen = x.detach().clone()  # later operations may write to it

            def receive(gradient: Tensor) -> None:
                rows = (gradient * seen).movedim(axes[layer], -1)
                for group, inputs in read[layer].items():
                    each = rows[..., torch.from_numpy(inputs).to(rows.device)].sum(-1).flatten(0, -2)
                    key = group, tuple(each.shape)
                    products[key] = products[key] + each if key in products else each

            branch.register_hook(receive)
            return ((branch, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): branch})

        return hook

    handles = [copied.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True) for name in read]
    generator = torch.Generator().manual_seed(seed)
    sums: dict[int, FloatArray] = defaultdict(lambda: np.zeros(1))
    steps = [_steps(options) for _, options in removals]
    samples = draws = 0
    try:
        for part in _parts(calibration.batches, affordable(structure, FEWEST_SAMPLES, MOST_SAMPLES, passes=2)):
            if samples >= FEWEST_SAMPLES and draws >= DRAWS:
                break
            with torch.enable_grad():
                loss, drawn = sampled_loss(calibration.forward(copied, part), part, generator)
                loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            samples = samples + batch_size(part)
            draws = draws + drawn
            seen: dict[str, list[Tensor]] = defaultdict(list)
            for (name, _), each in products.items():
                seen[name].append(each)
            for i, (group, _) in enumerate(removals):
                for each in seen[group]:
                    sums[i] = sums[i] + _energies(each, steps[i])
            products.clear()
    finally:
        for handle in handles:
            handle.remove()
    found = [0.5 * sums[i] / draws if i in sums else None for i in range(len(removals))]
    return [each if each is not None and np.isfinite(each).all() else None for each in found]


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


def _parts(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """Divide the first `samples` samples into parts of a few."""
    return [part for batch in beginning(batches, samples) for part in pieces(batch, _AT_ONCE)]
